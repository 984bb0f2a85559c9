"""Parameters, FLOPs and cache bytes of a model, per layer and in all."""

from __future__ import annotations

from transom.args import LayerArgs, ModelArgs


def attention_parameters(layer: LayerArgs) -> int:
    """Weights of wq, wk, wv and wo."""
    return layer.dim * layer.head_dim * (2 * layer.n_heads + 2 * layer.n_kv_heads)


def feed_forward_parameters(layer: LayerArgs, *, active_only: bool = False) -> int:
    """Weights of the dense feed-forward, or of router and experts (those one token visits, if `active_only`)."""
    if layer.moe is None:
        return 3 * layer.dim * layer.hidden_dim
    moe = layer.moe
    assert moe.hidden_dim is not None, "LayerArgs resolves it"
    experts = (moe.top_k if active_only else moe.num_experts) + moe.shared_expert
    return layer.dim * moe.num_experts + experts * 3 * layer.dim * moe.hidden_dim


def layer_parameters(layer: LayerArgs, *, active_only: bool = False) -> int:
    """All weights of one block, its two norms included."""
    norms = 2 * layer.dim
    return attention_parameters(layer) + feed_forward_parameters(layer, active_only=active_only) + norms


def parameters(args: ModelArgs, *, active_only: bool = False) -> int:
    """All weights of the model; `active_only` counts the experts one token visits."""
    blocks = sum(layer_parameters(layer, active_only=active_only) for layer in args.layers)
    tables = args.vocab_size * args.dim * (1 if args.tie_embeddings else 2)
    return blocks + tables + args.dim


def keys_seen(layer: LayerArgs, length: int) -> float:
    """Mean number of keys one query of a sequence of `length` tokens sees."""
    kind, size = layer.rule.kind, layer.rule.size
    if kind == "full":
        return float(length)
    if kind == "causal" or size >= length:
        return (length + 1) / 2
    if kind == "window":
        return size - size * (size - 1) / (2 * length)
    whole, rest = divmod(length, size)
    return (whole * size * (size + 1) / 2 + rest * (rest + 1) / 2) / length


def layer_flops_per_token(layer: LayerArgs, length: int) -> float:
    """Forward FLOPs of one block per token: two per weight used, four per key seen and query feature."""
    weights = attention_parameters(layer) + feed_forward_parameters(layer, active_only=True)
    return 2.0 * weights + 4.0 * keys_seen(layer, length) * layer.n_heads * layer.head_dim


def flops_per_token(args: ModelArgs, length: int, *, training: bool = False) -> float:
    """FLOPs per token at a sequence of `length`: matrix products only; training is three forwards.

    Masked-out scores are not counted, so the utilisation derived from it does not flatter causal attention.
    """
    forward = sum(layer_flops_per_token(layer, length) for layer in args.layers)
    forward += 2.0 * args.vocab_size * args.dim
    return 3.0 * forward if training else forward


def kv_bytes_per_token(layer: LayerArgs, bytes_per_value: int = 4) -> int:
    """Cache bytes one more token costs in this layer, until a window or chunk is full."""
    return layer.kv_values_per_token * bytes_per_value


def kv_bytes(args: ModelArgs, length: int, bytes_per_value: int = 4) -> int:
    """Cache bytes of one row holding `length` tokens, windows and chunks taken into account."""
    total = 0
    for layer in args.layers:
        held = min(length, layer.rule.size) if layer.rule.size else length
        total += held * kv_bytes_per_token(layer, bytes_per_value)
    return total

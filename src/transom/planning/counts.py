"""Parameters, FLOPs and cache bytes of a model, per layer and in all."""

from __future__ import annotations

from transom.config.layer_args import LayerArgs
from transom.config.model_args import ModelArgs


def attention_weights(layer: LayerArgs) -> int:
    """Entries of the attention's matrices, those of a cross-attention not included."""
    mla = layer.mla
    if mla is None:
        return layer.dim * layer.head_dim * (2 * layer.n_heads + 2 * layer.n_kv_heads)
    q_dim = layer.n_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    rank = mla.q_lora_rank
    queries = layer.dim * q_dim if rank is None else rank * (layer.dim + q_dim)
    latents = layer.dim * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    ups = mla.kv_lora_rank * layer.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + latents + ups + layer.n_heads * mla.v_head_dim * layer.dim


def attention_vectors(layer: LayerArgs) -> int:
    """Biases, inner norms and sinks of the attention."""
    mla, bias_out = layer.mla, layer.out_bias * layer.dim
    if mla is not None:
        rank = mla.q_lora_rank or 0
        biases = layer.qkv_bias * (rank + mla.kv_lora_rank + mla.qk_rope_head_dim)
        return (rank + mla.kv_lora_rank) * _norm_width(layer) + biases + bias_out
    q_dim, kv_dim = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
    normed = {"none": 0, "head": 2 * layer.head_dim, "projection": q_dim + kv_dim}[layer.qk_norm]
    biases = layer.qkv_bias * (q_dim + 2 * kv_dim) + bias_out
    return normed * _norm_width(layer) + biases + layer.attn_sinks * layer.n_heads


def cross_attention_parameters(layer: LayerArgs) -> int:
    """Everything of the sublayer that attends to a context, 0 where there is none; its norms are
    not included.
    """
    if layer.context_dim is None:
        return 0
    q_dim, kv_dim = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
    biases = layer.qkv_bias * (q_dim + 2 * kv_dim) + layer.out_bias * layer.dim
    return 2 * layer.dim * q_dim + 2 * layer.context_dim * kv_dim + biases


def feed_forward_weights(layer: LayerArgs, *, active_only: bool = False) -> int:
    """Entries of the feed-forward's matrices: dense, or router and experts (one token's, if
    `active_only`).
    """
    products = 3 if layer.ffn_gated else 2
    if layer.moe is None:
        return products * layer.dim * layer.hidden_dim
    moe = layer.moe
    assert moe.hidden_dim is not None, "LayerArgs resolves it"
    wide = (moe.top_k if active_only else moe.num_experts) * moe.hidden_dim
    shared = (moe.shared_hidden_dim or moe.hidden_dim) if moe.shared_expert else 0
    return layer.dim * moe.num_experts + products * layer.dim * (wide + shared)


def feed_forward_vectors(layer: LayerArgs, *, active_only: bool = False) -> int:
    """Biases of the feed-forward, and of router and choice."""
    ups = 2 if layer.ffn_gated else 1
    if layer.moe is None:
        return layer.ffn_bias * (ups * layer.hidden_dim + layer.dim)
    moe = layer.moe
    assert moe.hidden_dim is not None, "LayerArgs resolves it"
    experts = moe.top_k if active_only else moe.num_experts
    shared = moe.shared_hidden_dim or moe.hidden_dim
    biases = moe.expert_bias * experts * (ups * moe.hidden_dim + layer.dim)
    biases += layer.ffn_bias * moe.shared_expert * (ups * shared + layer.dim)
    return biases + moe.num_experts * (moe.router_bias + moe.has_choice_bias)


def _norm_width(layer: LayerArgs) -> int:
    """Numbers per feature that a norm learns."""
    return 2 if layer.norm == "layer" else 1


def layer_parameters(layer: LayerArgs, *, active_only: bool = False) -> int:
    """All weights of one block, its norms included; `active_only` counts the experts one token
    visits.
    """
    sublayers = 2 if layer.context_dim is None else 3
    norms = (
        sublayers * (2 if layer.norm_placement == "both" else 1) * layer.dim * _norm_width(layer)
    )
    attention = (
        attention_weights(layer) + attention_vectors(layer) + cross_attention_parameters(layer)
    )
    weights = feed_forward_weights(layer, active_only=active_only)
    return attention + weights + feed_forward_vectors(layer, active_only=active_only) + norms


def vision_parameters(args: ModelArgs) -> int:
    """All weights of the image encoder, its adapter and projection; 0 for a text model."""
    v = args.vision_args
    if v is None:
        return 0
    patches = v.patch_grid**2
    embedding = v.num_channels * v.patch_size**2 * v.dim + (patches + 2) * v.dim
    block = 4 * v.dim * (v.dim + 1) + 2 * v.dim * v.hidden_dim + v.hidden_dim + v.dim + 4 * v.dim
    adapter = (
        v.dim * v.shuffle**2 * v.adapter_dim
        + v.adapter_dim * v.output_dim
        + v.output_dim * args.dim
    )
    return embedding + v.n_layers * block + 4 * v.dim + adapter


def output_parameters(args: ModelArgs) -> int:
    """Weights of an output matrix that the embeddings do not share."""
    outputs = args.vocab_size if args.head is None else args.head.outputs
    return 0 if args.tie_embeddings else outputs * args.dim


def parameters(args: ModelArgs, *, active_only: bool = False) -> int:
    """All weights of the model; `active_only` counts the experts one token visits."""
    blocks = sum(layer_parameters(layer, active_only=active_only) for layer in args.layers)
    final_norm = args.dim * (2 if args.norm == "layer" else 1)
    tables = args.vocab_size * args.dim + output_parameters(args)
    return blocks + tables + final_norm + vision_parameters(args)


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
    """Forward FLOPs of one block per token: two per weight used, and per key seen two per query and
    value feature.

    A cross-attention is left out: what it costs depends on the context.
    """
    weights = attention_weights(layer) + feed_forward_weights(layer, active_only=True)
    value = layer.head_dim if layer.mla is None else layer.mla.v_head_dim
    return 2.0 * weights + 2.0 * keys_seen(layer, length) * layer.n_heads * (layer.head_dim + value)


def flops_per_token(
    args: ModelArgs, length: int, *, training: bool = False, frozen: bool = False
) -> float:
    """FLOPs per token at a sequence of `length`: matrix products only; training is three forwards.

    With `frozen` weights it is two, as only inputs get gradients; an adapter's own products are
    left out. Masked-out scores are not counted, so the utilisation derived from it does not flatter
    causal attention.
    """
    forward = sum(layer_flops_per_token(layer, length) for layer in args.layers)
    forward += output_flops_per_token(args)
    if not training:
        return forward
    return 2.0 * forward if frozen else 3.0 * forward


def output_flops_per_token(args: ModelArgs) -> float:
    """FLOPs of the logits; a head of one vector per sequence costs a token nothing."""
    return 2.0 * args.vocab_size * args.dim if args.head is None else 0.0


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

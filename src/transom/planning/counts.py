"""Parameters, FLOPs and bytes of the KV cache of a model, per layer and in total. No torch."""

from __future__ import annotations

from transom.config.layer_args import LayerArgs, LayerRule, MlaArgs, MoeArgs
from transom.config.model_args import ModelArgs


def attention_weights(layer: LayerArgs) -> int:
    """Return the number of weights in the matrices of the attention, without cross-attention."""
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
    """Return the number of biases, weights of inner norms and sinks of the attention."""
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
    """Return the number of weights of cross-attention without its norms; 0 if there is none."""
    if layer.context_dim is None:
        return 0
    q_dim, kv_dim = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
    biases = layer.qkv_bias * (q_dim + 2 * kv_dim) + layer.out_bias * layer.dim
    return 2 * layer.dim * q_dim + 2 * layer.context_dim * kv_dim + biases


def feed_forward_weights(layer: LayerArgs, *, active_only: bool = False) -> int:
    """Return the number of weights in the matrices of the feed-forward, or of router and experts.

    With `active_only`, count the experts that one token visits.
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
    """Return the number of biases of the feed-forward, of the router and of the choice of experts.

    With `active_only`, count the experts that one token visits.
    """
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


def experts_visited(moe: MoeArgs, tokens: int) -> float:
    """Return the expected number of experts of a layer that a call of so many tokens visits.

    The choices of the tokens count as independent and uniform.
    """
    missed: float = (1 - moe.top_k / moe.num_experts) ** tokens
    return moe.num_experts * (1 - missed)


def absorbing_is_cheaper(mla: MlaArgs, queries: int, slots: int) -> bool:
    """Return whether latent attention takes fewer multiplications per head if queries move into the
    latent space than if keys and values are computed from the latents.

    All slots count as visible.
    """
    up = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    head = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    expanded = slots * up + queries * slots * head
    absorbed = queries * up + queries * slots * 2 * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    return absorbed < expanded


def _norm_width(layer: LayerArgs) -> int:
    """Return the number of weights per feature of a norm."""
    return 2 if layer.norm == "layer" else 1


def layer_parameters(layer: LayerArgs, *, active_only: bool = False) -> int:
    """Return the number of weights of one block with its norms.

    With `active_only`, count the experts that one token visits.
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
    """Return the number of weights of image encoder, adapter and projection; 0 for a text model."""
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
    """Return the number of weights of the output matrix; 0 if it is that of the embeddings."""
    outputs = args.vocab_size if args.head is None else args.head.outputs
    return 0 if args.tie_embeddings else outputs * args.dim


def parameters(args: ModelArgs, *, active_only: bool = False) -> int:
    """Return the number of weights of a model.

    With `active_only`, count the experts that one token visits.
    """
    blocks = sum(layer_parameters(layer, active_only=active_only) for layer in args.layers)
    final_norm = args.dim * (2 if args.norm == "layer" else 1)
    tables = args.vocab_size * args.dim + output_parameters(args)
    return blocks + tables + final_norm + vision_parameters(args)


def keys_seen(layer: LayerArgs, length: int) -> float:
    """Return the mean number of keys per query over a sequence of `length` tokens."""
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
    """Return the FLOPs of a forward pass of one block per token, mean over a sequence of `length`
    tokens.

    There are two FLOPs per weight in use, and per key two for each feature of queries and values.
    Cross-attention does not count, because its cost depends on the context.
    """
    weights = attention_weights(layer) + feed_forward_weights(layer, active_only=True)
    value = layer.head_dim if layer.mla is None else layer.mla.v_head_dim
    return 2.0 * weights + 2.0 * keys_seen(layer, length) * layer.n_heads * (layer.head_dim + value)


def flops_per_token(
    args: ModelArgs, length: int, *, training: bool = False, frozen: bool = False
) -> float:
    """Return the FLOPs per token of a model, mean over a sequence of `length` tokens.

    Only matrix products count. Masked scores do not count, so a utilisation computed from this
    number does not flatter causal attention.

    Args:
        args: the model.
        length: sequence length in tokens.
        training: count forward and backward, which is three forwards.
        frozen: weights get no gradients, so training is two forwards; the products of adapters do
            not count.
    """
    forward = sum(layer_flops_per_token(layer, length) for layer in args.layers)
    forward += output_flops_per_token(args)
    if not training:
        return forward
    return 2.0 * forward if frozen else 3.0 * forward


def output_flops_per_token(args: ModelArgs) -> float:
    """Return the FLOPs of the logits per token; 0 for a head with one vector per sequence."""
    return 2.0 * args.vocab_size * args.dim if args.head is None else 0.0


def kv_bytes_per_token(layer: LayerArgs, bytes_per_value: int = 4) -> int:
    """Return the bytes that one more token adds to the KV cache of a layer, until a window or chunk
    is full.

    Values of 1 byte are 8-bit codes, which have a float32 scale per head.
    """
    heads = 2 * layer.n_kv_heads if layer.mla is None else 1
    return layer.kv_values_per_token * bytes_per_value + (bytes_per_value == 1) * 4 * heads


def kv_bytes(args: ModelArgs, length: int, bytes_per_value: int = 4) -> int:
    """Return the bytes of the KV cache of one row of `length` tokens, with windows and chunks."""
    total = 0
    for layer in args.layers:
        cached = min(length, layer.rule.size) if layer.rule.size else length
        total += cached * kv_bytes_per_token(layer, bytes_per_value)
    return total


def ring_slots(rule: LayerRule, tokens: int, slack: int) -> int | None:
    """Return the slots of the ring of a layer in a cache of `tokens` per row; None for a layer that
    has a slot for every token.
    """
    slots = rule.size + slack
    return slots if rule.size and slots < tokens else None

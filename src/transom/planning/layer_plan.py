"""The plan of a model: each layer in words and numbers, and the totals. Arithmetic only, no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from transom.base.errors import expect
from transom.config.layer_args import LayerArgs, MoeArgs
from transom.config.model_args import ModelArgs
from transom.planning import counts

BYTES_PER_VALUE = {"bfloat16": 2, "float32": 4}
KV_BYTES_PER_VALUE = {**BYTES_PER_VALUE, "int8": 1}  # int8 as with --kv-bits 8


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one block.

    Attributes:
        index: its place among the blocks.
        attention: the kind of attention in words, as `attention_words` returns it.
        positions: the positions in words.
        heads: the heads in words.
        qk_norm: whether queries and keys are normalised.
        feed_forward: the feed-forward or the mixture of experts in words.
        parameters: all weights.
        active_parameters: the weights that one token uses.
        keys_seen: mean number of keys per query over a sequence of the plan's length.
        kv_bytes_per_token: bytes of the KV cache per token, by dtype.
        kv_bytes: bytes of the KV cache of one sequence of the plan's length, by dtype.
        flops_per_token: FLOPs of a forward pass per token, mean over such a sequence.
    """

    index: int
    attention: str
    positions: str
    heads: str
    qk_norm: bool
    feed_forward: str
    parameters: int
    active_parameters: int
    keys_seen: float
    kv_bytes_per_token: dict[str, int]
    kv_bytes: dict[str, int]
    flops_per_token: float


@dataclass(frozen=True)
class ModelPlan:
    """The plans of all layers and the totals of a model.

    Attributes:
        length: sequence length of the plan in tokens.
        layers: the plan of each layer.
        parameters: all weights.
        active_parameters: the weights that one token uses.
        embedding_parameters: weights of the token embeddings.
        output_parameters: weights of the output matrix; 0 if it is that of the embeddings (`tied`).
        final_norm_parameters: weights of the last norm.
        vision_parameters: weights of the image encoder.
        weight_bytes: bytes of all weights, by dtype.
        cacheable: False if a layer attends to later tokens, so that no KV cache is possible.
        kv_bytes_per_token: bytes of the KV cache per token, by dtype.
        kv_bytes: bytes of the KV cache of one sequence of `length`, by dtype.
        flops_per_token: FLOPs of a forward pass per token, mean over a sequence of `length`.
        training_flops_per_token: the same for forward and backward.
        output_flops_per_token: FLOPs of the logits per token.
        vocab_size: tokens in the vocabulary.
        max_seq_len: longest sequence that the model is meant for, in tokens.
        tied: whether the output matrix is that of the embeddings.
    """

    length: int
    layers: tuple[LayerPlan, ...]
    parameters: int
    active_parameters: int
    embedding_parameters: int
    output_parameters: int
    final_norm_parameters: int
    vision_parameters: int
    weight_bytes: dict[str, int]
    cacheable: bool
    kv_bytes_per_token: dict[str, int]
    kv_bytes: dict[str, int]
    flops_per_token: float
    training_flops_per_token: float
    output_flops_per_token: float
    vocab_size: int
    max_seq_len: int
    tied: bool


def plan(args: ModelArgs, length: int | None = None) -> ModelPlan:
    """Return the plan of a model.

    Args:
        args: the model.
        length: sequence length to count for, in tokens; None means `max_seq_len`.

    Raises:
        RequestError: `length` is less than 1.
    """
    tokens = args.max_seq_len if length is None else length
    expect(tokens >= 1, "length", tokens, "1 or more tokens")
    parameters = counts.parameters(args)
    return ModelPlan(
        length=tokens,
        layers=tuple(layer_plan(layer, tokens) for layer in args.layers),
        parameters=parameters,
        active_parameters=counts.parameters(args, active_only=True),
        embedding_parameters=args.vocab_size * args.dim,
        output_parameters=counts.output_parameters(args),
        final_norm_parameters=args.dim * (2 if args.norm == "layer" else 1),
        vision_parameters=counts.vision_parameters(args),
        weight_bytes={dtype: parameters * size for dtype, size in BYTES_PER_VALUE.items()},
        cacheable=all(layer.rule.kind != "full" for layer in args.layers),
        kv_bytes_per_token={
            dtype: sum(counts.kv_bytes_per_token(layer, size) for layer in args.layers)
            for dtype, size in KV_BYTES_PER_VALUE.items()
        },
        kv_bytes={
            dtype: counts.kv_bytes(args, tokens, size) for dtype, size in KV_BYTES_PER_VALUE.items()
        },
        flops_per_token=counts.flops_per_token(args, tokens),
        training_flops_per_token=counts.flops_per_token(args, tokens, training=True),
        output_flops_per_token=counts.output_flops_per_token(args),
        vocab_size=args.vocab_size,
        max_seq_len=args.max_seq_len,
        tied=args.tie_embeddings,
    )


def layer_plan(layer: LayerArgs, length: int) -> LayerPlan:
    """Return the plan of one block for a sequence length in tokens."""
    per_token = {
        dtype: counts.kv_bytes_per_token(layer, size) for dtype, size in KV_BYTES_PER_VALUE.items()
    }
    cached = min(length, layer.rule.size) if layer.rule.size else length
    return LayerPlan(
        index=layer.index,
        attention=attention_words(layer),
        positions=position_words(layer),
        heads=head_words(layer),
        qk_norm=layer.use_qk_norm or layer.qk_norm != "none",
        feed_forward=feed_forward_words(layer) if layer.moe is None else moe_words(layer.moe),
        parameters=counts.layer_parameters(layer),
        active_parameters=counts.layer_parameters(layer, active_only=True),
        keys_seen=counts.keys_seen(layer, length),
        kv_bytes_per_token=per_token,
        kv_bytes={dtype: cached * size for dtype, size in per_token.items()},
        flops_per_token=counts.layer_flops_per_token(layer, length),
    )


def attention_words(layer: LayerArgs) -> str:
    """Return `causal`, `full`, `window 4096` or `chunk 8192`, and what is special about its
    scores.
    """
    rule = layer.rule
    words = f"{rule.kind} {rule.size}" if rule.size else rule.kind
    words += "" if layer.attn_softcap is None else f" capped {layer.attn_softcap:.10g}"
    words += " + sinks" if layer.attn_sinks else ""
    return words if layer.context_dim is None else f"{words} + context {layer.context_dim}"


def head_words(layer: LayerArgs) -> str:
    """Return `32 q / 8 kv x 128`, or `128 q / latent 512 + 64` for latent attention."""
    if layer.mla is not None:
        return f"{layer.n_heads} q / latent {layer.mla.kv_lora_rank} + {layer.mla.qk_rope_head_dim}"
    return f"{layer.n_heads} q / {layer.n_kv_heads} kv x {layer.head_dim}"


def feed_forward_words(layer: LayerArgs) -> str:
    """Return `SwiGLU 14336`, `GeGLU 9216`, or the activation if there is no gate, with the
    width.
    """
    gated = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh)", "relu": "ReGLU"}
    return f"{gated[layer.activation] if layer.ffn_gated else layer.activation} {layer.hidden_dim}"


def position_words(layer: LayerArgs) -> str:
    """Return `RoPE theta 500000` and its scaling, or `NoPE`, with `+ temperature` if queries have
    one.
    """
    words = "NoPE"
    if layer.rope is not None:
        words = f"RoPE theta {layer.rope.theta:.10g}"
        if layer.rope.scaling is not None:
            kind = "" if layer.rope.scaling.kind == "llama3" else f"{layer.rope.scaling.kind} "
            words += f" {kind}scaled x{layer.rope.scaling.factor:.10g}"
    return words if layer.temperature is None else f"{words} + temperature"


def moe_words(moe: MoeArgs) -> str:
    """Return `MoE 8 x 14336, top 2 softmax`, with `+ shared` for an expert that every token
    visits.
    """
    shared = " + shared" if moe.shared_expert else ""
    return f"MoE {moe.num_experts} x {moe.hidden_dim}, top {moe.top_k} {moe.routing}{shared}"


def groups(layers: tuple[LayerPlan, ...]) -> list[list[LayerPlan]]:
    """Return equal layers together, in the order in which each kind first appears."""
    kinds: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        kinds.setdefault(repr(replace(layer, index=0)), []).append(layer)
    return list(kinds.values())


def index_words(indices: tuple[int, ...]) -> str:
    """Return `0-31`, `0-2, 4-6` or, for many runs at equal distances, `0-2, 4-6, ... 44-46 (36
    layers)`.
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    step = runs[1][0] - runs[0][0] if len(runs) > 1 else 0
    even = all([a + step, b + step] == after for (a, b), after in pairwise(runs))
    if even and len(runs) > 4:
        return f"{words[0]}, {words[1]}, ... {words[-1]} ({len(indices)} layers)"
    return ", ".join(words)

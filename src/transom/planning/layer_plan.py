"""The plan of a model: every layer in words and in numbers, and what they come to. Arithmetic only,
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from transom.base.errors import require
from transom.config.layer_args import LayerArgs, MoeArgs
from transom.config.model_args import ModelArgs
from transom.planning import counts

BYTES_PER_VALUE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class LayerPlan:
    """One block: what it is, in words, and what it costs, in numbers.

    `keys_seen` and `flops_per_token` (forward) are means over a sequence of the plan's length;
    `kv_bytes` is the cache of one such sequence. Both kv dictionaries hold bytes by dtype.
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
    """All layers and their totals; `length` is in tokens, byte counts are by dtype.

    `output_parameters` is 0 when the output shares the embeddings' weights (`tied`); `cacheable` is
    False when a layer sees later tokens, since a cache cannot hold what has not been written.
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


@dataclass(frozen=True)
class LayerGroup:
    """Equal layers: one of them, and the indices of all of them in order."""

    layer: LayerPlan
    indices: tuple[int, ...]


def plan(args: ModelArgs, length: int | None = None) -> ModelPlan:
    """What `args` describes, counted for one sequence of `length` tokens (`max_seq_len` when
    absent).
    """
    tokens = args.max_seq_len if length is None else length
    require(tokens >= 1, "length", tokens, "expected 1 or more tokens")
    table = args.vocab_size * args.dim
    parameters = counts.parameters(args)
    return ModelPlan(
        length=tokens,
        layers=tuple(layer_plan(layer, tokens) for layer in args.layers),
        parameters=parameters,
        active_parameters=counts.parameters(args, active_only=True),
        embedding_parameters=table,
        output_parameters=counts.output_parameters(args),
        final_norm_parameters=args.dim * (2 if args.norm == "layer" else 1),
        vision_parameters=counts.vision_parameters(args),
        weight_bytes={dtype: parameters * size for dtype, size in BYTES_PER_VALUE.items()},
        cacheable=all(layer.rule.kind != "full" for layer in args.layers),
        kv_bytes_per_token={
            dtype: sum(counts.kv_bytes_per_token(layer, size) for layer in args.layers)
            for dtype, size in BYTES_PER_VALUE.items()
        },
        kv_bytes={
            dtype: counts.kv_bytes(args, tokens, size) for dtype, size in BYTES_PER_VALUE.items()
        },
        flops_per_token=counts.flops_per_token(args, tokens),
        training_flops_per_token=counts.flops_per_token(args, tokens, training=True),
        output_flops_per_token=counts.output_flops_per_token(args),
        vocab_size=args.vocab_size,
        max_seq_len=args.max_seq_len,
        tied=args.tie_embeddings,
    )


def layer_plan(layer: LayerArgs, length: int) -> LayerPlan:
    """One block's row of the plan at `length` tokens."""
    per_token = {
        dtype: counts.kv_bytes_per_token(layer, size) for dtype, size in BYTES_PER_VALUE.items()
    }
    held = min(length, layer.rule.size) if layer.rule.size else length
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
        kv_bytes={dtype: held * size for dtype, size in per_token.items()},
        flops_per_token=counts.layer_flops_per_token(layer, length),
    )


def attention_words(layer: LayerArgs) -> str:
    """`causal`, `full`, `window 4096` or `chunk 8192`, with what its scores go through."""
    rule = layer.rule
    words = f"{rule.kind} {rule.size}" if rule.size else rule.kind
    words += "" if layer.attn_softcap is None else f" capped {layer.attn_softcap:.10g}"
    words += " + sinks" if layer.attn_sinks else ""
    return words if layer.context_dim is None else f"{words} + context {layer.context_dim}"


def head_words(layer: LayerArgs) -> str:
    """`32 q / 8 kv x 128`, or `128 q / latent 512 + 64` where all heads share one."""
    if layer.mla is not None:
        return f"{layer.n_heads} q / latent {layer.mla.kv_lora_rank} + {layer.mla.qk_rope_head_dim}"
    return f"{layer.n_heads} q / {layer.n_kv_heads} kv x {layer.head_dim}"


def feed_forward_words(layer: LayerArgs) -> str:
    """`SwiGLU 14336`, `GeGLU 9216`, or the activation's name where nothing is gated."""
    gated = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh)", "relu": "ReGLU"}
    return f"{gated[layer.activation] if layer.ffn_gated else layer.activation} {layer.hidden_dim}"


def position_words(layer: LayerArgs) -> str:
    """`RoPE theta 500000`, its scaling if any, or `NoPE`, and whether queries have a
    temperature.
    """
    words = "NoPE"
    if layer.rope is not None:
        words = f"RoPE theta {layer.rope.theta:.10g}"
        if layer.rope.scaling is not None:
            kind = "" if layer.rope.scaling.kind == "llama3" else f"{layer.rope.scaling.kind} "
            words += f" {kind}scaled x{layer.rope.scaling.factor:.10g}"
    return words if layer.temperature is None else f"{words} + temperature"


def moe_words(moe: MoeArgs) -> str:
    """`MoE 8 x 14336, top 2 softmax`, with `+ shared` for the expert that every token visits."""
    shared = " + shared" if moe.shared_expert else ""
    return f"MoE {moe.num_experts} x {moe.hidden_dim}, top {moe.top_k} {moe.routing}{shared}"


def groups(layers: tuple[LayerPlan, ...]) -> list[LayerGroup]:
    """Equal layers together, in the order in which each kind first appears."""
    found: list[tuple[LayerPlan, list[int]]] = []
    for layer in layers:
        same = (indices for kind, indices in found if replace(kind, index=layer.index) == layer)
        indices = next(same, None)
        if indices is None:
            found.append((layer, [layer.index]))
        else:
            indices.append(layer.index)
    return [LayerGroup(layer, tuple(indices)) for layer, indices in found]


def index_words(indices: tuple[int, ...]) -> str:
    """`0-31`, `0-2, 4-6` or, for many runs at equal distances, `0-2, 4-6, ... 44-46 (36
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

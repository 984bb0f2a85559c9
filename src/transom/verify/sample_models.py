"""Models to compare with: small ones that together use every option, and shrunken copies of real
ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transom.config.layer_args import LayerArgs, MlaArgs, MoeArgs, RopeScaling
from transom.config.model_args import ModelArgs
from transom.models.llm import LLM

WINDOW, CHUNK, ORIGINAL = (
    5,
    6,
    32,
)  # tokens: what windows, chunks and original contexts become in a copy
VOCABULARY = 61
CONTEXT = 10  # features, and rows of what cross-attention looks at
HEAD = 8
MOST_LAYERS = 8

BASE: dict[str, Any] = {
    "dim": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": HEAD,
    "hidden_dim": 20,
    "vocab_size": VOCABULARY,
    "max_seq_len": 256,
    "rope_theta": 100.0,
}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": ORIGINAL}

# Each is a known family in small: together they use every option that the oracle speaks.
SAMPLES: dict[str, dict[str, Any]] = {
    "mixed": {
        **BASE,
        "n_layers": 4,
        "layer_pattern": "SCFf",
        "sliding_window": WINDOW,
        "attention_chunk_size": CHUNK,
        "rope_scaling": LLAMA3,
    },
    "llama4": {
        **BASE,
        "n_layers": 4,
        "attention_chunk_size": CHUNK,
        "nope_layer_interval": 2,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 4.0,
        "moe_args": {
            "num_experts": 4,
            "top_k": 1,
            "routing": "sigmoid",
            "hidden_dim": 16,
            "shared_expert": True,
            "interleave_moe_layer_step": 2,
        },
    },
    "qwen3": {
        **BASE,
        "rope_layout": "halves",
        "qk_norm": "head",
        "qkv_bias": True,
        "tie_embeddings": True,
        "moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 16, "normalize": False},
    },
    "mixtral": {**BASE, "moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 16}},
    "gemma": {
        **BASE,
        "rope_layout": "halves",
        "layer_pattern": "SF",
        "sliding_window": WINDOW,
        "rope_local_theta": 50.0,
        "rope_scaling": {"kind": "linear", "factor": 4.0},
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "activation": "gelu_tanh",
        "attn_softcap": 2.0,
        "logit_softcap": 3.0,
        "softmax_scale": 0.4,
        "embedding_scale": 5.0,
    },
    "gpt-oss": {
        **BASE,
        "rope_layout": "halves",
        "layer_pattern": "SF",
        "sliding_window": WINDOW,
        "norm": "rms_wide",
        "attn_sinks": True,
        "qkv_bias": True,
        "out_bias": True,
        "rope_scaling": {
            "kind": "yarn",
            "factor": 4.0,
            "original_max_seq_len": ORIGINAL,
            "truncate": False,
        },
        "moe_args": {
            "num_experts": 4,
            "top_k": 2,
            "hidden_dim": 16,
            "router_bias": True,
            "expert_bias": True,
            "expert_activation": "clamped",
            "activation_limit": 1.0,
        },
    },
    "deepseek": {
        **BASE,
        "n_kv_heads": None,
        "head_dim": None,
        "mla_args": {
            "kv_lora_rank": 12,
            "q_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "rope_scaling": {
            "kind": "yarn",
            "factor": 8.0,
            "original_max_seq_len": ORIGINAL,
            "beta_fast": 4.0,
            "mscale": 0.8,
            "mscale_all_dim": 1.2,
        },
        "moe_args": {
            "num_experts": 8,
            "top_k": 2,
            "routing": "biased_sigmoid",
            "num_groups": 4,
            "top_groups": 2,
            "routed_scale": 1.5,
            "hidden_dim": 16,
            "shared_expert": True,
            "first_dense_layers": 1,
        },
    },
    "olmo2": {**BASE, "rope_layout": "halves", "qk_norm": "projection", "norm_placement": "post"},
    "phi": {
        **BASE,
        "n_kv_heads": 1,
        "rotary_fraction": 0.5,
        "norm": "layer",
        "activation": "gelu",
        "ffn_gated": False,
        "ffn_bias": True,
        "logit_scale": 0.5,
    },
}


@dataclass(frozen=True)
class Copy:
    """A model in small: its arguments, and one line for everything that was left out of it."""

    args: ModelArgs
    left_out: tuple[str, ...] = ()


def small_copy(args: ModelArgs, *, context: bool = False) -> Copy:
    """The same pattern and options with every size scaled down, so that a few dozen tokens cross
    every edge.

    `context` keeps cross-attention, for those who have a context to give.
    """
    letters, left_out = shrunken_pattern(args)
    for field, what in (
        ("vision_args", "the image encoder"),
        ("head", "the head that replaces next-token logits"),
        ("context_dim", "attention to a context"),
    ):
        if getattr(args, field) is not None and not (context and field == "context_dim"):
            left_out.append(f"{field}: {what} is left out of the copy")
    latent = args.mla_args is not None
    kv_heads = min(args.kv_heads, 2)
    groups = min(args.n_heads // args.kv_heads, 3)
    used = {letter.upper() for letter in letters}
    rotary_halves = args.rotary_fraction < 1
    head = 2 * HEAD if rotary_halves else HEAD
    return Copy(
        replace(
            args,
            dim=24,
            n_layers=len(letters),
            n_heads=kv_heads * groups,
            n_kv_heads=None if latent else kv_heads,
            head_dim=None if latent else head,
            hidden_dim=20,
            vocab_size=VOCABULARY,
            max_seq_len=256,
            rope_theta=100.0,
            rope_local_theta=50.0
            if args.rope_local_theta is not None and used & {"S", "C"}
            else None,
            rotary_fraction=0.5 if rotary_halves else 1.0,
            rope_scaling=None
            if args.rope_scaling is None
            else shrunken_scaling(args, args.rope_scaling),
            rope_original_max_seq_len=ORIGINAL,
            sliding_window=WINDOW if "S" in used else None,
            attention_chunk_size=CHUNK if "C" in used else None,
            nope_layer_interval=None,
            layer_pattern=tuple(letters),
            attn_temperature_tuning=args.attn_temperature_tuning and not "".join(letters).isupper(),
            floor_scale=4.0,
            softmax_scale=None if args.softmax_scale is None else 0.4,
            attn_softcap=None if args.attn_softcap is None else 2.0,
            logit_softcap=None if args.logit_softcap is None else 3.0,
            embedding_scale=None if args.embedding_scale is None else 5.0,
            mup_base_dim=None if args.mup_base_dim is None else 12,
            mla_args=MlaArgs(12, 10 if args.mla_args.q_lora_rank else None, 6, 4, 8)
            if args.mla_args
            else None,
            moe_args=None if args.moe_args is None else shrunken_moe(args.moe_args, len(letters)),
            vision_args=None,
            head=None,
            context_dim=CONTEXT if context and args.context_dim is not None else None,
        ),
        tuple(left_out),
    )


def shrunken_pattern(args: ModelArgs) -> tuple[str, list[str]]:
    """Letters of the shortest run of layers from the bottom that has every kind of layer, and what
    it lacks.
    """
    kinds = [replace(layer, index=0) for layer in args.layers]
    count = max(kinds.index(kind) for kind in kinds) + 1
    count = min(max(count, 2), MOST_LAYERS, args.n_layers)
    missing = len(set(map(_kind, args.layers))) - len(set(map(_kind, args.layers[:count])))
    said = (
        [f"{missing} kinds of layers above layer {count - 1} are left out of the copy"]
        if missing
        else []
    )
    return args.pattern[:count], said


def _kind(layer: LayerArgs) -> LayerArgs:
    return replace(layer, index=0)


def shrunken_scaling(args: ModelArgs, scaling: RopeScaling) -> RopeScaling:
    """The same rule around a short original context, with as many longrope factors as there are
    pairs left.
    """
    pairs = 2 if args.mla_args is not None else HEAD // 2
    short, long = (
        tuple(factors[i * len(factors) // pairs] for i in range(pairs if factors else 0))
        for factors in (scaling.short_factor, scaling.long_factor)
    )
    return replace(scaling, original_max_seq_len=ORIGINAL, short_factor=short, long_factor=long)


def shrunken_moe(moe: MoeArgs, layers: int) -> MoeArgs:
    """Few narrow experts, in groups where there were groups; tokens still choose some and not
    others.
    """
    grouped = moe.num_groups > 1
    experts = 8 if grouped else min(moe.num_experts, 4)
    return replace(
        moe,
        num_experts=experts,
        top_k=min(moe.top_k, 2, experts),
        num_groups=4 if grouped else 1,
        top_groups=2 if grouped else 1,
        hidden_dim=16,
        shared_hidden_dim=12 if moe.shared_hidden_dim is not None else None,
        first_dense_layers=min(moe.first_dense_layers, layers),
        dense_layers=tuple(index for index in moe.dense_layers if index < layers),
    )


def sample_model(args: ModelArgs, seed: int = 0, dtype: torch.dtype = torch.float64) -> LLM:
    """A model with every weight drawn, ready for inference: `init_weights` would leave each block
    the identity.

    Norm weights are drawn around 1, so that one that is lost or applied twice shows.
    """
    model = LLM(args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                fan_in = 1 if name == "tok_embeddings.weight" else weight.shape[-1]
                weight.copy_(1.2 * draw / fan_in**0.5)
            else:
                weight.copy_(0.3 * draw + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.to(dtype).eval()


def random_context(args: ModelArgs, rows: int) -> Tensor:
    """A random context [rows, S, C] for cross-attention, the same for every row."""
    generator = torch.Generator().manual_seed(2)
    assert args.context_dim is not None, "asked of a model that attends to one"
    return torch.randn(1, CONTEXT, args.context_dim, generator=generator).expand(rows, -1, -1)


def random_tokens(args: ModelArgs, rows: int, count: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, count] of the model's vocabulary."""
    return torch.randint(
        args.vocab_size, (rows, count), generator=torch.Generator().manual_seed(seed)
    )

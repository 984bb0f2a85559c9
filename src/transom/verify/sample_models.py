"""Small models with random weights: samples of known families, and small copies of real models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import notice
from transom.config.layer_args import MlaArgs, MoeArgs, RopeScaling
from transom.config.model_args import ModelArgs
from transom.models.llm import LLM

WINDOW, CHUNK = 5, 6  # tokens, of sliding windows and attention chunks
ORIGINAL = 32  # tokens, the original context length of RoPE scaling
VOCABULARY = 61
CONTEXT = 10  # both the length and the feature size of the context of cross-attention
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
MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 16}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": ORIGINAL}

# One model for each family of options. Together they use every option of the oracle.
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
            **MOE,
            "top_k": 1,
            "routing": "sigmoid",
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
        "moe_args": {**MOE, "normalize": False},
    },
    "mixtral": {**BASE, "moe_args": MOE},
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
            **MOE,
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
            **MOE,
            "num_experts": 8,
            "routing": "biased_sigmoid",
            "num_groups": 4,
            "top_groups": 2,
            "routed_scale": 1.5,
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


# What a small copy has in place of these options, where a model uses them.
_SMALL_VALUES = {
    "softmax_scale": 0.4,
    "attn_softcap": 2.0,
    "logit_softcap": 3.0,
    "embedding_scale": 5.0,
    "mup_base_dim": 12,
}
_PARTS = {
    "vision_args": "the image encoder",
    "head": "the head in place of next-token logits",
    "context_dim": "cross-attention",
}


def small_copy(args: ModelArgs, name: str, *, context: bool = False) -> ModelArgs:
    """Scale every size of a model down and keep its options.

    A sequence of a few dozen tokens then reaches beyond every window, chunk and original context
    length. The layers are the first ones that together are of every kind, at most `MOST_LAYERS`.

    Args:
        args: The arguments of the real model.
        name: The name of the model in the notices of the parts that the copy lacks.
        context: Whether the copy keeps cross-attention; the caller must then pass a context.
    """
    kinds = [replace(layer, index=0) for layer in args.layers]
    count = max(kinds.index(kind) for kind in kinds) + 1
    count = min(max(count, 2), MOST_LAYERS, args.n_layers)
    letters = args.pattern[:count]
    for field, part in _PARTS.items():
        if getattr(args, field) is not None and not (context and field == "context_dim"):
            notice(f"{name}: {field}: the small copy leaves out {part}")
    if missing := len(set(kinds)) - len(set(kinds[:count])):
        notice(f"{name}: the small copy leaves out {missing} kinds of layers after {count - 1}")
    used = {letter.upper() for letter in letters}
    latent, partial = args.mla_args is not None, args.rotary_fraction < 1
    kv_heads = min(args.kv_heads, 2)
    local = args.rope_local_theta is not None and used & {"S", "C"}
    small: dict[str, Any] = {
        key: value for key, value in _SMALL_VALUES.items() if getattr(args, key) is not None
    }
    if args.rope_scaling is not None:
        small["rope_scaling"] = _small_scaling(args.rope_scaling, 2 if latent else HEAD // 2)
    if args.mla_args is not None:
        small["mla_args"] = MlaArgs(12, 10 if args.mla_args.q_lora_rank else None, 6, 4, 8)
    if args.moe_args is not None:
        small["moe_args"] = _small_moe(args.moe_args, count)
    return replace(
        args,
        dim=24,
        n_layers=count,
        n_heads=kv_heads * min(args.n_heads // args.kv_heads, 3),
        n_kv_heads=None if latent else kv_heads,
        head_dim=None if latent else HEAD * (2 if partial else 1),
        hidden_dim=20,
        vocab_size=VOCABULARY,
        max_seq_len=256,
        rope_theta=100.0,
        rope_local_theta=50.0 if local else None,
        rotary_fraction=0.5 if partial else 1.0,
        rope_original_max_seq_len=ORIGINAL,
        sliding_window=WINDOW if "S" in used else None,
        attention_chunk_size=CHUNK if "C" in used else None,
        nope_layer_interval=None,
        layer_pattern=tuple(letters),
        attn_temperature_tuning=args.attn_temperature_tuning and not letters.isupper(),
        floor_scale=4.0,
        vision_args=None,
        head=None,
        context_dim=CONTEXT if context and args.context_dim is not None else None,
        **small,
    )


def _small_scaling(scaling: RopeScaling, pairs: int) -> RopeScaling:
    """Return the same scaling for a short original context, with one LongRoPE factor per pair."""
    short, long = (
        tuple(factors[i * len(factors) // pairs] for i in range(pairs if factors else 0))
        for factors in (scaling.short_factor, scaling.long_factor)
    )
    return replace(scaling, original_max_seq_len=ORIGINAL, short_factor=short, long_factor=long)


def _small_moe(moe: MoeArgs, layers: int) -> MoeArgs:
    """Return the same routing among a few narrow experts, still more of them than are chosen."""
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
    """Return a model in evaluation mode with all weights random.

    `init_weights` would make every block the identity and hide most bugs. The weights of norms are
    drawn around 1, so that a norm that is skipped or applied twice changes the result.
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
    """Return a random context [rows, S, C] for cross-attention, equal in every row."""
    assert args.context_dim is not None, "the model has cross-attention"
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, CONTEXT, args.context_dim, generator=generator).expand(rows, -1, -1)


def random_tokens(args: ModelArgs, rows: int, count: int, seed: int = 0) -> Tensor:
    """Return random token ids [rows, count], int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(args.vocab_size, (rows, count), generator=generator)

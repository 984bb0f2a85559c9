"""Known models as plain data: every entry is an argument of `ModelArgs.from_dict`. No torch."""

from __future__ import annotations

from typing import Any

from transom.base.errors import RequestError, nearest
from transom.config.layer_args import yarn_mscale
from transom.config.model_args import ModelArgs

PRESETS: dict[str, dict[str, Any]] = {
    # The two-minute model of `transom demo`.
    "demo": {
        "dim": 128,
        "n_layers": 4,
        "n_heads": 2,
        "hidden_dim": 384,
        "vocab_size": 2048,
        "max_seq_len": 256,
        "norm_eps": 1e-6,
        "rope_theta": 1000.0,  # its contexts are short: long wavelengths would stand still
    },
    # A GPT-2-sized Llama, the shape the benchmarks call 110m.
    "llama-110m": {
        "dim": 768,
        "n_layers": 12,
        "n_heads": 12,
        "n_kv_heads": 4,
        "hidden_dim": 2048,
        "vocab_size": 32000,
    },
    "llama3-8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "max_seq_len": 8192,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "rope_theta": 500000.0,
    },
    "llama3.1-8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "max_seq_len": 131072,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "mistral-7b-v0.1": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "hidden_dim": 14336,
        "vocab_size": 32000,
        "max_seq_len": 32768,
        "sliding_window": 4096,
    },
    "mixtral-8x7b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "hidden_dim": 14336,
        "vocab_size": 32000,
        "max_seq_len": 32768,
        "rope_theta": 1000000.0,
        "moe_args": {"num_experts": 8, "top_k": 2, "hidden_dim": 14336},
    },
    "qwen3-8b": {
        "dim": 4096,
        "n_layers": 36,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 128,
        "hidden_dim": 12288,
        "vocab_size": 151936,
        "max_seq_len": 40960,
        "norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_layout": "halves",
        "qk_norm": "head",
    },
    "gemma2-9b": {
        "dim": 3584,
        "n_layers": 42,
        "n_heads": 16,
        "n_kv_heads": 8,
        "head_dim": 256,
        "hidden_dim": 14336,
        "vocab_size": 256000,
        "max_seq_len": 8192,
        "norm_eps": 1e-6,
        "rope_layout": "halves",
        "layer_pattern": "SF",
        "sliding_window": 4096,
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "activation": "gelu_tanh",
        "attn_softcap": 50.0,
        "logit_softcap": 30.0,
        "embedding_scale": 3584**0.5,
        "tie_embeddings": True,
    },
    "gpt-oss-20b": {
        "dim": 2880,
        "n_layers": 24,
        "n_heads": 64,
        "n_kv_heads": 8,
        "head_dim": 64,
        "hidden_dim": 2880,
        "vocab_size": 201088,
        "max_seq_len": 131072,
        "rope_theta": 150000.0,
        "rope_layout": "halves",
        "rope_scaling": {
            "kind": "yarn",
            "factor": 32.0,
            "original_max_seq_len": 4096,
            "truncate": False,
        },
        "layer_pattern": "SF",
        "sliding_window": 128,
        "norm": "rms_wide",
        "qkv_bias": True,
        "out_bias": True,
        "attn_sinks": True,
        "moe_args": {
            "num_experts": 32,
            "top_k": 4,
            "hidden_dim": 2880,
            "router_bias": True,
            "expert_bias": True,
            "expert_activation": "clamped",
        },
    },
    "deepseek-v3": {
        "dim": 7168,
        "n_layers": 61,
        "n_heads": 128,
        "hidden_dim": 18432,
        "vocab_size": 129280,
        "max_seq_len": 163840,
        "norm_eps": 1e-6,
        "mla_args": {"q_lora_rank": 1536},
        "softmax_scale": 192**-0.5 * yarn_mscale(40.0, 1.0) ** 2,
        "rope_scaling": {
            "kind": "yarn",
            "factor": 40.0,
            "original_max_seq_len": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "moe_args": {
            "num_experts": 256,
            "top_k": 8,
            "routing": "biased_sigmoid",
            "routed_scale": 2.5,
            "num_groups": 8,
            "top_groups": 4,
            "hidden_dim": 2048,
            "shared_expert": True,
            "first_dense_layers": 3,
            "balance": "bias",
        },
    },
    "llama4-scout": {
        "dim": 5120,
        "n_layers": 48,
        "n_heads": 40,
        "n_kv_heads": 8,
        "head_dim": 128,
        "hidden_dim": 16384,
        "vocab_size": 202048,
        "max_seq_len": 262144,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "rope_scaling_factor": 16.0,
        "rope_high_freq_factor": 1.0,
        "attention_chunk_size": 8192,
        "nope_layer_interval": 4,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "moe_args": {
            "num_experts": 16,
            "top_k": 1,
            "routing": "sigmoid",
            "hidden_dim": 8192,
            "shared_expert": True,
        },
    },
}


def preset(name: str, **changes: Any) -> ModelArgs:
    """Return the arguments of a known model.

    Args:
        name: a key of `PRESETS`.
        changes: fields to replace, as `ModelArgs.from_dict` takes them.

    Raises:
        RequestError: there is no such preset, or a field is unknown or impossible.
    """
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise RequestError(f"preset: got {name!r}; expected {known}{nearest(name, PRESETS)}")
    return ModelArgs.from_dict({**PRESETS[name], **changes})

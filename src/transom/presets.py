"""Known shapes as plain data: every entry is a `ModelArgs.from_dict` argument."""

from __future__ import annotations

from typing import Any

from transom.args import ModelArgs
from transom.errors import RequestError, nearest

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
    """The preset of that name, with fields replaced by `changes`."""
    if name not in PRESETS:
        hint = nearest(name, PRESETS) or f"; known are {', '.join(PRESETS)}"
        raise RequestError(f"preset {name!r}: no such preset{hint}")
    return ModelArgs.from_dict({**PRESETS[name], **changes})

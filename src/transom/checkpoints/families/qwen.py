"""Qwen 2, Qwen 2.5 and Qwen 3, dense and with experts. No torch."""

from __future__ import annotations

from typing import Any

from transom.checkpoints.families import weights
from transom.checkpoints.families.family import (
    Family,
    Fields,
    Keys,
    Option,
    fixed,
    ignored,
    redundant,
    switches,
    value_at,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.options import (
    BIAS,
    COMMON,
    dense_layers,
    experts,
    layer_types,
    read_windows,
    uniform_window,
)
from transom.checkpoints.families.weights import PRE, WeightNames
from transom.config.model_args import ModelArgs

_QWEN: dict[str, Any] = {
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_DENSE = {**_QWEN, "num_key_value_heads": 32, "max_window_layers": 28}


def _read_upper_windows(config: ForeignConfig) -> Fields:
    windowed = config.get("use_sliding_window", False) and config["sliding_window"] is not None
    first = config["max_window_layers"]
    return read_windows(config, lambda index: not windowed or index < first)


def _write_upper_windows(args: ModelArgs) -> Keys:
    windowed = args.sliding_window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": args.sliding_window,
        "max_window_layers": 0 if windowed else args.n_layers,
        "layer_types": layer_types(args),
    }


def _read_sparse_layers(config: ForeignConfig) -> Fields:
    return {
        "moe_args.interleave_moe_layer_step": config.get("decoder_sparse_step", 1),
        "moe_args.dense_layers": config.get("mlp_only_layers", []),
    }


def _write_sparse_layers(args: ModelArgs) -> Keys:
    return {
        "num_experts": value_at(args, "moe_args.num_experts"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(args),
    }


# From `max_window_layers` on, layers have a window.
_UPPER_WINDOWS = Option(_read_upper_windows, _write_upper_windows)

QWEN2 = Family(
    "qwen2",
    "Qwen2",
    weights.LLAMA,
    (
        *COMMON,
        _UPPER_WINDOWS,
        ignored("use_mrope"),
        redundant("attention_bias"),  # the class has no such key: q, k and v always have biases
        fixed(qkv_bias=True, out_bias=False),
    ),
    _DENSE,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3",
    weights.LLAMA,
    (*COMMON, BIAS, _UPPER_WINDOWS, fixed(qk_norm="head")),
    {**_DENSE, "head_dim": 128},
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3Moe",
    WeightNames((*PRE, *weights.DENSE, *weights.SPLIT_EXPERTS), fused_experts=True),
    (
        *COMMON,
        BIAS,
        uniform_window(switch=True),
        # Files have it, but either all layers have the window or none.
        redundant("max_window_layers"),
        experts("moe_intermediate_size"),
        switches(norm_topk_prob="moe_args.normalize"),
        Option(_read_sparse_layers, _write_sparse_layers),
        fixed(qk_norm="head"),
    ),
    {**_QWEN, "num_key_value_heads": 4, "num_experts_per_tok": 8},
)

FAMILIES = (QWEN2, QWEN3, QWEN3_MOE)

"""Llama 1 to 3, and the families that differ from it by a window or a norm: Mistral, Mixtral,
OLMo 2, Phi-3. No torch.
"""

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
    switches,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.options import (
    BIAS,
    COMMON,
    SHAPE,
    activation,
    experts,
    uniform_window,
)
from transom.checkpoints.families.rope import rope_fields, rope_keys, rope_settings
from transom.checkpoints.families.weights import (
    ATTENTION,
    DENSE,
    MLP,
    OUTSIDE,
    POST_NORMS,
    PRE,
    PRE_NORMS,
    WeightNames,
)
from transom.config.model_args import ModelArgs
from transom.names.tables import FEED_FORWARD, LAYER, QKV, pattern

_MISTRAL: dict[str, Any] = {
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
}

LLAMA = Family(
    "llama",
    "Llama",
    weights.LLAMA,
    (*COMMON, BIAS, switches(mlp_bias="ffn_bias")),
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
)
MISTRAL = Family(
    "mistral",
    "Mistral",
    weights.LLAMA,
    (*COMMON, ignored("attention_bias"), uniform_window()),
    _MISTRAL,
)
MIXTRAL = Family(
    "mixtral",
    "Mixtral",
    WeightNames(
        (*PRE, *weights.experts(f"{weights.MODEL_LAYER}.block_sparse_moe", "w1", "w3", "w2")),
        fused_experts=True,
    ),
    (*MISTRAL.options, experts("intermediate_size")),
    {
        **_MISTRAL,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
    },
)
OLMO2 = Family(
    "olmo2",
    "Olmo2",
    WeightNames((*OUTSIDE, *ATTENTION, *POST_NORMS, *DENSE)),
    (*COMMON, BIAS, fixed(norm="rms_wide", norm_placement="post", qk_norm="projection")),
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
)


def _read_phi_rope(config: ForeignConfig) -> Fields:
    # Early Phi-3 files call longrope by its first names.
    return rope_fields(config, rope_settings(config), {"su": "longrope", "yarn": "longrope"})


def _write_phi_rope(args: ModelArgs) -> Keys:
    out = {**rope_keys(args), "partial_rotary_factor": args.rotary_fraction}
    if args.scaling is not None and args.scaling.kind == "longrope":
        out["original_max_position_embeddings"] = args.scaling.original_max_seq_len
    return out


PHI3 = Family(
    "phi3",
    "Phi3",
    WeightNames(
        (
            *OUTSIDE,
            *PRE_NORMS,
            pattern(f"{weights.MODEL_LAYER}.self_attn.qkv_proj.weight", *QKV, transform="rows"),
            pattern(
                f"{weights.MODEL_LAYER}.self_attn.o_proj.weight", f"{LAYER}.attention.wo.weight"
            ),
            pattern(
                f"{MLP}.gate_up_proj.weight",
                f"{FEED_FORWARD}.w_gate.weight",
                f"{FEED_FORWARD}.w_value.weight",
                transform="rows",
            ),
            pattern(f"{MLP}.down_proj.weight", f"{FEED_FORWARD}.w_out.weight"),
        )
    ),
    (
        *SHAPE,
        activation(),
        Option(_read_phi_rope, _write_phi_rope),
        ignored("attention_bias", "mlp_bias", "lm_head_bias"),
        uniform_window(),
    ),
    {
        "sliding_window": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
)

FAMILIES = (LLAMA, MISTRAL, MIXTRAL, OLMO2, PHI3)

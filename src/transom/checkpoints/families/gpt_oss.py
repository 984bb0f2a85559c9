"""gpt-oss. No torch."""

from __future__ import annotations

from transom.checkpoints.families.family import Family, copied, fixed, only, redundant
from transom.checkpoints.families.options import BIAS, COMMON, alternating_windows, experts
from transom.checkpoints.families.weights import EXPERTS, MLP, PRE, WeightNames, gate_and_value
from transom.names.tables import FEED_FORWARD, pattern, with_bias

GPT_OSS = Family(
    "gpt_oss",
    "GptOss",
    WeightNames(
        (
            *PRE,
            *with_bias(f"{MLP}.router", f"{FEED_FORWARD}.router"),
            pattern(
                f"{MLP}.experts.gate_up_proj", *gate_and_value("weight"), transform="alternate"
            ),
            pattern(
                f"{MLP}.experts.gate_up_proj_bias", *gate_and_value("bias"), transform="alternate"
            ),
            pattern(f"{MLP}.experts.down_proj", f"{EXPERTS}.w_out.weight", transform="transpose"),
            pattern(f"{MLP}.experts.down_proj_bias", f"{EXPERTS}.w_out.bias"),
        )
    ),
    (
        *COMMON,
        BIAS,
        only(swiglu_alpha=1.702),
        redundant("experts_per_token", "initial_context_length"),
        alternating_windows(2),
        experts("intermediate_size"),
        copied(swiglu_limit="moe_args.activation_limit"),
        fixed(norm="rms_wide", attn_sinks=True),
        fixed(
            moe_args__router_bias=True,
            moe_args__expert_bias=True,
            moe_args__expert_activation="clamped",
        ),
    ),
    {
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "head_dim": 64,
        "attention_bias": True,
        "rope_theta": 150000.0,
        "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
)

FAMILIES = (GPT_OSS,)

"""DeepSeek-V3. No torch."""

from __future__ import annotations

from transom.checkpoints.families.family import (
    Family,
    Fields,
    Keys,
    Option,
    copied,
    fixed,
    only,
    resolved_experts,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.options import BIAS, COMMON, dense_layers
from transom.checkpoints.families.rope import rope_fields, rope_settings
from transom.checkpoints.families.weights import (
    DENSE,
    MLP,
    MODEL_LAYER,
    OUTSIDE,
    PRE_NORMS,
    SPLIT_EXPERTS,
    WeightNames,
    gated,
)
from transom.config.layer_args import yarn_mscale
from transom.config.model_args import ModelArgs
from transom.names.tables import FEED_FORWARD, LAYER, pattern, with_bias

_ATTENTION, _OURS = f"{MODEL_LAYER}.self_attn", f"{LAYER}.attention"
_NAMES = (
    *OUTSIDE,
    pattern(f"{_ATTENTION}.q_proj.weight", f"{_OURS}.wq.weight"),
    *with_bias(f"{_ATTENTION}.q_a_proj", f"{_OURS}.wq_a"),
    pattern(f"{_ATTENTION}.q_a_layernorm.weight", f"{_OURS}.q_a_norm.weight"),
    pattern(f"{_ATTENTION}.q_b_proj.weight", f"{_OURS}.wq_b.weight"),
    *with_bias(f"{_ATTENTION}.kv_a_proj_with_mqa", f"{_OURS}.wkv_a"),
    pattern(f"{_ATTENTION}.kv_a_layernorm.weight", f"{_OURS}.kv_a_norm.weight"),
    pattern(f"{_ATTENTION}.kv_b_proj.weight", f"{_OURS}.wkv_b.weight"),
    *with_bias(f"{_ATTENTION}.o_proj", f"{_OURS}.wo"),
    *PRE_NORMS,
    *DENSE,
    *SPLIT_EXPERTS,
    pattern(f"{MLP}.gate.e_score_correction_bias", f"{FEED_FORWARD}.router.choice_bias"),
    *gated(f"{MLP}.shared_experts", f"{FEED_FORWARD}.shared_expert"),
)


def _read_latent(config: ForeignConfig) -> Fields:
    """Return the layout of rotary rows, and the scale of scores.

    YaRN's temperature acts once more on all features: `mscale_all_dim` squared (DeepSeek-V3).
    """
    settings = rope_settings(config)
    scaling, weight = (
        rope_fields(config, settings).get("rope_scaling"),
        settings.get("mscale_all_dim"),
    )
    head, scale = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], None
    if weight and scaling is not None and scaling["factor"] > 1:
        scale = float(head**-0.5 * yarn_mscale(scaling["factor"], weight) ** 2)
    layout = "interleaved" if config.get("rope_interleave", True) else "halves"
    return {"rope_layout": layout, "softmax_scale": scale}


def _read_experts(config: ForeignConfig) -> Fields:
    shared = config.get("n_shared_experts", 0)
    return {
        "moe_args.shared_expert": shared > 0,
        "moe_args.shared_hidden_dim": config["moe_intermediate_size"] * shared if shared else None,
        "moe_args.first_dense_layers": config["first_k_dense_replace"],
    }


def _write_experts(args: ModelArgs) -> Keys:
    moe = resolved_experts(args)
    width = moe.hidden_dim or 1
    return {
        "n_shared_experts": (moe.shared_hidden_dim or width) // width if moe.shared_expert else 0,
        "first_k_dense_replace": len(dense_layers(args)),
        "num_nextn_predict_layers": 0,
    }


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3",
    WeightNames(
        _NAMES,
        unread=(
            (
                r"model\.layers\.{n}\..*",
                "the layer that predicts further tokens, which is not read",
            ),
        ),
        fused_experts=True,
    ),
    (
        only(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1),
        *COMMON,
        BIAS,
        # transformers writes head_dim, where it is the width of the rotary part.
        fixed(n_kv_heads=None, head_dim=None),
        Option(_read_latent, lambda args: {"rope_interleave": args.rope_layout == "interleaved"}),
        copied(
            kv_lora_rank="mla_args.kv_lora_rank",
            q_lora_rank="mla_args.q_lora_rank",
            qk_nope_head_dim="mla_args.qk_nope_head_dim",
            qk_rope_head_dim="mla_args.qk_rope_head_dim",
            v_head_dim="mla_args.v_head_dim",
            n_routed_experts="moe_args.num_experts",
            num_experts_per_tok="moe_args.top_k",
            routed_scaling_factor="moe_args.routed_scale",
            moe_intermediate_size="moe_args.hidden_dim",
            norm_topk_prob="moe_args.normalize",
            n_group="moe_args.num_groups",
            topk_group="moe_args.top_groups",
        ),
        Option(_read_experts, _write_experts),
        fixed(moe_args__routing="biased_sigmoid", moe_args__balance="bias"),
    ),
    {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
    },
)

FAMILIES = (DEEPSEEK_V3,)

"""Gemma 2 and Gemma 3, its text alone. No torch."""

from __future__ import annotations

from typing import Any

from transom.checkpoints.families.family import (
    Family,
    Fields,
    Keys,
    Option,
    copied,
    fixed,
    only,
    redundant,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.options import BIAS, SHAPE, activation, alternating_windows
from transom.checkpoints.families.rope import ROPE, check_whole_rotary, rope_fields, rope_keys
from transom.checkpoints.families.weights import (
    ATTENTION,
    DENSE,
    MODEL_LAYER,
    OUTSIDE,
    POST_NORMS,
    WeightNames,
    under,
)
from transom.config.model_args import ModelArgs
from transom.names.tables import LAYER, pattern

_NAMES = WeightNames(
    (
        *OUTSIDE,
        *ATTENTION,
        pattern(f"{MODEL_LAYER}.input_layernorm.weight", f"{LAYER}.attention_norm.weight"),
        pattern(f"{MODEL_LAYER}.pre_feedforward_layernorm.weight", f"{LAYER}.ffn_norm.weight"),
        *POST_NORMS,
        *DENSE,
    )
)


def _read_scales(config: ForeignConfig) -> Fields:
    return {
        "embedding_scale": config["hidden_size"] ** 0.5,
        "softmax_scale": config["query_pre_attn_scalar"] ** -0.5,
    }


def _write_scales(args: ModelArgs) -> Keys:
    scale = args.head_size**-0.5 if args.softmax_scale is None else args.softmax_scale
    return {"query_pre_attn_scalar": round(scale**-2)}


_COMMON = (
    *SHAPE,
    redundant("hidden_act"),  # in older files, beside hidden_activation, which counts
    activation("hidden_activation"),
    only(use_bidirectional_attention=False),
    BIAS,
    fixed(norm="rms_plus_one", norm_placement="both"),
    Option(_read_scales, _write_scales),
    copied(final_logit_softcapping="logit_softcap"),
)
_GEMMA2: dict[str, Any] = {
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
# Parts of multimodal files leave out whatever their class has, also the shape.
_GEMMA3: dict[str, Any] = {
    **_GEMMA2,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}

GEMMA2 = Family(
    "gemma2",
    "Gemma2",
    _NAMES,
    (*_COMMON, ROPE, copied(attn_logit_softcapping="attn_softcap"), alternating_windows(2)),
    _GEMMA2,
)


def _read_two_ropes(config: ForeignConfig) -> Fields:
    """Return the rotary settings of full layers, and the base of sliding ones."""
    tables = config.get("rope_parameters", {})
    known = set(tables) <= {"full_attention", "sliding_attention"}
    config.check(
        known,
        "rope_parameters",
        "one mapping for full_attention and one for sliding_attention",
    )
    full = {**(tables.get("full_attention") or {}), **config.get("rope_scaling", {})}
    full.setdefault("rope_theta", config["rope_theta"])
    local = {
        "rope_theta": config["rope_local_base_freq"],
        **(tables.get("sliding_attention") or {}),
    }
    plain = local.get("rope_type", "default") == "default"
    config.check(plain, "rope_parameters", "rope_type 'default' in sliding_attention")
    out = check_whole_rotary(config, rope_fields(config, full))
    windows = _WINDOWS.read(config)
    return {
        **out,
        **windows,
        **({"rope_local_theta": rope_fields(config, local)["rope_theta"]} if windows else {}),
    }


def _write_two_ropes(args: ModelArgs) -> Keys:
    out = rope_keys(args)
    theta = args.rope_local_theta or args.rope_theta
    local = {"rope_type": "default", "rope_theta": theta}
    both = {"full_attention": out["rope_parameters"], "sliding_attention": local}
    return {**out, "rope_parameters": both, "rope_local_base_freq": theta, **_WINDOWS.write(args)}


_WINDOWS = alternating_windows(6, "sliding_window_pattern", "_sliding_window_pattern")

GEMMA3_TEXT = Family(
    "gemma3_text",
    "Gemma3",
    _NAMES,
    (
        *_COMMON,
        only(attn_logit_softcapping=None),
        Option(_read_two_ropes, _write_two_ropes),
        fixed(qk_norm="head"),
    ),
    _GEMMA3,
)


def _read_text(config: ForeignConfig) -> Fields:
    text = config.part("text_config", _GEMMA3)
    return {**GEMMA3_TEXT.read(text), "tie_embeddings": config.get("tie_word_embeddings", True)}


GEMMA3 = Family(
    "gemma3",
    "Gemma3",
    WeightNames(
        under("language_model.", _NAMES.patterns),
        (
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("lm_head.", "language_model.lm_head."),
        ),
        (
            (
                r"(vision_tower|multi_modal_projector)\..*",
                "the image encoder, which is not read: text only",
            ),
        ),
    ),
    (Option(_read_text), redundant("vision_config", "image_token_index", "image_token_id")),
    writable=False,
)

FAMILIES = (GEMMA2, GEMMA3_TEXT, GEMMA3)

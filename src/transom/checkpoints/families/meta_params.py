"""Meta's `params.json` to `ModelArgs` and back, and the names in its weights: Llama 1, 2, 3 and 4.
No torch.

Sources: models/llama3/args.py, models/llama4/args.py and the model files beside them in
meta-llama/llama-models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transom.base.errors import notice
from transom.checkpoints.families.family import (
    Family,
    Fields,
    Keys,
    Option,
    copied,
    fixed,
    optional,
    redundant,
    refused,
    resolved_experts,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.llama4 import vision_names
from transom.checkpoints.families.weights import WeightNames
from transom.config.layer_args import MoeArgs
from transom.config.model_args import ModelArgs
from transom.names.tables import DENSE_NAMES, LAYER, LLAMA4_EXPERTS, pattern

# Our names, as the reference codes of Meta and Mistral have them too.
SHARED_NAMES = (
    *(pattern(name, name) for name in ("tok_embeddings.weight", "norm.weight", "output.weight")),
    *(
        pattern(name, name)
        for leaf in (
            "attention.wq",
            "attention.wk",
            "attention.wv",
            "attention.wo",
            "attention_norm",
            "ffn_norm",
        )
        for name in (f"{LAYER}.{leaf}.weight",)
    ),
    *DENSE_NAMES,
)
META_NAMES = WeightNames(
    (
        *SHARED_NAMES,
        *LLAMA4_EXPERTS,
        *vision_names(meta=True),
    ),
    unread=(
        (r"rope\.freqs|freqs_cis", "tables of rotary frequencies, which are computed here"),
        (r".*\._extra_state", "extra states of a library, which are no weights"),
        (r".*\.(global_gate_stats_3E|expert_activation_DE)", "statistics of training"),
    ),
    reference_code=True,
)

# Only Llama 4 has these.
_LLAMA4 = ("moe_args", "ffn_exp", "nope_layer_interval", "attention_chunk_size", "use_qk_norm")
_SCALING = ("rope_scaling_factor", "rope_high_freq_factor")
_IMAGE_TOKEN = 200092  # <|patch|> of the Llama 4 tokenizer, which params.json does not name


def _defaults(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Meta's code has where a file states nothing, with the length of the model card.

    The keys of a file tell which code it is for.
    """
    llama4, scaled = any(key in params for key in _LLAMA4), params.get("use_scaled_rope")
    theta, factors = (500000.0, (16.0, 1.0)) if llama4 else (10000.0, (8.0, 4.0))
    length = 8192 if params.get("rope_theta", theta) != 10000.0 else 4096
    length = 262144 if llama4 else 131072 if scaled else length
    scaling = dict(zip(_SCALING, factors, strict=True))
    return {"rope_theta": theta, "max_seq_len": length, **scaling}


def args_from_meta(params: Mapping[str, Any], where: str, vocab_size: int) -> ModelArgs:
    """Return the model that a params.json describes, and print the defaults that its code has for
    it.

    Args:
        params: the parsed file.
        where: the file, for messages.
        vocab_size: tokens in the vocabulary, for a file that has none or -1.

    Raises:
        RequestError: a key is missing, a value is not supported, or the weights are quantized.
    """
    stated = {key: value for key, value in params.items() if value not in (None, -1)}
    defaults = {**META_PARAMS.defaults, **_defaults(stated), "vocab_size": vocab_size}
    config = ForeignConfig(stated, where, defaults)
    config.refuse_quantized("quantization_args", "scheme")
    args = META_PARAMS.args_from(config)
    config.print_notes()
    return args


def needs_vocabulary(params: Mapping[str, Any]) -> bool:
    """Return whether only the weights show how many tokens there are."""
    return params.get("vocab_size") in (None, -1)


def _read_rope(config: ForeignConfig) -> Fields:
    interval = config.get("nope_layer_interval")
    tuned = interval is not None and config["n_layers"] >= interval
    length = config.get("max_position_embeddings")
    out = {
        "max_seq_len": config.assumed("max_seq_len") if length is None else length,
        "nope_layer_interval": interval,
        "attn_temperature_tuning": tuned and config.get("attn_temperature_tuning", False),
        "use_scaled_rope": config.get("use_scaled_rope", False),
    }
    stated = {key: config[key] for key in _SCALING}
    if out["use_scaled_rope"]:  # otherwise the code does not read them
        small = ", as in Meta's code; Hugging Face's copies of Llama 3.2 1B and 3B have 32"
        config.assumed("rope_scaling_factor", small if stated[_SCALING[0]] == 8 else "")
        out |= stated
    return out


def _write_rope(args: ModelArgs) -> Keys:
    scaling, letters = args.scaling, args.pattern
    # Meta's code takes max_seq_len from its caller and fails on a second one; it ignores this name.
    out: Keys = {"max_position_embeddings": args.max_seq_len}
    if not letters.isupper():
        first = next(index for index, letter in enumerate(letters) if letter.islower())
        tuned = {"attn_temperature_tuning": True} if args.attn_temperature_tuning else {}
        out |= {"nope_layer_interval": first + 1, **tuned}
    if scaling is not None:
        factors = (scaling.factor, scaling.high_freq_factor)
        out |= {"use_scaled_rope": True, **dict(zip(_SCALING, factors, strict=True))}
        if args.moe_args is None and factors != (8.0, 4.0):
            stated = f"params.json: rope_scaling_factor = {factors[0]:g}"
            notice(f"{stated}, but Meta's Llama 3 code computes with 8")
    return out


def _write_widths(args: ModelArgs) -> Keys:
    """Return feed-forward widths as the rule of params.json makes them, with a multiple_of that
    makes any width.
    """
    out: Keys = {"n_kv_heads": args.kv_heads, "multiple_of": args.multiple_of}
    moe, dense = args.moe_args, args.dense_hidden_dim
    width = dense if moe is None else resolved_experts(args).hidden_dim or dense
    if args.hidden_dim is not None or (moe is not None and moe.hidden_dim is not None):
        multiple = math.gcd(dense, width)
        # The middle of the last step, so that no rounding leads into another one.
        factor = (dense - multiple / 2) / int(8 * args.dim / 3)
        out |= {"multiple_of": multiple, "ffn_dim_multiplier": factor}
        expansion = (width - multiple / 2) / factor * 1.5 / args.dim
        moe = None if moe is None else replace(moe, ffn_exp=expansion, auto_scale_F=False)
    if moe is not None:
        step = next(layer.index + 1 for layer in args.layers if layer.moe is not None)
        stated = {key: getattr(moe, key) for key in _MOE_DEFAULTS}
        stated |= {"num_experts": moe.num_experts, "interleave_moe_layer_step": step}
        out |= {"ffn_exp": moe.ffn_exp, "moe_args": stated}
    return out


def _read_experts(config: ForeignConfig) -> Fields:
    expansion = config.get("ffn_exp", MoeArgs().ffn_exp)
    if config.get("moe_args") is None:
        return {}
    moe = config.part("moe_args", _MOE_DEFAULTS)
    return {
        **{f"moe_args.{key}": moe[key] for key in ("num_experts", *_MOE_DEFAULTS)},
        "moe_args.ffn_exp": expansion,
        "moe_args.routing": "sigmoid",
        "moe_args.shared_expert": True,
    }


_MOE_DEFAULTS = {
    "top_k": 1,
    **{
        key: getattr(MoeArgs(), key)
        for key in ("capacity_factor", "auto_scale_F", "interleave_moe_layer_step")
    },
}
_VISION = copied(
    **{
        key: f"vision_args.{key}"
        for key in ("dim", "n_layers", "n_heads", "output_dim", "pixel_shuffle_ratio")
    }
)
_SIDES = ("image_size", "patch_size")


def _read_vision(config: ForeignConfig) -> Fields:
    if config.get("vision_args") is None:
        return {}
    vision = config.part("vision_args", {})
    named = _IMAGE_TOKEN if config["vocab_size"] > _IMAGE_TOKEN else None
    out = {
        **_VISION.read(vision),
        "vision_args.hidden_dim": int(vision["mlp_ratio"] * vision["dim"]),
        "vision_args.adapter_dim": vision["output_dim"],
        "vision_args.image_token": vision.get("image_token", named),
    }
    for key in _SIDES:
        size = vision[key]
        square = isinstance(size, Mapping) and size.get("height") == size.get("width")
        vision.check(square, key, "the height and width of a square")
        out[f"vision_args.{key}"] = int(size["height"])
    return out


def _write_vision(args: ModelArgs) -> Keys:
    vision = args.vision_args
    if vision is None:
        return {}
    sides = {key: dict.fromkeys(("height", "width"), getattr(vision, key)) for key in _SIDES}
    token = vision.image_token
    named = {} if token in (None, _IMAGE_TOKEN) else {"image_token": token}
    ratio = {"mlp_ratio": vision.hidden_dim / vision.dim}
    return {"vision_args": {**_VISION.write(args), **ratio, **sides, **named}}


_CROSS_ATTENTION = "images by cross-attention (Llama 3.2 vision) are not supported"
META_PARAMS = Family(
    "params_meta",
    "",
    META_NAMES,
    (
        refused(
            vision_chunk_size=_CROSS_ATTENTION,
            vision_num_cross_attention_layers=_CROSS_ATTENTION,
            vision_model=_CROSS_ATTENTION,
            lora_args="an adapter inside the checkpoint is not supported",
        ),
        # Meta's code computes the head width from dim.
        redundant("max_batch_size", "head_dim", "image_token"),
        fixed(rope_layout="interleaved"),
        copied(
            **{
                key: key
                for key in ("dim", "n_layers", "n_heads", "norm_eps", "rope_theta", "vocab_size")
            }
        ),
        optional("n_kv_heads", "multiple_of", "ffn_dim_multiplier", "attention_chunk_size"),
        optional("use_qk_norm", "floor_scale", "attn_scale"),
        Option(_read_rope, _write_rope),
        Option(_read_experts, _write_widths),
        Option(_read_vision, _write_vision),
    ),
    {"norm_eps": ModelArgs().norm_eps, **_defaults({})},
)

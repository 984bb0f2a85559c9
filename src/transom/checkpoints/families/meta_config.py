"""Meta's `params.json` to `ModelArgs` and back: Llama 1, 2, 3 and 4. No torch.

Sources: models/llama3/args.py, models/llama4/args.py and the model files beside them in
meta-llama/llama-models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from transom.base.errors import RequestError, notice, require
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.hf_export import meaning
from transom.config.model_args import ModelArgs, MoeArgs, VisionArgs

# Only Llama 4 has these.
_LLAMA4 = ("moe_args", "ffn_exp", "nope_layer_interval", "attention_chunk_size", "use_qk_norm")
_SCALED = {
    3: (8.0, 4.0),
    4: (16.0, 1.0),
}  # factor and high_freq_factor where a file says no more than "scaled"
_IMAGE_TOKEN = 200092  # <|patch|> of the Llama 4 tokenizer, which params.json does not name
_CUT_OFF = {
    "vision_chunk_size": "images by cross-attention (Llama 3.2 vision)",
    "vision_num_cross_attention_layers": "images by cross-attention (Llama 3.2 vision)",
    "vision_model": "images by cross-attention (Llama 3.2 vision)",
    "lora_args": "an adapter inside the checkpoint",
}


def args_from_meta(params: Mapping[str, Any], where: str, vocab_size: int) -> ModelArgs:
    """The model a params.json describes; `vocab_size` counts where the file has none or -1."""
    config = ForeignConfig(params, where, {})
    quantized = config.get("quantization_args")
    if quantized:
        kind = quantized.get("scheme", quantized) if isinstance(quantized, Mapping) else quantized
        raise RequestError(
            f"{where}: quantization_args: got {kind!r}; expected weights that are not quantized"
        )
    for key, what in _CUT_OFF.items():
        value = config.get(key)
        unset = value is None or value == -1 or value == 0
        require(unset, f"{where}: {key}", value, f"{what}: not supported; expected absent")
    for key in ("dim", "n_layers", "n_heads"):
        require(
            config.get(key) is not None, f"{where}: {key}", None, "expected a whole params.json"
        )
    llama = 4 if any(config.get(key) is not None for key in _LLAMA4) else 3
    try:
        fields = _fields(config, llama)
    except RequestError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise RequestError(f"{where}: not a params.json of Meta's ({error})") from None
    size = config.get("vocab_size", -1)
    fields["vocab_size"] = size if size != -1 else vocab_size
    _say_defaults(config, fields, llama)
    try:
        args = ModelArgs.from_dict(fields)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    for key in (
        "max_batch_size",
        "head_dim",
        "image_token",
    ):  # Meta's code computes the head width from dim
        config.get(key)
    config.say_unread()
    return args


def needs_vocabulary(params: Mapping[str, Any]) -> bool:
    """Whether only the weights say how many tokens there are."""
    return params.get("vocab_size") in (None, -1)


def _fields(config: ForeignConfig, llama: int) -> dict[str, Any]:
    factor, high = _SCALED[llama]
    interval = config.get("nope_layer_interval")
    vision = config.get("vision_args")
    scaled = config.get("use_scaled_rope", False)
    out: dict[str, Any] = {
        "dim": config["dim"],
        "n_layers": config["n_layers"],
        "n_heads": config["n_heads"],
        "n_kv_heads": config.get("n_kv_heads"),
        "multiple_of": config.get("multiple_of", 256),
        "ffn_dim_multiplier": config.get("ffn_dim_multiplier"),
        "norm_eps": config.get("norm_eps", 1e-5),
        # Llama 1 and 2 do not say: every later file does.
        "rope_theta": config.get("rope_theta", 10000.0 if llama == 3 else 500000.0),
        "rope_layout": "interleaved",
        "use_scaled_rope": scaled,
        "rope_scaling_factor": config.get("rope_scaling_factor", factor),
        "rope_high_freq_factor": config.get("rope_high_freq_factor", high),
        "attention_chunk_size": config.get("attention_chunk_size"),
        "nope_layer_interval": interval,
        "use_qk_norm": config.get("use_qk_norm", False),
        "attn_temperature_tuning": bool(config.get("attn_temperature_tuning", False))
        and _has_nope(config),
        "floor_scale": config.get("floor_scale", 8192.0),
        "attn_scale": config.get("attn_scale", 0.1),
        "moe_args": _moe(config),
        "vision_args": None
        if vision is None
        else _vision(vision, config.get("vocab_size", -1), config.where),
    }
    if not scaled:
        out["rope_scaling_factor"], out["rope_high_freq_factor"] = 8.0, 4.0
    out["max_seq_len"] = (
        config.get("max_position_embeddings") or config.get("max_seq_len") or _length(out, llama)
    )
    return out


def _has_nope(config: ForeignConfig) -> bool:
    interval = config.get("nope_layer_interval")
    return interval is not None and config["n_layers"] >= interval


def _length(fields: Mapping[str, Any], llama: int) -> int:
    """What Meta's model cards state for such a model, since the files do not."""
    if llama == 4:
        return 262144
    if fields["use_scaled_rope"]:
        return 131072
    return 8192 if fields["rope_theta"] > 10000.0 else 4096


def _say_defaults(config: ForeignConfig, fields: Mapping[str, Any], llama: int) -> None:
    said = []
    if config.get("max_position_embeddings") is None and config.get("max_seq_len") is None:
        said.append(f"max_seq_len is taken as {fields['max_seq_len']}")
    if fields["use_scaled_rope"] and config.get("rope_scaling_factor") is None:
        small = "; Hugging Face's copies of Llama 3.2 1B and 3B have 32" if llama == 3 else ""
        said.append(
            f"rope_scaling_factor as {fields['rope_scaling_factor']:g}, as in Meta's code{small}"
        )
    if said:
        notice(f"{config.where}: does not say: {', '.join(said)}")


def _moe(config: ForeignConfig) -> dict[str, Any] | None:
    moe, exp = config.get("moe_args"), config.get("ffn_exp")
    if moe is None:
        return None
    known = {"num_experts", "capacity_factor", "auto_scale_F", "top_k", "interleave_moe_layer_step"}
    unknown = sorted(set(moe) - known)
    if unknown:
        notice(f"{config.where}: keys not read: {', '.join(f'moe_args.{key}' for key in unknown)}")
    return {
        "num_experts": moe["num_experts"],
        "top_k": moe.get("top_k", 1),
        "capacity_factor": moe.get("capacity_factor", 1.0),
        "auto_scale_F": moe.get("auto_scale_F", True),
        "interleave_moe_layer_step": moe.get("interleave_moe_layer_step", 1),
        "ffn_exp": 4.0 if exp is None else exp,
        "routing": "sigmoid",
        "shared_expert": True,
    }


def _vision(vision: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    def side(key: str) -> int:
        size = vision[key]
        fits = isinstance(size, Mapping) and size.get("height") == size.get("width")
        require(fits, f"{where}: vision_args.{key}", size, "expected a square of height and width")
        return int(size["height"])

    token = vision.get("image_token")
    return {
        "image_size": side("image_size"),
        "patch_size": side("patch_size"),
        "dim": vision["dim"],
        "n_layers": vision["n_layers"],
        "n_heads": vision["n_heads"],
        "hidden_dim": int(vision["mlp_ratio"] * vision["dim"]),
        "adapter_dim": vision["output_dim"],
        "output_dim": vision["output_dim"],
        "pixel_shuffle_ratio": vision["pixel_shuffle_ratio"],
        "image_token": _IMAGE_TOKEN if token is None and vocab_size > _IMAGE_TOKEN else token,
    }


def args_to_meta(args: ModelArgs) -> dict[str, Any]:
    """The params.json that reads back as the same model with interleaved pairs; none is a
    `RequestError`.
    """
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.kv_heads,
        "vocab_size": args.vocab_size,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        # Meta's code takes max_seq_len from its caller and fails on a second one; it passes this
        # name over.
        "max_position_embeddings": args.max_seq_len,
    }
    scaling = args.scaling
    if scaling is not None:
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": scaling.factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
        }
    params |= _widths(args)
    letters = args.pattern
    nope = letters.find(next((letter for letter in letters if letter.islower()), "?")) + 1
    if nope:
        params["nope_layer_interval"] = nope
    if args.attention_chunk_size is not None:
        params["attention_chunk_size"] = args.attention_chunk_size
    if args.use_qk_norm:
        params["use_qk_norm"] = True
    if args.attn_temperature_tuning:
        params |= {
            "attn_temperature_tuning": True,
            "floor_scale": args.floor_scale,
            "attn_scale": args.attn_scale,
        }
    if args.vision_args is not None:
        params["vision_args"] = _vision_params(args.vision_args)
    same = False
    with contextlib.suppress(RequestError):
        same = meaning(args_from_meta(params, "params.json", args.vocab_size)) == meaning(args)
    if not same:
        raise RequestError(
            "format meta accepts the shapes of Llama 2, 3 and 4; save as hf or native"
        )
    if (
        scaling is not None
        and args.moe_args is None
        and (scaling.factor, scaling.high_freq_factor) != _SCALED[3]
    ):
        notice(
            f"params.json: rope_scaling_factor {scaling.factor:g} is written, Meta's Llama 3 "
            f"code computes with 8"
        )
    return params


def _widths(args: ModelArgs) -> dict[str, Any]:
    """Feed-forward widths, which params.json can only say by its rule; a multiple_of that makes any
    width exact.
    """
    moe = next((layer.moe for layer in args.layers if layer.moe is not None), None)
    if args.hidden_dim is None and (
        moe is None or args.moe_args is None or args.moe_args.hidden_dim is None
    ):
        out: dict[str, Any] = {"multiple_of": args.multiple_of}
        if args.ffn_dim_multiplier is not None:
            out["ffn_dim_multiplier"] = args.ffn_dim_multiplier
        return out | (
            {} if args.moe_args is None else _moe_params(args, args.moe_args, args.moe_args.ffn_exp)
        )
    dense, base = args.dense_hidden_dim, int(8 * args.dim / 3)
    sparse = moe.hidden_dim or dense if moe is not None else dense
    multiple = math.gcd(dense, sparse)
    # In the middle of the last step, so that no rounding leads into another one.
    multiplier = (dense - multiple / 2) / base
    out = {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
    if moe is not None and args.moe_args is not None:
        exp = (sparse - multiple / 2) / multiplier * 1.5 / args.dim
        out |= _moe_params(args, args.moe_args, exp, scaled=False)
    return out


def _moe_params(
    args: ModelArgs, moe: MoeArgs, ffn_exp: float, scaled: bool | None = None
) -> dict[str, Any]:
    sparse = [layer.index for layer in args.layers if layer.moe is not None]
    return {
        "ffn_exp": ffn_exp,
        "moe_args": {
            "num_experts": moe.num_experts,
            "top_k": moe.top_k,
            "capacity_factor": moe.capacity_factor,
            "auto_scale_F": moe.auto_scale_F if scaled is None else scaled,
            "interleave_moe_layer_step": sparse[0] + 1 if sparse else args.n_layers + 1,
        },
    }


def _vision_params(vision: VisionArgs) -> dict[str, Any]:
    out: dict[str, Any] = {
        key: {"height": size, "width": size}
        for key, size in (("image_size", vision.image_size), ("patch_size", vision.patch_size))
    }
    out |= {
        "dim": vision.dim,
        "n_layers": vision.n_layers,
        "n_heads": vision.n_heads,
        "mlp_ratio": vision.hidden_dim / vision.dim,
        "output_dim": vision.output_dim,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
    }
    if vision.image_token not in (None, _IMAGE_TOKEN):
        out["image_token"] = vision.image_token
    return out

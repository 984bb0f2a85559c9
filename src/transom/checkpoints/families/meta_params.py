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

from transom.base.errors import notice, require
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.same_model import reads_back
from transom.checkpoints.families.weights import WeightNames
from transom.config.layer_args import MoeArgs
from transom.config.model_args import ModelArgs
from transom.config.vision_args import VisionArgs
from transom.names.tables import (
    DENSE_NAMES,
    LAYER,
    LLAMA4_EXPERTS,
    VISION_LAYER,
    pattern,
    with_bias,
)

_ENCODER = "vision_embeddings.vision_encoder"
_BLOCK = f"{_ENCODER}.transformer.resblocks.{{v}}"
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
        pattern(f"{_ENCODER}.conv1._linear.weight", "vision.patch_embedding.weight"),
        pattern(f"{_ENCODER}.class_embedding", "vision.class_embedding"),
        pattern(f"{_ENCODER}.positional_embedding_vlm", "vision.position_embedding"),
        *with_bias(f"{_ENCODER}.ln_pre", "vision.norm_pre"),
        *with_bias(f"{_ENCODER}.ln_post", "vision.norm_post"),
        *(
            row
            for theirs, ours in (
                *((f"attn.{leaf}", f"attention.{leaf}") for leaf in ("wq", "wk", "wv", "wo")),
                ("ln_1", "attention_norm"),
                ("ln_2", "ffn_norm"),
                ("mlp.c_fc", "feed_forward.w_value"),
                ("mlp.c_proj", "feed_forward.w_out"),
            )
            for row in with_bias(f"{_BLOCK}.{theirs}", f"{VISION_LAYER}.{ours}")
        ),
        pattern("vision_embeddings.vision_adapter.mlp.c_fc.weight", "vision.adapter.fc1.weight"),
        pattern("vision_embeddings.vision_adapter.mlp.c_proj.weight", "vision.adapter.fc2.weight"),
        pattern("vision_projection.weight", "vision.projection.weight"),
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
# factor and high_freq_factor where a file states use_scaled_rope and no more.
_SCALED = {3: (8.0, 4.0), 4: (16.0, 1.0)}
_IMAGE_TOKEN = 200092  # <|patch|> of the Llama 4 tokenizer, which params.json does not name
_CROSS_ATTENTION = "images by cross-attention (Llama 3.2 vision) are not supported"
_UNSUPPORTED = {
    "vision_chunk_size": _CROSS_ATTENTION,
    "vision_num_cross_attention_layers": _CROSS_ATTENTION,
    "vision_model": _CROSS_ATTENTION,
    "lora_args": "an adapter inside the checkpoint is not supported",
}
# Keys that are fields of ours, with the same defaults.
_SAME = (
    *(
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
        "rope_theta",
    ),
    *("use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "attention_chunk_size"),
    *("nope_layer_interval", "use_qk_norm", "attn_temperature_tuning", "floor_scale", "attn_scale"),
)
_SAME_MOE = ("num_experts", "top_k", "capacity_factor", "auto_scale_F", "interleave_moe_layer_step")
_SAME_VISION = ("dim", "n_layers", "n_heads", "output_dim", "pixel_shuffle_ratio")


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
    config = ForeignConfig(params, where, {})
    config.refuse_quantized("quantization_args", "scheme")
    for key, reason in _UNSUPPORTED.items():
        config.check(config.get(key) in (None, 0, -1), key, f"expected none, as {reason}")
    for key in ("dim", "n_layers", "n_heads"):
        config.check(config.get(key) is not None, key, "expected a value")
    args = config.model(lambda _: _fields(config, vocab_size), "params.json of Meta's")
    # Meta's code computes the head width from dim.
    for key in ("max_batch_size", "head_dim", "image_token"):
        config.get(key)
    config.print_notes()
    return args


def needs_vocabulary(params: Mapping[str, Any]) -> bool:
    """Return whether only the weights show how many tokens there are."""
    return params.get("vocab_size") in (None, -1)


def _fields(config: ForeignConfig, vocab_size: int) -> dict[str, Any]:
    llama = 4 if any(config.get(key) is not None for key in _LLAMA4) else 3
    out = {key: value for key in _SAME if (value := config.get(key)) is not None}
    out.setdefault("rope_theta", 10000.0 if llama == 3 else 500000.0)
    factor, high = _SCALED[llama]
    assumed = []
    if out.get("use_scaled_rope"):
        if "rope_scaling_factor" not in out:
            small = "; Hugging Face's copies of Llama 3.2 1B and 3B have 32" if llama == 3 else ""
            assumed.append(f"rope_scaling_factor = {factor:g}, as in Meta's code{small}")
        out = {"rope_scaling_factor": factor, "rope_high_freq_factor": high, **out}
    else:  # which the code then does not read
        out = {
            key: value
            for key, value in out.items()
            if key not in ("rope_scaling_factor", "rope_high_freq_factor")
        }
    interval = out.get("nope_layer_interval")
    has_nope = interval is not None and out["n_layers"] >= interval
    out["attn_temperature_tuning"] = bool(out.get("attn_temperature_tuning")) and has_nope
    length = config.get("max_position_embeddings") or config.get("max_seq_len")
    if length is None:
        length = _length(out, llama)
        assumed.insert(0, f"max_seq_len = {length}")
    if assumed:
        notice(f"{config.where}: values that the file does not state: {', '.join(assumed)}")
    stated, vision = config.get("vocab_size", -1), config.get("vision_args")
    return {
        **out,
        "rope_layout": "interleaved",
        "max_seq_len": length,
        "vocab_size": vocab_size if stated == -1 else stated,
        "moe_args": _moe(config),
        "vision_args": None if vision is None else _vision(vision, stated, config.where),
    }


def _length(fields: Mapping[str, Any], llama: int) -> int:
    """Return what Meta's model cards state for such a model, since the files do not."""
    if llama == 4:
        return 262144
    if fields.get("use_scaled_rope"):
        return 131072
    return 8192 if fields["rope_theta"] > 10000.0 else 4096


def _moe(config: ForeignConfig) -> dict[str, Any] | None:
    moe, expansion = config.get("moe_args"), config.get("ffn_exp")
    if moe is None:
        return None
    unknown = sorted(set(moe) - set(_SAME_MOE))
    if unknown:
        notice(f"{config.where}: keys not read: {', '.join(f'moe_args.{key}' for key in unknown)}")
    return {
        "num_experts": moe["num_experts"],
        "top_k": 1,
        "routing": "sigmoid",
        "shared_expert": True,
        **{key: moe[key] for key in _SAME_MOE if key in moe},
        **({} if expansion is None else {"ffn_exp": expansion}),
    }


def _vision(vision: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    token = vision.get("image_token")
    out = {
        **{key: vision[key] for key in _SAME_VISION},
        "hidden_dim": int(vision["mlp_ratio"] * vision["dim"]),
        "adapter_dim": vision["output_dim"],
        "image_token": _IMAGE_TOKEN if token is None and vocab_size > _IMAGE_TOKEN else token,
    }
    for key in ("image_size", "patch_size"):
        size = vision[key]
        square = isinstance(size, Mapping) and size.get("height") == size.get("width")
        require(
            square, f"{where}: vision_args.{key}", size, "expected the height and width of a square"
        )
        out[key] = int(size["height"])
    return out


def args_to_meta(args: ModelArgs) -> dict[str, Any]:
    """Return the params.json that reads back as the same model, whose rotary pairs are interleaved.

    Raises:
        RequestError: the format cannot express the model.
    """
    plain, letters = ModelArgs(), args.pattern
    nope = next((index + 1 for index, letter in enumerate(letters) if letter.islower()), None)
    scaled = {}
    if args.scaling is not None:
        scaled = {
            "use_scaled_rope": True,
            "rope_scaling_factor": args.scaling.factor,
            "rope_high_freq_factor": args.scaling.high_freq_factor,
        }
    required = ("dim", "n_layers", "n_heads", "norm_eps", "rope_theta")
    params: dict[str, Any] = {
        key: getattr(args, key)
        for key in _SAME
        if key in required or getattr(args, key) != getattr(plain, key)
    }
    params |= {
        "n_kv_heads": args.kv_heads,
        "vocab_size": args.vocab_size,
        # Meta's code takes max_seq_len from its caller and fails on a second one; it ignores this
        # name.
        "max_position_embeddings": args.max_seq_len,
        **scaled,
        **_widths(args),
    }
    if nope is not None:
        params["nope_layer_interval"] = nope
    if args.vision_args is not None:
        params["vision_args"] = _vision_params(args.vision_args)
    same = reads_back(args, lambda: args_from_meta(params, "params.json", args.vocab_size))
    require(
        same, "format", "meta", "expected hf or native: meta has the shapes of Llama 2, 3 and 4"
    )
    scaling = args.scaling
    if (
        scaling is not None
        and args.moe_args is None
        and (scaling.factor, scaling.high_freq_factor) != _SCALED[3]
    ):
        notice(
            f"params.json: rope_scaling_factor = {scaling.factor:g}, but Meta's Llama "
            f"3 code computes with 8"
        )
    return params


def _widths(args: ModelArgs) -> dict[str, Any]:
    """Return feed-forward widths as the rule of params.json makes them, with a multiple_of that
    makes any width.
    """
    moe = next((layer.moe for layer in args.layers if layer.moe is not None), None)
    if moe is None or args.moe_args is None:
        if args.hidden_dim is None:
            return {"multiple_of": args.multiple_of}
        return _exact_widths(args.dense_hidden_dim, args.dense_hidden_dim, args.dim)
    if args.hidden_dim is None and args.moe_args.hidden_dim is None:
        return {"multiple_of": args.multiple_of, **_moe_params(args, args.moe_args)}
    dense, width = args.dense_hidden_dim, moe.hidden_dim or args.dense_hidden_dim
    out = _exact_widths(dense, width, args.dim)
    expansion = (width - out["multiple_of"] / 2) / out["ffn_dim_multiplier"] * 1.5 / args.dim
    return out | _moe_params(args, replace(args.moe_args, ffn_exp=expansion, auto_scale_F=False))


def _exact_widths(dense: int, sparse: int, dim: int) -> dict[str, Any]:
    multiple = math.gcd(dense, sparse)
    # The middle of the last step, so that no rounding leads into another one.
    return {
        "multiple_of": multiple,
        "ffn_dim_multiplier": (dense - multiple / 2) / int(8 * dim / 3),
    }


def _moe_params(args: ModelArgs, moe: MoeArgs) -> dict[str, Any]:
    sparse = [layer.index for layer in args.layers if layer.moe is not None]
    step = sparse[0] + 1 if sparse else args.n_layers + 1
    known = {key: getattr(moe, key) for key in _SAME_MOE}
    return {"ffn_exp": moe.ffn_exp, "moe_args": {**known, "interleave_moe_layer_step": step}}


def _vision_params(vision: VisionArgs) -> dict[str, Any]:
    out = {
        **{key: getattr(vision, key) for key in _SAME_VISION},
        "mlp_ratio": vision.hidden_dim / vision.dim,
        "image_size": {"height": vision.image_size, "width": vision.image_size},
        "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
    }
    if vision.image_token not in (None, _IMAGE_TOKEN):
        out["image_token"] = vision.image_token
    return out

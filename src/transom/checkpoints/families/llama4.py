"""Llama 4, its text alone and with the image encoder. No torch."""

from __future__ import annotations

from typing import Any

from transom.checkpoints.families.family import (
    Family,
    Fields,
    Keys,
    Option,
    copied,
    fixed,
    ignored,
    only,
    read_all,
    redundant,
    value_at,
    write_all,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.options import (
    BIAS,
    COMMON,
    dense_layers,
    experts,
    layer_letters,
    layer_types,
)
from transom.checkpoints.families.rope import rope_fields, rope_settings
from transom.checkpoints.families.weights import (
    EXPERTS,
    MODEL_LAYER,
    PRE,
    WeightNames,
    gate_and_value,
    gated,
    under,
)
from transom.config.model_args import ModelArgs
from transom.names.tables import FEED_FORWARD, VISION_LAYER, KeyPattern, pattern, with_bias

_FFN, _BLOCK = f"{MODEL_LAYER}.feed_forward", "vision_model.model.layers.{v}"
_TEXT_NAMES = (
    *PRE,
    *gated(_FFN, FEED_FORWARD),
    *gated(f"{_FFN}.shared_expert", f"{FEED_FORWARD}.shared_expert"),
    pattern(f"{_FFN}.router.weight", f"{FEED_FORWARD}.router.weight"),
    pattern(f"{_FFN}.experts.gate_up_proj", *gate_and_value("weight"), transform="halves"),
    pattern(f"{_FFN}.experts.down_proj", f"{EXPERTS}.w_out.weight", transform="transpose"),
)
# Names of the image encoder: ours, those of Hugging Face files and those of Meta's.
_META = "vision_embeddings.vision_encoder"
_META_BLOCK = f"{_META}.transformer.resblocks.{{v}}"
_VISION_WEIGHTS = (
    (
        "vision.patch_embedding.weight",
        "vision_model.patch_embedding.linear.weight",
        f"{_META}.conv1._linear.weight",
    ),
    ("vision.class_embedding", "vision_model.class_embedding", f"{_META}.class_embedding"),
    (
        "vision.position_embedding",
        "vision_model.positional_embedding_vlm",
        f"{_META}.positional_embedding_vlm",
    ),
    (
        "vision.adapter.fc1.weight",
        "vision_model.vision_adapter.mlp.fc1.weight",
        "vision_embeddings.vision_adapter.mlp.c_fc.weight",
    ),
    (
        "vision.adapter.fc2.weight",
        "vision_model.vision_adapter.mlp.fc2.weight",
        "vision_embeddings.vision_adapter.mlp.c_proj.weight",
    ),
    (
        "vision.projection.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_projection.weight",
    ),
)
_VISION_MODULES = (
    ("vision.norm_pre", "vision_model.layernorm_pre", f"{_META}.ln_pre"),
    ("vision.norm_post", "vision_model.layernorm_post", f"{_META}.ln_post"),
    *(
        (f"{VISION_LAYER}.{ours}", f"{_BLOCK}.{hf}", f"{_META_BLOCK}.{meta}")
        for ours, hf, meta in (
            *((f"attention.w{x}", f"self_attn.{x}_proj", f"attn.w{x}") for x in "qkvo"),
            ("attention_norm", "input_layernorm", "ln_1"),
            ("ffn_norm", "post_attention_layernorm", "ln_2"),
            ("feed_forward.w_value", "mlp.fc1", "mlp.c_fc"),
            ("feed_forward.w_out", "mlp.fc2", "mlp.c_proj"),
        )
    ),
)


def vision_names(*, meta: bool) -> tuple[KeyPattern, ...]:
    """Return the patterns of the image encoder in files of Meta or of Hugging Face."""
    column = 2 if meta else 1
    modules = (with_bias(row[column], row[0]) for row in _VISION_MODULES)
    weights = (pattern(row[column], row[0]) for row in _VISION_WEIGHTS)
    return (*weights, *(row for both in modules for row in both))


# Parts of multimodal files leave out whatever their class has, also the shape.
_TEXT: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "use_qk_norm": True,
    "attn_scale": 0.1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "intermediate_size": 5632,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}


def _read_layers(config: ForeignConfig) -> Fields:
    layers, chunk = config["num_hidden_layers"], config["attention_chunk_size"]
    interval, step = config["no_rope_layer_interval"], config.get("interleave_moe_layer_step", 1)
    # In this list 1 means rotary positions and 0 means none; an empty or missing one follows the
    # interval.
    rotary = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    config.check(len(rotary) >= layers, "no_rope_layers", f"one number per layer ({layers})")
    rotary = [bool(flag) for flag in rotary[:layers]]
    letters = layer_letters(
        config,
        {"full_attention": "F", "chunked_attention": "F" if chunk is None else "C"},
        lambda index: "chunked_attention" if rotary[index] else "full_attention",
    )
    sparse = config.get("moe_layers")
    if sparse is None:
        sparse = [index for index in range(layers) if (index + 1) % step == 0]
    return {
        "attention_chunk_size": chunk if "C" in letters else None,
        "layer_pattern": [
            letter if flag else letter.lower() for letter, flag in zip(letters, rotary, strict=True)
        ],
        "attn_temperature_tuning": bool(config["attn_temperature_tuning"]) and not all(rotary),
        "moe_args.dense_layers": [index for index in range(layers) if index not in sparse],
        "hidden_dim": config["intermediate_size_mlp"],
    }


def _write_layers(args: ModelArgs) -> Keys:
    return {
        "attention_chunk_size": args.attention_chunk_size or args.max_seq_len,
        "layer_types": layer_types(args),
        "no_rope_layers": [int(layer.rope is not None) for layer in args.layers],
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": int(args.floor_scale),
        "moe_layers": dense_layers(args, dense=False),
        "intermediate_size_mlp": args.dense_hidden_dim,
    }


LLAMA4_TEXT = Family(
    "llama4_text",
    "Llama4",
    WeightNames(_TEXT_NAMES),
    (
        *COMMON,
        BIAS,
        experts("intermediate_size"),
        copied(floor_scale="floor_scale", attn_scale="attn_scale", use_qk_norm="use_qk_norm"),
        Option(_read_layers, _write_layers),
        fixed(rope_layout="interleaved", moe_args__routing="sigmoid", moe_args__shared_expert=True),
    ),
    _TEXT,
)


_OUTPUTS = ("projector_input_dim", "vision_output_dim")


def _read_encoder(config: ForeignConfig) -> Fields:
    ratio, output = config["pixel_shuffle_ratio"], config["projector_output_dim"]
    width = round(config["hidden_size"] / ratio**2)
    # The first is hidden_size / pixel_shuffle_ratio^2.
    for key, size in (("intermediate_size", width), *((key, output) for key in _OUTPUTS)):
        config.expect(key, size)
    theta = rope_fields(config, rope_settings(config))
    config.check(list(theta) == ["rope_theta"], "rope_parameters", "rope_type 'default'")
    out = {"vision_args.rope_theta": theta["rope_theta"]}
    for key in ("image_size", "patch_size"):
        sides = config[key] if isinstance(config[key], (list, tuple)) else [config[key]]
        config.check(len(set(sides)) == 1, key, "a square")
        out[f"vision_args.{key}"] = sides[0]
    return out


def _write_encoder(args: ModelArgs) -> Keys:
    theta = value_at(args, "vision_args.rope_theta")
    return {
        "model_type": "llama4_vision_model",
        "norm_eps": value_at(args, "vision_args.norm_eps"),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
    }


_ENCODER = (
    only(hidden_act="gelu", vision_feature_select_strategy="default"),
    ignored("multi_modal_projector_bias"),
    # transformers reads neither: it has 1e-5 and the last layer.
    redundant("norm_eps", "vision_feature_layer"),
    fixed(vision_args__norm_eps=1e-5),
    copied(
        hidden_size="vision_args.dim",
        num_hidden_layers="vision_args.n_layers",
        num_attention_heads="vision_args.n_heads",
        num_channels="vision_args.num_channels",
        intermediate_size="vision_args.hidden_dim",
        pixel_shuffle_ratio="vision_args.pixel_shuffle_ratio",
        projector_input_dim="vision_args.adapter_dim",
        projector_output_dim="vision_args.output_dim",
        vision_output_dim="vision_args.output_dim",
        image_size="vision_args.image_size",
        patch_size="vision_args.patch_size",
    ),
    Option(_read_encoder, _write_encoder),
)


def _read_with_vision(config: ForeignConfig) -> Fields:
    text, vision = config.part("text_config", _TEXT), config.part("vision_config", _VISION)
    token = config.get("image_token_index", config.get("image_token_id"))
    config.check(token is not None, "image_token_index", "the id of a token")
    fields = {
        **LLAMA4_TEXT.read(text),
        **read_all(_ENCODER, vision),
        "vision_args.image_token": token,
    }
    # The output matrix belongs to the text model, which the flag beside it must not contradict.
    config.expect("tie_word_embeddings", fields["tie_embeddings"])
    return fields


def _write_with_vision(args: ModelArgs) -> Keys:
    text, encoder = LLAMA4_TEXT.write(args), write_all(_ENCODER, args)
    del text["architectures"], text["torch_dtype"]  # they stand beside text_config
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": text,
        "vision_config": encoder,
        "image_token_index": value_at(args, "vision_args.image_token"),
        "tie_word_embeddings": args.tie_embeddings,
        "torch_dtype": "float32",
    }


LLAMA4 = Family(
    "llama4",
    "Llama4",
    WeightNames((*under("language_model.", _TEXT_NAMES), *vision_names(meta=False))),
    (Option(_read_with_vision, _write_with_vision),),
)

FAMILIES = (LLAMA4_TEXT, LLAMA4)

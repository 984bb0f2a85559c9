"""`ModelArgs` to a Hugging Face `config.json`, for the families that can say all of it. No
torch.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

from transom.base.errors import RequestError, require
from transom.base.fields import write
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.hf_config import BASE_HEAD
from transom.checkpoints.families.hf_families import FAMILIES
from transom.checkpoints.families.hf_rope import rope_to_hf
from transom.config.model_args import LayerArgs, ModelArgs, MoeArgs, VisionArgs

_BIAS, _WINDOW = ("attention_bias",), ("sliding_window",)
_QWEN = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_EXPERTS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
_MORE_EXPERTS = (
    "num_experts",
    "moe_intermediate_size",
    "norm_topk_prob",
    "mlp_only_layers",
    "decoder_sparse_step",
)
_GEMMA = (
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_LLAMA4 = (
    "attention_chunk_size",
    "no_rope_layers",
    "moe_layers",
    "intermediate_size_mlp",
    "use_qk_norm",
    "attn_temperature_tuning",
    "floor_scale",
    "attn_scale",
)
_LATENT = (
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
)
_DEEPSEEK = (
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
)
# Class prefix and the keys beside the common ones, in the order in which a shape is tried.
WRITABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("Llama", (*_BIAS, "mlp_bias")),
    "mistral": ("Mistral", _WINDOW),
    "mixtral": ("Mixtral", (*_WINDOW, *_EXPERTS)),
    "qwen2": ("Qwen2", _QWEN),
    "qwen3": ("Qwen3", (*_QWEN, *_BIAS)),
    "qwen3_moe": (
        "Qwen3Moe",
        (*_BIAS, *_EXPERTS, *_MORE_EXPERTS, "use_sliding_window", "sliding_window"),
    ),
    "olmo2": ("Olmo2", _BIAS),
    "phi3": ("Phi3", (*_WINDOW, "partial_rotary_factor", "original_max_position_embeddings")),
    "gemma2": ("Gemma2", (*_BIAS, *_GEMMA, "sliding_window", "layer_types")),
    "gemma3_text": (
        "Gemma3",
        (*_BIAS, *_GEMMA, "sliding_window", "layer_types", "rope_local_base_freq"),
    ),
    "gpt_oss": ("GptOss", (*_BIAS, *_EXPERTS, "sliding_window", "layer_types", "swiglu_limit")),
    "llama4_text": ("Llama4", (*_BIAS, *_EXPERTS, *_LLAMA4, "layer_types")),
    "llama4": ("Llama4", ()),  # llama4_text with an image encoder
    "deepseek_v3": ("DeepseekV3", (*_BIAS, *_LATENT, *_DEEPSEEK, "num_experts_per_tok")),
}
_TYPES = {"causal": "full_attention", "window": "sliding_attention", "chunk": "chunked_attention"}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
# What of a mixture the forward pass reads; the rest is training's, or already resolved per layer.
_MOE = (
    *(
        "num_experts",
        "top_k",
        "routing",
        "normalize",
        "routed_scale",
        "num_groups",
        "top_groups",
        "router_bias",
    ),
    *(
        "expert_bias",
        "expert_activation",
        "activation_limit",
        "hidden_dim",
        "shared_expert",
        "shared_hidden_dim",
    ),
    "has_choice_bias",
)
# How far a family is from a model, in fields: one that has no word for a value, and one that lacks
# a whole part.
_NO_WORD, _PART = 100, 50
_WHOLE = (
    "vocab_size",
    "max_seq_len",
    "norm_eps",
    "tie_embeddings",
    "embedding_scale",
    "logit_factor",
)
_WHOLE_TOO = ("logit_softcap", "vision_args", "head")


def args_to_hf(args: ModelArgs) -> dict[str, Any]:
    """The config of the first family that reads back as the same model; no such family is a
    `RequestError`.
    """
    if args.head == BASE_HEAD and not args.tie_embeddings and args.vision_args is None:
        config = args_to_hf(replace(args, head=None))
        text = "Text" if config["model_type"] in ("gemma3_text", "llama4_text") else ""
        (name,) = config["architectures"]
        return {**config, "architectures": [name.replace("ForCausalLM", f"{text}Model")]}
    whole = args.mla_args is not None or args.dim % args.n_heads == 0
    require(
        whole,
        "dim",
        args.dim,
        f"format hf accepts a multiple of n_heads = {args.n_heads}; save as native",
    )
    vision = args.vision_args
    named = vision is None or vision.image_token is not None
    require(
        named,
        "vision_args.image_token",
        None,
        "format hf accepts the id of a token; save as native",
    )
    alone = args.mla_args is not None and args.moe_args is None
    require(
        not alone,
        "moe_args",
        None,
        "format hf accepts mla_args with a mixture (as deepseek_v3); save as native",
    )
    refusals: list[tuple[int, str]] = []
    for family in WRITABLE:
        if family == "llama4" and vision is None:
            continue
        config = _config(args, family)
        try:
            again = ModelArgs.from_dict(
                FAMILIES[family].fields(ForeignConfig(config, family, FAMILIES[family].defaults))
            )
        except (
            RequestError,
            TypeError,
            ArithmeticError,
        ) as error:  # a value that this family has no word for
            refusals.append((_NO_WORD, f"format hf: {error}"))
            continue
        # Interleaved weights may become halves on the way: `save` turns them, though not those of a
        # latent.
        turned = again.rope_layout == "halves" and args.mla_args is None
        mine = replace(args, rope_layout="halves") if turned else args
        if meaning(again) == meaning(mine):
            return config
        refusals.append(_refusal(mine, again, family))
    raise RequestError(f"{min(refusals, key=lambda one: one[0])[1]}; save as native")


def _refusal(args: ModelArgs, again: ModelArgs, family: str) -> tuple[int, str]:
    """How far `args` are from a family, which reads them as `again`, and a sentence of what is in
    the way.
    """
    found = _misfits(args, again)
    ours = " and ".join(
        f"{name} = {'given' if is_dataclass(mine) else repr(mine)}" for name, mine, _ in found
    )
    theirs = " and ".join(_accepted(other) for _, _, other in found)
    lost = sum(
        is_dataclass(mine) for _, mine, _ in found
    )  # whole parts, where other families have such a part
    return len(found) + _PART * lost, f"{ours}: format hf accepts {theirs} (as {family})"


def _misfits(args: ModelArgs, again: ModelArgs) -> list[tuple[str, Any, Any]]:
    """The fields that must change to make `again` of `args`: (name, value, the value of
    `again`).
    """
    differ = [(f.name, getattr(args, f.name), getattr(again, f.name)) for f in fields(args)]
    differ = [(name, mine, other) for name, mine, other in differ if mine != other]
    found: list[tuple[str, Any, Any]] = []
    entangled: list[tuple[str, Any, Any]] = []  # which cannot change alone
    changed = args
    for name, mine, other in differ:
        try:
            if meaning(replace(args, **{name: other})) == meaning(args):
                continue  # another spelling of the same
        except RequestError:
            entangled.append((name, mine, other))
            continue
        found += _parts(args, name, mine, other) or [(name, mine, other)]
        with contextlib.suppress(RequestError):
            changed = replace(changed, **{name: other})
    alone = found and meaning(changed) == meaning(again)
    return found if alone else found + entangled or differ


def _parts(args: ModelArgs, name: str, mine: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """`_misfits` inside of a field that has fields of its own on both sides."""
    found: list[tuple[str, Any, Any]] = []
    for part in fields(mine) if is_dataclass(mine) and is_dataclass(other) else ():
        one, two = getattr(mine, part.name), getattr(other, part.name)
        with contextlib.suppress(RequestError):
            if one != two and meaning(
                replace(args, **{name: replace(mine, **{part.name: two})})
            ) != meaning(args):
                found.append((f"{name}.{part.name}", one, two))
    return found


def _accepted(value: Any) -> str:
    plain = value is None or isinstance(value, bool)  # as a config spells them
    return "one" if is_dataclass(value) else json.dumps(value) if plain else repr(value)


def meaning(args: ModelArgs) -> tuple[Any, ...]:
    """All that the forward pass depends on."""
    whole = tuple(getattr(args, name) for name in (*_WHOLE, *_WHOLE_TOO))
    return (*whole, tuple(_layer(layer) for layer in args.layers))


def _layer(layer: LayerArgs) -> tuple[Any, ...]:
    out: list[Any] = []
    for field in fields(layer):
        value = getattr(layer, field.name)
        if field.name == "hidden_dim" and layer.moe is not None:
            continue  # of the dense feed-forward that this layer does not have
        out.append(
            tuple(getattr(value, name) for name in _MOE) if isinstance(value, MoeArgs) else value
        )
    return tuple(out)


def _config(args: ModelArgs, family: str) -> dict[str, Any]:
    if family == "llama4" and args.vision_args is not None:
        return _with_vision(args, args.vision_args)
    prefix, keys = WRITABLE[family]
    scaling = args.scaling
    rope = rope_to_hf(write(args), None if scaling is None else write(scaling))
    dynamic = scaling is not None and scaling.kind == "dynamic"
    config = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": family,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_size if args.mla_args is None else args.rotary_dim,
        "intermediate_size": args.dense_hidden_dim,
        "hidden_act": _ACTIVATIONS.get(args.activation, args.activation),
        "vocab_size": args.vocab_size,
        "max_position_embeddings": scaling.original_max_seq_len
        if scaling and dynamic
        else args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_embeddings,
        # Both spellings: the first is read by transformers 5, the other two by 4 and by most other
        # tools.
        "rope_parameters": rope,
        "rope_theta": args.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaling else None,
        "torch_dtype": "float32",
        "pad_token_id": None,  # some classes have a default of their own, beyond a small vocabulary
    }
    special = {**_special(args), **_special_experts(args), **_special_latent(args)}
    if family in (
        "gemma2",
        "gemma3_text",
        "gpt_oss",
    ):  # which want a window even where layer_types uses none
        special["sliding_window"] = args.sliding_window or args.max_seq_len
    if family == "llama4_text":
        special["attention_chunk_size"] = args.attention_chunk_size or args.max_seq_len
    config |= {key: special[key] for key in keys if key in special}
    if args.moe_args and family in (
        "mixtral",
        "gpt_oss",
        "llama4_text",
    ):  # whose one width is that of the experts
        config["intermediate_size"] = special["moe_intermediate_size"]
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": special["rope_local_base_freq"]}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return config


def _with_vision(args: ModelArgs, vision: VisionArgs) -> dict[str, Any]:
    """Llama 4 as a whole: its text model's config beside that of the image encoder."""
    text = _config(args, "llama4_text")
    for key in ("architectures", "torch_dtype"):  # which the whole has
        del text[key]
    shuffled = round(vision.dim / vision.pixel_shuffle_ratio**2)
    encoder = {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.dim,
        "num_hidden_layers": vision.n_layers,
        "num_attention_heads": vision.n_heads,
        "num_channels": vision.num_channels,
        "intermediate_size": shuffled,  # of the blocks, and the width behind the pixel shuffle
        "vision_output_dim": vision.output_dim,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "norm_eps": vision.norm_eps,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "projector_input_dim": vision.output_dim,
        "projector_output_dim": vision.output_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        "rope_theta": vision.rope_theta,
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": encoder,
        "image_token_index": vision.image_token,
        "tie_word_embeddings": args.tie_embeddings,
        "torch_dtype": "float32",
    }


def _special(args: ModelArgs) -> dict[str, Any]:
    """Values of the keys that only some families have, by their name there."""
    windowed = args.sliding_window is not None
    out: dict[str, Any] = {
        "attention_bias": args.qkv_bias,
        "mlp_bias": args.ffn_bias,
        "sliding_window": args.sliding_window,
        "use_sliding_window": windowed,
        "max_window_layers": 0 if windowed else args.n_layers,
        "layer_types": [_TYPES.get(layer.rule.kind, layer.rule.kind) for layer in args.layers],
        "partial_rotary_factor": args.rotary_fraction,
        "attn_logit_softcapping": args.attn_softcap,
        "final_logit_softcapping": args.logit_softcap,
        "hidden_activation": _ACTIVATIONS.get(args.activation, args.activation),
    }
    out |= {
        "rope_local_base_freq": args.rope_local_theta or args.rope_theta,
        "attention_chunk_size": args.attention_chunk_size,
        "no_rope_layers": [int(layer.rope is not None) for layer in args.layers],
        "intermediate_size_mlp": args.dense_hidden_dim,
        "use_qk_norm": args.use_qk_norm,
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": int(args.floor_scale),
        "attn_scale": args.attn_scale,
    }
    if args.scaling is not None and args.scaling.kind == "longrope":
        out["original_max_position_embeddings"] = args.scaling.original_max_seq_len
    scale = args.head_size**-0.5 if args.softmax_scale is None else args.softmax_scale
    out["query_pre_attn_scalar"] = round(scale**-2)
    return out


def _special_experts(args: ModelArgs) -> dict[str, Any]:
    if args.moe_args is None:
        return {}
    moe = args.moe_args
    sparse = [layer.index for layer in args.layers if layer.moe is not None]
    dense = [layer.index for layer in args.layers if layer.moe is None]
    width = next((layer.moe.hidden_dim for layer in args.layers if layer.moe is not None), None)
    shared = (moe.shared_hidden_dim or width or 0) if moe.shared_expert else 0
    return {
        "num_local_experts": moe.num_experts,
        "num_experts": moe.num_experts,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_coef,
        "moe_intermediate_size": width or 1,
        "n_shared_experts": shared // (width or 1),
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.routed_scale,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "moe_layers": sparse,
        "first_k_dense_replace": len(dense),
        "swiglu_limit": moe.activation_limit,
        "num_nextn_predict_layers": 0,
    }


def _special_latent(args: ModelArgs) -> dict[str, Any]:
    if args.mla_args is None:
        return {}
    return {**write(args.mla_args), "rope_interleave": args.rope_layout == "interleaved"}

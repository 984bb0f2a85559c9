"""What the values of each Hugging Face family mean: one function per family, from its config to
fields. No torch.

A family is a set of field values, never a class of its own; the sources are `configuration_*.py`
and `modeling_*.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transom.checkpoints.families import defaults as defaults
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.hf_rope import require_whole_rotary, rope_fields, rope_settings
from transom.config.layer_args import yarn_mscale

Fields = dict[str, Any]
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_LETTERS = {"full_attention": "F", "sliding_attention": "S", "chunked_attention": "C"}


@dataclass(frozen=True)
class Family:
    """How one `model_type` is read: its fields, and the defaults of its config class."""

    fields: Callable[[ForeignConfig], Fields]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _activation(config: ForeignConfig, key: str = "hidden_act") -> str:
    config.plain(key, *_ACTIVATIONS)
    return _ACTIVATIONS[config.get(key, "silu")]


def _common(config: ForeignConfig) -> Fields:
    """What all families spell alike."""
    config.get("pretraining_tp")  # how a matrix product was cut on the machines of training
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "hidden_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_layout": "halves",
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def _dense(config: ForeignConfig) -> Fields:
    """`_common` with ordinary attention, biased as a whole by `attention_bias`."""
    bias = config.get("attention_bias", False)
    rope = rope_fields(config, rope_settings(config))
    require_whole_rotary(config, rope)
    return {
        **_common(config),
        "head_dim": config.get("head_dim"),
        "activation": _activation(config),
        "qkv_bias": bias,
        "out_bias": bias,
        **rope,
    }


def _windows(config: ForeignConfig, letters: Sequence[str]) -> Fields:
    """`sliding_window` and the pattern of layers; `layer_types` of the file wins over the family's
    rule.
    """
    types = config.get("layer_types")
    if types is not None:
        known = [kind for kind, letter in _LETTERS.items() if letter in "FS"]
        config.check(set(types) <= set(known), "layer_types", f"expected {', '.join(known)}")
        letters = [_LETTERS[kind] for kind in types]
    window = config["sliding_window"]
    if "S" not in letters:
        return {}
    config.check(
        window is not None, "sliding_window", "expected a number: layer_types has sliding layers"
    )
    mixed = {"layer_pattern": list(letters)} if set(letters) != {"S"} else {}
    return {"sliding_window": window, **mixed}


def _uniform(config: ForeignConfig, window: int | None) -> Fields:
    """A window in every layer or in none, which is all that transformers does in these families."""
    letter = "F" if window is None else "S"
    types = config.get("layer_types", [])
    fits = all(_LETTERS.get(kind) == letter for kind in types)
    config.check(
        fits, "layer_types", f"expected the same everywhere, as sliding_window = {window} says"
    )
    return {"sliding_window": window}


def _llama(config: ForeignConfig) -> Fields:
    return {**_dense(config), "ffn_bias": config.get("mlp_bias", False)}


def _mistral(config: ForeignConfig) -> Fields:
    config.ignored("attention_bias")
    fields = {**_dense(config), "qkv_bias": False, "out_bias": False}
    return {**fields, **_uniform(config, config["sliding_window"])}


def _mixtral(config: ForeignConfig) -> Fields:
    return {**_mistral(config), "moe_args": _experts(config, config["intermediate_size"])}


def _experts(config: ForeignConfig, hidden_dim: int) -> Fields:
    """The part of `moe_args` that mixtures share; the two names of the number of experts mean the
    same.
    """
    count = config.get("num_experts")
    count = config.get("num_local_experts") or count
    config.check(count is not None, "num_local_experts", "expected a number of experts")
    return {
        "num_experts": count,
        "top_k": config["num_experts_per_tok"],
        "hidden_dim": hidden_dim,
        "aux_loss_coef": config.get("router_aux_loss_coef", 0.001),
    }


def _qwen2(config: ForeignConfig) -> Fields:
    fields = _dense(config)
    windowed = config.get("use_sliding_window", False) and config["sliding_window"] is not None
    first = config["max_window_layers"]
    letters = ["S" if windowed and index >= first else "F" for index in range(fields["n_layers"])]
    return {**fields, **_windows(config, letters)}


def _qwen2_biased(config: ForeignConfig) -> Fields:
    config.ignored("use_mrope")
    config.plain(
        "attention_bias", False, True
    )  # the class has no such key: q, k and v always have biases
    return {**_qwen2(config), "qkv_bias": True, "out_bias": False}


def _qwen3(config: ForeignConfig) -> Fields:
    return {**_qwen2(config), "qk_norm": "head"}


def _qwen3_moe(config: ForeignConfig) -> Fields:
    config.get(
        "max_window_layers"
    )  # in the files, but the window of this family is all layers' or none's
    window = config["sliding_window"]
    window = window if config.get("use_sliding_window", False) else None
    moe = {
        **_experts(config, config["moe_intermediate_size"]),
        "normalize": config.get("norm_topk_prob", False),
        "interleave_moe_layer_step": config.get("decoder_sparse_step", 1),
        "dense_layers": config.get("mlp_only_layers", []),
    }
    return {**_dense(config), **_uniform(config, window), "qk_norm": "head", "moe_args": moe}


def _gemma(config: ForeignConfig, rope: Fields) -> Fields:
    config.get(
        "hidden_act"
    )  # stands beside hidden_activation in older files, which is the one that counts
    config.plain("use_bidirectional_attention", False)
    require_whole_rotary(config, rope)
    bias = config.get("attention_bias", False)
    return {
        **_common(config),
        "head_dim": config["head_dim"],
        "activation": _activation(config, "hidden_activation"),
        "qkv_bias": bias,
        "out_bias": bias,
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "embedding_scale": config["hidden_size"] ** 0.5,
        "softmax_scale": config["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": config["final_logit_softcapping"],
        **rope,
    }


def _gemma2(config: ForeignConfig) -> Fields:
    fields = _gemma(config, rope_fields(config, rope_settings(config)))
    letters = ["F" if index % 2 else "S" for index in range(fields["n_layers"])]
    return {**fields, "attn_softcap": config["attn_logit_softcapping"], **_windows(config, letters)}


def _gemma3(config: ForeignConfig) -> Fields:
    config.plain("attn_logit_softcapping", None)
    tables = config.get("rope_parameters", {})
    known = set(tables) <= {"full_attention", "sliding_attention"}
    config.check(
        known,
        "rope_parameters",
        "expected one mapping for full_attention and one for sliding_attention",
    )
    full = {**(tables.get("full_attention") or {}), **config.get("rope_scaling", {})}
    full.setdefault("rope_theta", config["rope_theta"])
    local = {**(tables.get("sliding_attention") or {})}
    local.setdefault("rope_theta", config["rope_local_base_freq"])
    plain = local.get("rope_type", "default") == "default"
    config.check(plain, "rope_parameters", "accepted in sliding_attention is rope_type 'default'")
    fields = _gemma(config, rope_fields(config, full))
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern", 6)
    letters = ["F" if (index + 1) % every == 0 else "S" for index in range(fields["n_layers"])]
    windows = _windows(config, letters)
    if windows:
        windows["rope_local_theta"] = rope_fields(config, local)["rope_theta"]
    return {**fields, "qk_norm": "head", **windows}


def _gemma3_full(config: ForeignConfig) -> Fields:
    text = config.part("text_config", defaults.GEMMA3)
    config.get("vision_config"), config.get("image_token_index"), config.get("image_token_id")
    fields = {**_gemma3(text), "tie_embeddings": config.get("tie_word_embeddings", True)}
    text.say_unread()
    return fields


def _olmo2(config: ForeignConfig) -> Fields:
    return {**_dense(config), "norm": "rms_wide", "norm_placement": "post", "qk_norm": "projection"}


def _phi3(config: ForeignConfig) -> Fields:
    config.ignored("attention_bias", "mlp_bias", "lm_head_bias")
    # Early Phi-3 files call longrope by its first names.
    rope = rope_fields(config, rope_settings(config), {"su": "longrope", "yarn": "longrope"})
    fields = {
        **_common(config),
        "head_dim": config.get("head_dim"),
        "activation": _activation(config),
        **rope,
    }
    return {**fields, **_uniform(config, config["sliding_window"])}


def _llama4_text(config: ForeignConfig) -> Fields:
    fields, layers = _dense(config), config["num_hidden_layers"]
    interval = config["no_rope_layer_interval"]
    # In this list 1 means rotary and 0 means none; empty or missing follows the interval.
    rotary = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    config.check(
        len(rotary) >= layers, "no_rope_layers", f"expected one number per layer ({layers})"
    )
    rotary, chunk = [bool(flag) for flag in rotary[:layers]], config["attention_chunk_size"]
    types = config.get("layer_types") or [
        "chunked_attention" if flag else "full_attention" for flag in rotary
    ]
    config.check(
        set(types) <= {"chunked_attention", "full_attention"},
        "layer_types",
        "expected these two",
    )
    letters = ["C" if kind == "chunked_attention" and chunk is not None else "F" for kind in types]
    step = config.get("interleave_moe_layer_step", 1)
    sparse = config.get("moe_layers")
    sparse = [i for i in range(layers) if (i + 1) % step == 0] if sparse is None else sparse
    return {
        **fields,
        "rope_layout": "interleaved",
        "hidden_dim": config["intermediate_size_mlp"],
        "attention_chunk_size": chunk if "C" in letters else None,
        "layer_pattern": [
            letter if flag else letter.lower() for letter, flag in zip(letters, rotary, strict=True)
        ],
        "use_qk_norm": config.get("use_qk_norm", True),
        "attn_temperature_tuning": bool(config["attn_temperature_tuning"]) and not all(rotary),
        "floor_scale": config["floor_scale"],
        "attn_scale": config["attn_scale"],
        "moe_args": {
            **_experts(config, config["intermediate_size"]),
            "routing": "sigmoid",
            "shared_expert": True,
            "dense_layers": [i for i in range(layers) if i not in sparse],
        },
    }


def _llama4(config: ForeignConfig) -> Fields:
    text = config.part("text_config", defaults.LLAMA4)
    vision = config.part("vision_config", defaults.LLAMA4_VISION)
    token = config.get("image_token_index", config.get("image_token_id"))
    config.check(token is not None, "image_token_index", "expected the id of a token")
    fields = {**_llama4_text(text), "vision_args": {**_vision(vision), "image_token": token}}
    text.say_unread()
    vision.say_unread()
    # The output matrix belongs to the text model; a flag of the whole must not contradict it.
    config.plain("tie_word_embeddings", fields["tie_embeddings"])
    return fields


def _vision(config: ForeignConfig) -> Fields:
    config.plain("hidden_act", "gelu")
    config.ignored("multi_modal_projector_bias")
    config.plain("vision_feature_select_strategy", "default")
    for key in (
        "norm_eps",
        "vision_feature_layer",
    ):  # transformers reads neither: always 1e-5 and the last layer
        config.get(key)
    ratio, width = config["pixel_shuffle_ratio"], config["intermediate_size"]
    shuffled = round(config["hidden_size"] / ratio**2)
    config.check(
        width == shuffled,
        "intermediate_size",
        f"expected hidden_size / pixel_shuffle_ratio^2 = {shuffled}",
    )
    output = config["projector_output_dim"]
    config.plain("projector_input_dim", output)
    config.plain("vision_output_dim", output)
    theta = rope_fields(config, rope_settings(config))
    config.check(list(theta) == ["rope_theta"], "rope_parameters", "expected rope_type 'default'")
    return {
        "image_size": _side(config, "image_size"),
        "patch_size": _side(config, "patch_size"),
        "num_channels": config["num_channels"],
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "hidden_dim": width,
        "norm_eps": 1e-5,
        "rope_theta": theta["rope_theta"],
        "pixel_shuffle_ratio": ratio,
        "adapter_dim": config["projector_input_dim"],
        "output_dim": output,
    }


def _side(config: ForeignConfig, key: str) -> Any:
    value = config[key]
    if not isinstance(value, (list, tuple)):
        return value
    config.check(len(set(value)) == 1, key, "expected a square")
    return value[0]


def _gpt_oss(config: ForeignConfig) -> Fields:
    fields = _dense(config)
    config.plain("swiglu_alpha", 1.702)
    for other in (
        "experts_per_token",
        "initial_context_length",
    ):  # repeat num_experts_per_tok and the rope's own
        config.get(other)
    letters = ["F" if index % 2 else "S" for index in range(fields["n_layers"])]
    moe = {
        **_experts(config, fields["hidden_dim"]),
        "router_bias": True,
        "expert_bias": True,
        "expert_activation": "clamped",
        "activation_limit": config["swiglu_limit"],
    }
    return {
        **fields,
        **_windows(config, letters),
        "norm": "rms_wide",
        "attn_sinks": True,
        "moe_args": moe,
    }


def _deepseek_v3(config: ForeignConfig) -> Fields:
    for key, value in (
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
    ):
        config.plain(key, value)
    config.get("head_dim")  # written by transformers, where it is the rotary part alone
    bias, shared = config.get("attention_bias", False), config.get("n_shared_experts", 0)
    settings = rope_settings(config)
    rope = rope_fields(config, settings)
    width = config["moe_intermediate_size"]
    head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return {
        **_common(config),
        "n_kv_heads": None,
        "activation": _activation(config),
        "qkv_bias": bias,
        "out_bias": bias,
        "rope_layout": "interleaved" if config.get("rope_interleave", True) else "halves",
        "softmax_scale": _deepseek_scale(settings, rope, head),
        **rope,
        "mla_args": {
            key: config[key]
            for key in (
                "kv_lora_rank",
                "q_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
            )
        },
        "moe_args": {
            "num_experts": config["n_routed_experts"],
            "top_k": config["num_experts_per_tok"],
            "routing": "biased_sigmoid",
            "normalize": config.get("norm_topk_prob", True),
            "routed_scale": config["routed_scaling_factor"],
            "num_groups": config.get("n_group", 1),
            "top_groups": config.get("topk_group", 1),
            "hidden_dim": width,
            "shared_expert": shared > 0,
            "shared_hidden_dim": width * shared if shared else None,
            "first_dense_layers": config["first_k_dense_replace"],
            "balance": "bias",
        },
    }


def _deepseek_scale(settings: Mapping[str, Any], rope: Fields, head: int) -> float | None:
    """YaRN's temperature once more, on all features: this file's `mscale_all_dim` squared
    (DeepSeek-V3).
    """
    weight, scaling = settings.get("mscale_all_dim"), rope.get("rope_scaling")
    if not weight or scaling is None or scaling["factor"] <= 1:
        return None
    return float(head**-0.5 * yarn_mscale(scaling["factor"], weight) ** 2)


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, defaults.LLAMA),
    "mistral": Family(_mistral, defaults.MISTRAL),
    "mixtral": Family(_mixtral, defaults.MIXTRAL),
    "qwen2": Family(_qwen2_biased, defaults.QWEN),
    "qwen3": Family(_qwen3, defaults.QWEN3),
    "qwen3_moe": Family(_qwen3_moe, defaults.QWEN3_MOE),
    "gemma2": Family(_gemma2, defaults.GEMMA2),
    "gemma3_text": Family(_gemma3, defaults.GEMMA3),
    "gemma3": Family(_gemma3_full),
    "olmo2": Family(_olmo2, defaults.OLMO2),
    "phi3": Family(_phi3, defaults.PHI3),
    "llama4_text": Family(_llama4_text, defaults.LLAMA4),
    "llama4": Family(_llama4),
    "gpt_oss": Family(_gpt_oss, defaults.GPT_OSS),
    "deepseek_v3": Family(_deepseek_v3, defaults.DEEPSEEK),
}

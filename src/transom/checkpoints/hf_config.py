"""Hugging Face `config.json` to `ModelArgs` and back; both spellings (transformers 4 and 5). No torch."""

from __future__ import annotations

from typing import Any

from transom.args import ModelArgs
from transom.errors import RequestError, require
from transom.names import TABLES


def args_from_hf(config: dict[str, Any], where: str) -> ModelArgs:
    """The model a Hugging Face config describes; a missing key, or a feature we lack, is a `RequestError`."""
    try:
        return _args_from_hf(config, where)
    except KeyError as error:
        raise RequestError(f"{where}: {error.args[0]!r} is missing; accepted is a whole config.json") from None


def _args_from_hf(config: dict[str, Any], where: str) -> ModelArgs:
    family = config.get("model_type")
    if family not in TABLES:
        raise RequestError(f"{where}: model_type = {family!r}: accepted is transom, {', '.join(TABLES)}")
    for key, plain in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("pretraining_tp", 1),
    ):
        value = config.get(key, plain)
        require(value == plain, f"{where}: {key}", value, f"accepted is {plain!r}")
    data: dict[str, Any] = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim"),
        "hidden_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_layout": "interleaved" if family == "llama4_text" else "halves",
        "tie_embeddings": config.get("tie_word_embeddings", False),
        **_rope(config, family, where),
    }
    if family in ("mistral", "mixtral"):
        data["sliding_window"] = config.get("sliding_window")
    if family == "mixtral":
        data["moe_args"] = {
            "num_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "hidden_dim": config["intermediate_size"],
            "aux_loss_coef": config.get("router_aux_loss_coef", 0.001),
        }
    if family == "llama4_text":
        data |= _llama4(config, where)
    return ModelArgs.from_dict(data)


def _rope(config: dict[str, Any], family: str, where: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Defaults of the config classes: only a file older than the field relies on them.
    default = {"llama4_text": 500000.0, "mixtral": 1e6}.get(family, 10000.0)
    theta = rope.get("rope_theta", config.get("rope_theta", default))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "llama3"), f"{where}: rope_type", kind, "accepted is default or llama3")
    if kind == "default":
        return {"rope_theta": theta}
    return {
        "rope_theta": theta,
        "use_scaled_rope": True,
        "rope_scaling_factor": rope["factor"],
        "rope_low_freq_factor": rope["low_freq_factor"],
        "rope_high_freq_factor": rope["high_freq_factor"],
        "rope_original_max_seq_len": rope["original_max_position_embeddings"],
    }


def _llama4(config: dict[str, Any], where: str) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    interval = config.get("no_rope_layer_interval", 4)
    # In this list 1 means rotary and 0 means none; empty or missing follows the interval.
    rotary = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    step = config.get("interleave_moe_layer_step", 1)
    moe_layers = config.get("moe_layers")
    expected = [i for i in range(layers) if (i + 1) % step == 0]
    require(moe_layers in (None, expected), f"{where}: moe_layers", moe_layers, f"accepted is {expected}")
    return {
        "hidden_dim": config["intermediate_size_mlp"],
        "attention_chunk_size": config["attention_chunk_size"],
        "layer_pattern": ["C" if is_rotary else "f" for is_rotary in rotary],
        "use_qk_norm": config.get("use_qk_norm", True),
        "attn_temperature_tuning": bool(config.get("attn_temperature_tuning", True)),
        "floor_scale": config.get("floor_scale", 8192),
        "attn_scale": config.get("attn_scale", 0.1),
        "moe_args": {
            "num_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "routing": "sigmoid",
            "hidden_dim": config["intermediate_size"],
            "shared_expert": True,
            "interleave_moe_layer_step": step,
            "aux_loss_coef": config.get("router_aux_loss_coef", 0.001),
        },
    }


def args_to_hf(args: ModelArgs) -> dict[str, Any]:
    """The Hugging Face config of a Llama, Mistral or Mixtral shape; any other shape is a `RequestError`."""
    family = _family(args)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_max_seq_len,
        }
    config: dict[str, Any] = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_size,
        "intermediate_size": args.dense_hidden_dim,
        "hidden_act": "silu",
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_embeddings,
        # Both spellings: the first is read by transformers 5, the other two by 4 and by most other tools.
        "rope_parameters": rope,
        "rope_theta": args.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if args.use_scaled_rope else None,
        "torch_dtype": "float32",
    }
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config["sliding_window"] = args.sliding_window
    if args.moe_args:
        config["intermediate_size"] = args.layers[0].moe.hidden_dim if args.layers[0].moe else None
        config["num_local_experts"] = args.moe_args.num_experts
        config["num_experts_per_tok"] = args.moe_args.top_k
        config["router_aux_loss_coef"] = args.moe_args.aux_loss_coef
    return config


def _family(args: ModelArgs) -> str:
    moe = args.moe_args
    plain = not args.use_qk_norm and set(args.pattern) <= {"F", "S"} and len(set(args.pattern)) == 1
    mixtral = moe and moe.routing == "softmax" and moe.normalize and not moe.shared_expert
    if not plain or (moe and not (mixtral and moe.interleave_moe_layer_step == 1)):
        raise RequestError(
            f"layers {args.pattern!r}: format hf accepts Llama, Mistral and Mixtral shapes; save as native"
        )
    if moe:
        return "mixtral"
    return "mistral" if args.sliding_window else "llama"

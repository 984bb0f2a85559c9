"""Mistral's `params.json` to `ModelArgs` and back: dense and mixture of experts. No torch.

Source: args.py, moe.py and transformer.py of mistralai/mistral-inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from transom.base.errors import RequestError, notice, require
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.hf_export import meaning
from transom.config.model_args import ModelArgs

_REQUIRED = (
    "dim",
    "n_layers",
    "head_dim",
    "hidden_dim",
    "n_heads",
    "n_kv_heads",
    "norm_eps",
    "vocab_size",
)
# Keys that change what is computed, in ways that this reader does not know.
_UNSUPPORTED = (
    *("yarn", "llama_4_scaling", "multimodal", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank"),
    *("cross_att_layers", "every_cross_att", "non_parametric_norm", "use_biases"),
)
_LENGTH = 128_000  # positions in the reference code's table


def args_from_mistral(params: Mapping[str, Any], where: str) -> ModelArgs:
    """The model a params.json describes; a missing key, or a feature we lack, is a
    `RequestError`.
    """
    config = ForeignConfig(params, where, {})
    quantized = config.get("quantization")
    if quantized:
        kind = (
            quantized.get("qformat_weight", quantized)
            if isinstance(quantized, Mapping)
            else quantized
        )
        raise RequestError(
            f"{where}: quantization: got {kind!r}; expected weights that are not quantized"
        )
    config.plain("model_type", "transformer")
    config.plain("activation", "silu")
    for key in _REQUIRED:
        require(
            config.get(key) is not None, f"{where}: {key}", None, "expected a whole params.json"
        )
    for key in _UNSUPPORTED:
        require(
            not config.get(key),
            f"{where}: {key}",
            config.get(key),
            "not supported; expected absent",
        )
    for key in (
        "max_batch_size",
        "lora",
        "vision_encoder",
        "dtype",
    ):  # adapters have files of their own
        config.get(key)
    fields = {
        **{key: config[key] for key in _REQUIRED},
        **_windows(config),
        "rope_theta": _theta(config),
        "rope_layout": "interleaved",
        "max_seq_len": config.get("max_position_embeddings")
        or config.get("max_seq_len")
        or _LENGTH,
        "tie_embeddings": config.get("tied_embeddings", False),
        "moe_args": _moe(config),
    }
    try:
        args = ModelArgs.from_dict(fields)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    config.say_unread()
    return args


def _windows(config: ForeignConfig) -> dict[str, Any]:
    """A number for all layers, or a list tiled over them in which null sees everything before."""
    window, spare = config.get("sliding_window"), config.get("_sliding_window")
    window = spare if window is None else window
    if not isinstance(window, list):
        return {"sliding_window": window}
    sizes = {size for size in window if size is not None}
    fits = len(sizes) <= 1 and bool(window)
    require(
        fits,
        f"{config.where}: sliding_window",
        window,
        "expected one size, and null where there is none",
    )
    if not sizes:
        return {}
    layers = config["n_layers"]
    tiled = (window * -(-layers // len(window)))[:layers]
    letters = ["F" if size is None else "S" for size in tiled]
    if "S" not in letters:
        return {}
    return {"sliding_window": sizes.pop(), **({"layer_pattern": letters} if "F" in letters else {})}


def _theta(config: ForeignConfig) -> Any:
    """The file's own, or what the reference code took when such files were released."""
    given = config.get("rope_theta")
    if given is not None:
        return given
    windowed = isinstance(config.get("sliding_window"), int)
    theta = 1e4 if windowed else 1e6  # with one window for all layers it is Mistral 7B v0.1
    notice(
        f"{config.where}: does not say: rope_theta is taken as {theta:g}, as for files "
        f"{_words(windowed)}"
    )
    return theta


def _words(windowed: bool) -> str:
    return "with a sliding_window" if windowed else "without a sliding_window"


def _moe(config: ForeignConfig) -> dict[str, Any] | None:
    moe = config.get("moe")
    if moe is None:
        return None
    config.check(isinstance(moe, Mapping), "moe", "expected num_experts and num_experts_per_tok")
    unknown = set(moe) - {"num_experts", "num_experts_per_tok"}
    both = len(moe) - len(unknown) == 2
    config.check(both and not unknown, "moe", "expected num_experts and num_experts_per_tok")
    return {
        "num_experts": moe["num_experts"],
        "top_k": moe["num_experts_per_tok"],
        "hidden_dim": config["hidden_dim"],
    }


def args_to_mistral(args: ModelArgs) -> dict[str, Any]:
    """The params.json that reads back as the same model with interleaved pairs; none is a
    `RequestError`.
    """
    moe = next((layer.moe for layer in args.layers if layer.moe is not None), None)
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "head_dim": args.head_size,
        "hidden_dim": args.dense_hidden_dim if moe is None else moe.hidden_dim,
        "n_heads": args.n_heads,
        "n_kv_heads": args.kv_heads,
        "norm_eps": args.norm_eps,
        "vocab_size": args.vocab_size,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
    }
    if args.sliding_window is not None:
        sizes = [args.sliding_window if letter == "S" else None for letter in args.pattern]
        params["sliding_window"] = sizes if None in sizes else args.sliding_window
    if moe is not None:
        params["moe"] = {"num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
    same = False
    with contextlib.suppress(RequestError):
        same = meaning(args_from_mistral(params, "params.json")) == meaning(args)
    if not same:
        raise RequestError(
            "format mistral accepts the shapes of Mistral and Mixtral; save as hf or native"
        )
    return params

"""Mistral's `params.json` to `ModelArgs` and back, and the names in its weights: dense and with
experts. No torch.

Source: args.py, moe.py and transformer.py of mistralai/mistral-inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.base.errors import notice, require
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.meta_params import SHARED_NAMES
from transom.checkpoints.families.same_model import reads_back
from transom.checkpoints.families.weights import WeightNames
from transom.config.model_args import ModelArgs
from transom.names.tables import MISTRAL_EXPERTS

MISTRAL_NAMES = WeightNames(
    (*SHARED_NAMES, *MISTRAL_EXPERTS),
    unread=(
        (r"rope\.freqs", "tables of rotary frequencies, which are computed here"),
        (
            r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..*",
            "the image encoder, which is not read: text only",
        ),
    ),
    reference_code=True,
)
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
    """Return the model that a params.json describes.

    Raises:
        RequestError: a key is missing, a value is not supported, or the weights are quantized.
    """
    config = ForeignConfig(params, where, {})
    config.refuse_quantized("quantization", "qformat_weight")
    config.expect("model_type", "transformer")
    config.expect("activation", "silu")
    for key in _REQUIRED:
        config.check(config.get(key) is not None, key, "expected a value")
    for key in _UNSUPPORTED:
        config.check(not config.get(key), key, "expected none, as this is not supported")
    # Adapters have files of their own.
    for key in ("max_batch_size", "lora", "vision_encoder", "dtype"):
        config.get(key)
    args = config.model(_fields, "params.json of Mistral's")
    config.print_notes()
    return args


def _fields(config: ForeignConfig) -> dict[str, Any]:
    return {
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


def _windows(config: ForeignConfig) -> dict[str, Any]:
    """Return the window: a number for all layers, or a list tiled over them in which null means
    no window.
    """
    window = config.get("sliding_window", config.get("_sliding_window"))
    if not isinstance(window, list):
        return {"sliding_window": window}
    sizes = {size for size in window if size is not None}
    fits = len(sizes) <= 1 and bool(window)
    require(
        fits,
        f"{config.where}: sliding_window",
        window,
        "expected one size, and null for layers without",
    )
    layers = config["n_layers"]
    letters = [
        "F" if size is None else "S" for size in (window * -(-layers // len(window)))[:layers]
    ]
    if "S" not in letters:
        return {}
    return {"sliding_window": sizes.pop(), **({"layer_pattern": letters} if "F" in letters else {})}


def _theta(config: ForeignConfig) -> Any:
    """Return the value of the file, or that of the reference code when such files were released."""
    theta = config.get("rope_theta")
    if theta is None:
        # With one window for all layers it is Mistral 7B v0.1.
        theta = 1e4 if isinstance(config.get("sliding_window"), int) else 1e6
        notice(f"{config.where}: values that the file does not state: rope_theta = {theta:g}")
    return theta


def _moe(config: ForeignConfig) -> dict[str, Any] | None:
    moe = config.get("moe")
    if moe is None:
        return None
    known = isinstance(moe, Mapping) and set(moe) == {"num_experts", "num_experts_per_tok"}
    config.check(known, "moe", "expected num_experts and num_experts_per_tok")
    return {
        "num_experts": moe["num_experts"],
        "top_k": moe["num_experts_per_tok"],
        "hidden_dim": config["hidden_dim"],
    }


def args_to_mistral(args: ModelArgs) -> dict[str, Any]:
    """Return the params.json that reads back as the same model, whose rotary pairs are interleaved.

    Raises:
        RequestError: the format cannot express the model.
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
    same = reads_back(args, lambda: args_from_mistral(params, "params.json"))
    require(
        same,
        "format",
        "mistral",
        "expected hf or native: mistral has the shapes of Mistral and Mixtral",
    )
    return params

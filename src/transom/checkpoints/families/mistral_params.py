"""Mistral's `params.json` to `ModelArgs` and back, and the names in its weights: dense and with
experts. No torch.

Source: args.py, moe.py and transformer.py of mistralai/mistral-inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.base.errors import expect
from transom.checkpoints.families.family import (
    Family,
    Fields,
    Keys,
    Option,
    copied,
    fixed,
    only,
    redundant,
    refused,
    resolved_experts,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.meta_params import SHARED_NAMES
from transom.checkpoints.families.options import window_fields
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
_LENGTH = 128_000  # positions in the reference code's table


def args_from_mistral(params: Mapping[str, Any], where: str) -> ModelArgs:
    """Return the model that a params.json describes.

    Raises:
        RequestError: a key is missing, a value is not supported, or the weights are quantized.
    """
    # With one window for all layers it is Mistral 7B v0.1. The values are those that the reference
    # code had when such files were released.
    theta = 1e4 if isinstance(params.get("sliding_window"), int) else 1e6
    config = ForeignConfig(params, where, {"rope_theta": theta})
    config.refuse_quantized("quantization", "qformat_weight")
    args = MISTRAL_PARAMS.args_from(config)
    config.print_notes()
    return args


def _read(config: ForeignConfig) -> Fields:
    length = config.get("max_position_embeddings") or config.get("max_seq_len")
    return {
        "rope_theta": config.assumed("rope_theta"),
        "max_seq_len": length or _LENGTH,
        "tie_embeddings": config.get("tied_embeddings", False),
        **_windows(config),
        **_experts(config),
    }


def _windows(config: ForeignConfig) -> Fields:
    """Return the window: a number for all layers, or a list tiled over them in which null means
    no window.
    """
    window = config.get("sliding_window", config.get("_sliding_window"))
    if not isinstance(window, list):
        return {"sliding_window": window}
    sizes = {size for size in window if size is not None}
    field = f"{config.where}: sliding_window"
    expected = "one size, and null for layers without"
    expect(len(sizes) <= 1 and bool(window), field, window, expected)
    letters = ["F" if window[i % len(window)] is None else "S" for i in range(config["n_layers"])]
    return window_fields(letters, next(iter(sizes), None))


def _experts(config: ForeignConfig) -> Fields:
    moe = config.get("moe")
    if moe is None:
        return {}
    known = isinstance(moe, Mapping) and set(moe) == {"num_experts", "num_experts_per_tok"}
    config.check(known, "moe", "num_experts and num_experts_per_tok")
    return {
        "moe_args.num_experts": moe["num_experts"],
        "moe_args.top_k": moe["num_experts_per_tok"],
        "moe_args.hidden_dim": config["hidden_dim"],
    }


def _write(args: ModelArgs) -> Keys:
    out: Keys = {
        "head_dim": args.head_size,
        "hidden_dim": args.dense_hidden_dim,
        "n_kv_heads": args.kv_heads,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
    }
    if args.sliding_window is not None:
        sizes = [args.sliding_window if letter == "S" else None for letter in args.pattern]
        out["sliding_window"] = sizes if None in sizes else args.sliding_window
    if args.moe_args is not None:
        moe = resolved_experts(args)
        out["moe"] = {"num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
        out["hidden_dim"] = moe.hidden_dim
    return out


# Keys that change what is computed, in ways that this reader does not know.
_UNSUPPORTED = (
    *("yarn", "llama_4_scaling", "multimodal", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank"),
    *("cross_att_layers", "every_cross_att", "non_parametric_norm", "use_biases"),
)
_SAME = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps")
MISTRAL_PARAMS = Family(
    "params_mistral",
    "",
    MISTRAL_NAMES,
    (
        only(model_type="transformer", activation="silu"),
        refused(**dict.fromkeys(_UNSUPPORTED, "this is not supported")),
        redundant("max_batch_size", "lora", "vision_encoder", "dtype"),  # adapters have own files
        fixed(rope_layout="interleaved"),
        copied(**{key: key for key in (*_SAME, "vocab_size")}),
        Option(_read, _write),
    ),
)

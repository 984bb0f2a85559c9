"""The metadata of a GGUF file as the content of a Hugging Face `config.json`. No torch.

Sources: `gguf.md` of ggml, the converters of llama.cpp (`conversion/`) for what they write, and
`src/llama-model.cpp` for what llama.cpp takes where a key is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transom.base.errors import RequestError, expect, notice
from transom.checkpoints.gguf.reader import GgufModel

# Keys after the name of the architecture, and those of config.json. `?` marks keys that need not
# be there.
_SHAPE = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv?": "num_key_value_heads",
    "attention.key_length?": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base?": "rope_theta",
}
_EXPERTS = {"expert_used_count": "num_experts_per_tok"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFT_CAP = {"final_logit_softcapping?": "final_logit_softcapping"}
# Keys whose values may be fractions. All others are whole numbers.
FRACTIONS = (
    *("_epsilon", "freq_base", "freq_base_swa", "softcapping"),
    *("factor", "scale_linear", "_fast", "_slow"),
)
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as in all published models
_LLAMA3_LENGTH = 8192
_LENGTH = {"original_context_length": "original_max_position_embeddings"}
# Keys of a scaling of rotary frequencies after `rope.scaling.`, by its kind.
SCALING: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        **_LENGTH,
    },
    "longrope": {"attn_factor": "attention_factor", **_LENGTH},
    "llama3": _LENGTH,
}
# Keys that change no number of the model, or that repeat what others state.
_HARMLESS = (
    *("attention.value_length", "rope.scaling.finetuned", "vocab_size"),
    *("expert_count", "expert_feed_forward_length", "expert_used_count", "tensor_data_layout"),
    "rope.scaling.type",
)
_LORA, _PROJECTOR = "a LoRA adapter", "the image or audio encoder of a model (mmproj)"


@dataclass(frozen=True)
class Architecture:
    """How the files of one architecture of llama.cpp become a config.

    Attributes:
        model_type: That of transformers.
        keys: Keys beyond `_SHAPE`.
        fixed: What no key states.
        interleaved: Whether the rows of queries and keys are in Meta's order, pair by pair.
        norms_plus_one: Whether 1 has been added to the weights of norms.
        wide: The number of layers of the model whose scores are scaled by the width of the model
            per head, and not by that of a head.
    """

    model_type: str
    keys: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    norms_plus_one: bool = False
    wide: int | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {
            **_EXPERTS,
            "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {"norm_topk_prob": True},
    ),
    "gemma2": Architecture(
        "gemma2",
        {**_WINDOW, **_SOFT_CAP, "attn_logit_softcapping": "attn_logit_softcapping"},
        norms_plus_one=True,
        wide=46,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {
            **_SOFT_CAP,
            "attention.sliding_window?": "sliding_window",
            "rope.freq_base_swa?": "rope_local_base_freq",
        },
        norms_plus_one=True,
        wide=62,
    ),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", {"attention.sliding_window?": "sliding_window"}),
    "gpt-oss": Architecture(
        "gpt_oss",
        {
            **_EXPERTS,
            **_WINDOW,
            "expert_count": "num_local_experts",
            "expert_feed_forward_length": "intermediate_size",
        },
    ),
}
# Llama with experts, and with a window: the architecture of the file is llama too.
OF_LLAMA = {"mixtral": {**_EXPERTS, "expert_count": "num_local_experts"}, "mistral": _WINDOW}


def architecture(model: GgufModel) -> Architecture:
    """Return the architecture of a file.

    Raises:
        RequestError: The file is no model, or of an architecture that does not open.
    """
    name, kind = model.metadata.get("general.architecture"), model.metadata.get("general.type")
    where = f"{model.files[0]}"
    for other, words in (("adapter", _LORA), ("mmproj", _PROJECTOR), ("imatrix", "an imatrix")):
        if other == kind or (other == "mmproj" and name == "clip"):
            raise RequestError(f"{where}: got {words}; expected a language model")
    known = isinstance(name, str) and name in ARCHITECTURES
    expect(known, f"{where}: general.architecture", name, ", ".join(ARCHITECTURES))
    return ARCHITECTURES[str(name)]


def config_of(model: GgufModel) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        RequestError: The architecture does not open, or a key is missing or has a wrong value.
    """
    kind = architecture(model)
    values = _Values(model)
    config: dict[str, Any] = {"model_type": kind.model_type}
    if kind.model_type == "llama" and values.get("expert_count"):
        config["model_type"] = "mixtral"
    elif kind.model_type == "llama" and values.get("attention.sliding_window"):
        config["model_type"] = "mistral"
    for key, name in keys_of(kind, config["model_type"]).items():
        value = values.get(key.rstrip("?"))
        if value is None and not key.endswith("?"):
            raise RequestError(f"{values.where}{key}: missing; expected a number")
        if value is not None:
            config[name] = value
    blocks, most = config["num_hidden_layers"], len(model.tensors)
    expected = f"at most {most:,}, the number of tensors"
    expect(blocks <= most, f"{values.where}block_count", blocks, expected)
    if "token_embd.weight" not in model.tensors:
        raise RequestError(f"{model.files[0]}: token_embd.weight: missing; expected a tensor")
    config |= {
        "vocab_size": model.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "attention_bias": "blk.0.attn_output.bias" in model.tensors,
        "rope_scaling": _rope_scaling(values),
        **kind.fixed,
    }
    config |= _special(kind, values, config)
    values.note_unread()
    return config


def keys_of(kind: Architecture, model_type: str) -> dict[str, str]:
    """Return the keys of an architecture, and their names in the config of a model type."""
    return _SHAPE | kind.keys | OF_LLAMA.get(model_type, {})


class _Values:
    """The values of metadata after the name of the architecture."""

    def __init__(self, model: GgufModel) -> None:
        self.model, self.name = model, model.metadata["general.architecture"]
        self.where = f"{model.files[0]}: {self.name}."
        self.read = set(_HARMLESS)

    def get(self, key: str) -> Any:
        """Return a number, or None if it is missing.

        A list, which some files have with one number per layer, must have one number throughout.
        """
        self.read.add(key)
        value = self.model.metadata.get(f"{self.name}.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        fraction = key.endswith(FRACTIONS)
        fits = type(value) is int or (fraction and type(value) is float and math.isfinite(value))
        kind = "number" if fraction else "whole number"
        expected = f"a {kind} of at least 0, the same in all layers"
        expect(value is None or (fits and value >= 0), f"{self.where}{key}", value, expected)
        # The shortest decimal number that rounds to the float32 of the file, such as 1e-6.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def note_unread(self) -> None:
        """Print the keys of the architecture that were not read."""
        prefix = f"{self.name}."
        own = {key[len(prefix) :] for key in self.model.metadata if key.startswith(prefix)}
        if own - self.read:
            unread = ", ".join(prefix + key for key in sorted(own - self.read))
            notice(f"{self.model.files[0]}: keys that are not read: {unread}")


def _rope_scaling(values: _Values) -> dict[str, Any] | None:
    """Return the rotary settings, from metadata or from the factors that are stored as tensors."""
    kind = values.model.metadata.get(f"{values.name}.rope.scaling.type", "linear")
    factors = {
        f"{name}_factor": values.model.numbers(f"rope_factors_{name}.weight")
        for name in ("short", "long")
        if f"rope_factors_{name}.weight" in values.model.tensors
    }
    if "rope_freqs.weight" in values.model.tensors:
        return _llama3(values)
    kind = "longrope" if factors else kind
    where, expected = f"{values.where}rope.scaling.type", f"none, {', '.join(SCALING)}"
    expect(kind == "none" or kind in SCALING, where, kind, expected)
    keys = SCALING.get(kind, {})
    stated = {ours: values.get(f"rope.scaling.{theirs}") for theirs, ours in keys.items()}
    if kind == "linear" and not stated["factor"]:
        # The key of 2023. Without a factor llama.cpp does not scale either.
        stated["factor"] = values.get("rope.scale_linear")
        kind = kind if stated["factor"] else "none"
    return None if kind == "none" else {"rope_type": kind, **stated, **factors}


def _llama3(values: _Values) -> dict[str, Any]:
    """Return the scaling whose divisors of frequencies are the tensor `rope_freqs`.

    The settings that they were made of are not stored. If those of Llama 3 make other divisors,
    the divisors themselves become the settings, as those of `longrope`.
    """
    factors = values.model.numbers("rope_freqs.weight")
    original = values.get("rope.scaling.original_context_length") or _LLAMA3_LENGTH
    theta, largest = values.get("rope.freq_base") or 1e4, max(factors)
    expected = llama3_divisors(theta, len(factors), original, largest)
    if all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(factors, expected, strict=True)):
        lengths = {"original_max_position_embeddings": original}
        return {"rope_type": "llama3", "factor": largest, **_LLAMA3, **lengths}
    alike = {"short_factor": factors, "long_factor": factors}
    lengths = {"original_max_position_embeddings": values.get("context_length")}
    return {"rope_type": "longrope", "attention_factor": 1.0, **alike, **lengths}


def llama3_divisors(theta: float, count: int, original: int, factor: float) -> list[float]:
    """Return what the scaling of Llama 3 divides each of `count` rotary frequencies by."""
    low, high = _LLAMA3.values()
    turns = (original / (2 * math.pi * theta ** (index / count)) for index in range(count))
    smooth = (min(max((one - low) / (high - low), 0.0), 1.0) for one in turns)
    return [1 / ((1 - one) / factor + one) for one in smooth]


def _special(kind: Architecture, values: _Values, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that follow from others in one family."""
    heads, rope = config["num_attention_heads"], config["rope_scaling"] or {}
    expect(heads > 0, f"{values.where}attention.head_count", heads, "1 or more")
    share, rotary = config["hidden_size"] // heads, values.get("rope.dimension_count")
    head = config.get("head_dim", share)
    if config["model_type"] != "phi3":
        where = f"{values.where}rope.dimension_count"
        expect(rotary in (None, head), where, rotary, f"{head}, the size of a head")
    match config["model_type"]:
        case "llama":
            return {"mlp_bias": "blk.0.ffn_up.bias" in values.model.tensors}
        case "gemma2" | "gemma3_text":
            scaled = share if config["num_hidden_layers"] == kind.wide else head
            pattern = {} if "sliding_window" in config else {"sliding_window_pattern": 1}
            return {"query_pre_attn_scalar": scaled, "head_dim": head, **pattern}
        case "phi3":
            name, window = "original_max_position_embeddings", config.get("sliding_window")
            out = {"partial_rotary_factor": rotary / share} if rotary else {}
            return {"sliding_window": window or None, name: rope.get(name), **out}
        case "gpt_oss":  # the converter does not write that the bounds of YaRN are not rounded
            return {"rope_scaling": {**rope, "truncate": False}}
    return {}

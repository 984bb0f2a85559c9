"""The arguments of a model as the metadata of a GGUF file: the opposite of `config.py`.

What a file states is read back and compared with the model before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transom.base.errors import RequestError, expect
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.registry import FAMILIES, WEIGHT_NAMES
from transom.checkpoints.families.same_model import same_model
from transom.checkpoints.gguf.config import (
    ARCHITECTURES,
    FRACTIONS,
    OF_LLAMA,
    SCALING,
    config_of,
    keys_of,
    llama3_divisors,
)
from transom.checkpoints.gguf.reader import GgufModel, StoredTensor
from transom.config.model_args import ModelArgs
from transom.layers.rope import attention_factor

_NAMES = {kind.model_type: name for name, kind in ARCHITECTURES.items()}
_NAMES |= dict.fromkeys(OF_LLAMA, "llama")


def model_metadata(args: ModelArgs, parameters: Collection[str]) -> GgufModel:
    """Return the metadata of a model, its rotary factors, and the names of its tensors.

    Args:
        args: The arguments of the model.
        parameters: The names of its parameters.

    Raises:
        RequestError: llama.cpp has no such architecture, or its files can't state an argument.
    """
    scaling = args.scaling
    if scaling is not None and scaling.kind == "longrope":
        scaling = replace(scaling, attention_factor=attention_factor(scaling))
        args = replace(args, rope_scaling=scaling)
    for family in FAMILIES.values():
        name, config = _NAMES.get(family.model_type), family.config_of(args)
        if name is not None and config is not None:
            found = _planned(name, args, config, parameters)
            _check(found, config)
            return found
    families = ", ".join(_NAMES)
    raise RequestError(f"format: got 'gguf'; expected hf or native, or a model of {families}")


def _planned(
    name: str, args: ModelArgs, config: Mapping[str, Any], parameters: Collection[str]
) -> GgufModel:
    """Return a file of the architecture `name` that is not written yet."""
    rope: Mapping[str, Any] = config["rope_scaling"] or {}
    kind = rope.get("rope_type", "")
    factors: dict[str, list[float]] = {}
    if kind == "longrope":
        factors = {f"rope_factors_{one}.weight": rope[f"{one}_factor"] for one in ("short", "long")}
    elif kind == "llama3":
        count, original = args.rotary_dim // 2, rope["original_max_position_embeddings"]
        numbers = llama3_divisors(args.rope_theta, count, original, rope["factor"])
        factors = {"rope_freqs.weight": numbers}
    keys = keys_of(ARCHITECTURES[name], config["model_type"])
    out = {
        "vocab_size": args.vocab_size,
        "rope.dimension_count": args.rotary_dim,
        "attention.value_length": args.head_size,
        "rope.scaling.type": None if kind in ("", "llama3") else kind,
        **{key.rstrip("?"): config.get(ours) for key, ours in keys.items()},
        **{f"rope.scaling.{key}": rope.get(ours) for key, ours in SCALING.get(kind, {}).items()},
    }
    values = {
        f"{name}.{key}": float(value) if key.endswith(FRACTIONS) else value
        for key, value in out.items()
        if value is not None
    }
    mappings = WEIGHT_NAMES[f"gguf_{name}"].mappings(args, parameters)
    names = [key for mapping in mappings for key in mapping.foreign]
    somewhere = StoredTensor(0, "F32", (args.vocab_size,), 0, 0)
    tensors = dict.fromkeys((*names, *factors), somewhere)
    return GgufModel([Path("GGUF")], {"general.architecture": name, **values}, tensors, factors)


def _check(found: GgufModel, config: Mapping[str, Any]) -> None:
    """Raise `RequestError` unless metadata reads back as the model of a config."""
    mine, again = (_args(one) for one in (config, config_of(found)))
    own, read = mine.to_dict(), again.to_dict()
    lost = [f"{key} = {one!r}" for key, one in own.items() if one != read[key]]
    expected = f"hf or native, as GGUF can't state {', '.join(lost)}"
    expect(same_model(mine, again), "format", "gguf", expected)


def _args(config: Mapping[str, Any]) -> ModelArgs:
    """Return the model of a config whose fractions have float32 precision, as in GGUF files."""
    rounded = json.loads(json.dumps(config), parse_float=lambda one: float(str(np.float32(one))))
    family = FAMILIES[rounded["model_type"]]
    return family.args_from(ForeignConfig(rounded, "GGUF", family.defaults))

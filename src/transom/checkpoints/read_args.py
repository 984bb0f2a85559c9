"""Read the model arguments of a folder of any format."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, expect, notice
from transom.base.files import (
    gguf_pointer,
    read_json,
    refuse_infinite,
    safetensors_header,
    shown_name,
)
from transom.checkpoints.adapters.peft_config import trained_vocabulary
from transom.checkpoints.families.hf import args_from_hf
from transom.checkpoints.families.meta_params import args_from_meta, needs_vocabulary
from transom.checkpoints.families.mistral_params import args_from_mistral
from transom.checkpoints.files.layout import (
    CONFIG,
    PARAMS,
    WEIGHTS,
    consolidated_files,
    find_weights,
    folder_format,
    is_model,
    read_params,
)
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.files.pooling import POOLING
from transom.checkpoints.quantized.config import KEY as QUANTIZATION
from transom.config.layer_args import BASE_HEAD
from transom.config.model_args import ModelArgs


def read_args(folder: Path) -> ModelArgs:
    """Return the model arguments of a folder; print a notice if it has two configs.

    Raises:
        RequestError: There is no config, or it describes a model that is not supported.
    """
    kind = folder_format(folder)
    if (folder / CONFIG).exists() and (folder / PARAMS).exists():
        read, other = (CONFIG, PARAMS) if kind in ("native", "hf") else (PARAMS, CONFIG)
        notice(f"{folder}: two configs; {read} is read, {other} is ignored")
    if kind == "mistral":
        return args_from_mistral(read_params(folder), str(folder / PARAMS))
    if kind == "meta":
        return _read_meta(folder)
    path = folder / CONFIG
    config = read_json(path)
    if kind == "hf":
        pointer = gguf_pointer(folder)
        if pointer:
            args = args_from_hf(config, shown_name(folder))
            return replace(args, rope_layout=pointer["rope_layout"])
        return _without_head(folder, config, args_from_hf(config, str(path)))
    refuse_infinite(config, str(path))
    unlike = ("model_type", "architectures", QUANTIZATION)
    own = {key: config[key] for key in config if key not in unlike}
    return ModelArgs.from_dict(own)


def _read_meta(folder: Path) -> ModelArgs:
    params, vocab_size, where = read_params(folder), -1, str(folder / PARAMS)
    if needs_vocabulary(params):
        from transom.checkpoints.files.consolidated import vocabulary_of  # imports torch

        dim = params.get("dim", 0)
        complete = isinstance(dim, int) and dim > 0
        expect(complete, f"{where}: dim", params.get("dim"), "a complete params.json")
        vocab_size = vocabulary_of(folder, dim)
    return args_from_meta(params, where, vocab_size)


def _without_head(folder: Path, config: Mapping[str, Any], args: ModelArgs) -> ModelArgs:
    """Return `args` without an output matrix if the folder is that of a base model alone.

    Such a folder names the class of a base model (`LlamaModel`), or states how to pool tokens. In
    any other folder a missing matrix means a damaged checkpoint, which reading the weights refuses.
    """
    classes = config.get("architectures") or []
    of_base = bool(classes) and all(str(name).endswith("Model") for name in classes)
    if args.tie_embeddings or not (of_base or (folder / POOLING).exists()):
        return args
    keys: set[str] = set()
    with contextlib.suppress(RequestError):  # reading the weights reports what is wrong with them
        for file in find_weights(folder, WEIGHTS, config).files:
            keys |= (safetensors_header(folder / file) or {}).keys()
    if any(key.endswith("lm_head.weight") for key in keys):
        return args
    notice(
        f"{folder}: a base model without lm_head.weight: it gives embeddings and cannot generate"
    )
    return replace(args, head=BASE_HEAD)


def lacks_vocabulary(folder: Path) -> bool:
    """Return whether the vocabulary size is only in weights that are not there.

    `read_args` fails for such a folder.
    """
    if (folder / CONFIG).exists() or not (folder / PARAMS).exists() or consolidated_files(folder):
        return False
    return needs_vocabulary(read_params(folder))


def vocabulary_size(location: ModelLocation) -> int | None:
    """Return the number of rows of a model's embeddings, or None if nothing states it.

    An adapter's own embeddings come first, then the config, also of a model that is not supported,
    then the weights or the defaults of the config's class.
    """
    own = None if location.adapter is None else trained_vocabulary(location.adapter)
    stated = own or _stated_vocabulary(location.model)
    if stated is not None or not is_model(location.model) or lacks_vocabulary(location.model):
        return stated
    with contextlib.suppress(RequestError):  # a tokenizer opens beside a model that does not
        return read_args(location.model).vocab_size
    return None


def _stated_vocabulary(folder: Path) -> int | None:
    if not (folder / CONFIG).exists() and not (folder / PARAMS).exists():
        return None
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else read_params(folder)
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) and size > 0 else None

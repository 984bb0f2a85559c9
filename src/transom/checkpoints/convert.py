"""One folder format into another, tensor by tensor from memory map to file: no model is built.

Only an adapter takes one, since it is merged into its base on the way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json, write_text
from transom.base.runtime import DTYPES
from transom.checkpoints.files.checksums import verify_step
from transom.checkpoints.files.companions import TEMPLATE_FILES, TOKENIZER_FILES, copy_companions
from transom.checkpoints.files.generation_config import (
    GENERATION,
    ids_of,
    stated_settings,
    stop_tokens_of,
    write_settings,
)
from transom.checkpoints.files.layout import CONFIG, Format, folder_format
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.files.staging import staged
from transom.checkpoints.load import count_nonfinite, load, warn_nonfinite
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import plan_layout
from transom.checkpoints.state import open_parameters
from transom.config.model_args import ModelArgs
from transom.lora.adapters import plain_weights
from transom.lora.merge import fold_adapters
from transom.tokenizers.tokenizer import Tokenizer

_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template"


@dataclass(frozen=True)
class Converted:
    """What was done: what was read, formats, parameters, and bytes of weights written."""

    source: ModelLocation
    source_format: Format
    format: Format
    parameters: int
    bytes: int
    companions: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    format: Format = "hf",
    dtype: str | None = None,
    max_shard_size: str | None = None,
    revision: str | None = None,
) -> Converted:
    """Write the model of a folder or hub id, an adapter merged into its base, into `out`, which
    must be another.
    """
    require(dtype is None or dtype in DTYPES, "dtype", dtype, f"expected {', '.join(DTYPES)}")
    found = find_model(source, revision)
    if Path(out).resolve() in (folder.resolve() for folder in found.folders):
        raise RequestError(f"{out}: is the folder that is read; expected another one")
    args, state = open_merged(found, dtype)
    kind = folder_format(found.model)
    counts: dict[str, int] = {}
    ours = {name: _counted(name, stored, counts) for name, stored in state.items()}
    layout = plan_layout(args, ours, format, dtype, max_shard_size)
    if format == "hf":
        layout.config.update(config_ids(found))
    with staged(Path(out)) as folder:
        layout.write(folder)
        companions = carry_companions(found, folder)
    warn_nonfinite(counts, str(found))
    if format == "hf" and "tokenizer.model" in companions and "tokenizer.json" not in companions:
        notice(
            f"{out}: tokenizer.model goes along as it is; there is no tokenizer.json, which many "
            f"tools ask for"
        )
    size = sum(line.nbytes for batch in layout.batches for line in batch.metas)
    parameters = sum(torch.Size(stored.shape).numel() for stored in state.values())
    return Converted(found, kind, format, parameters, size, tuple(companions))


def open_merged(found: ModelLocation, dtype: str | None = None) -> tuple[ModelArgs, LazyTensors]:
    """Arguments and parameters of what a name stands for; those of an adapter's base are what both
    multiply by.

    Without an adapter they are still in their files. One that is merged takes the whole model into
    memory, in float32 or better where the caller will cast to a `dtype`, so that the sum is rounded
    once.
    """
    if found.adapter is not None:
        wide = None if dtype is None else "float64" if dtype == "float64" else "float32"
        model = fold_adapters(load(found, dtype=wide))
        return model.args, {
            name: LazyTensor.of(parameter.detach())
            for name, parameter in plain_weights(model).items()
        }
    verify_step(found.model)
    args = read_args(found.model)
    return args, open_parameters(found.model, args)


def config_ids(found: ModelLocation) -> dict[str, Any]:
    """Return the ids for the config of the result: the base's own, or those of its other files."""
    own = read_json(found.model / CONFIG) if folder_format(found.model) == "hf" else {}
    return {**ids_of(stated_settings(found.folders)), **ids_of(own)}


def _counted(name: str, stored: LazyTensor, counts: dict[str, int]) -> LazyTensor:
    """The same tensor, whose bad numbers are counted when it is read."""

    def read() -> Tensor:
        tensor = stored.read()
        counts[name] = count_nonfinite(tensor)
        return tensor

    reader: Callable[[], Tensor] = read
    return LazyTensor(stored.shape, stored.dtype, reader)


def carry_companions(found: ModelLocation, out: Path) -> list[str]:
    """Copy the files beside the weights, the adapter's own first; return their names.

    Parts of two tokenizers, or templates of two folders, are never mixed. Generation settings of a
    config.json are written to a file of their own, since the config of the result may have no place
    for them.
    """
    names = copy_companions(found.model, out)
    if found.adapter is not None:
        names += copy_companions(found.adapter, out)
        _keep_together(found, out, set(names))
    settings = stated_settings(found.folders)
    if found.adapter == found.tokenizer and settings.get("eos_token_id") is not None:
        ends = list(stop_tokens_of(found, Tokenizer.load(found.tokenizer)))
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if settings and settings != (
        read_json(out / GENERATION) if (out / GENERATION).exists() else {}
    ):
        write_settings(out, settings)
        names.append(GENERATION)
    return sorted(name for name in set(names) if (out / name).exists())


def _keep_together(found: ModelLocation, out: Path, names: Iterable[str]) -> None:
    """Of all copied files, keep the parts of one tokenizer and the templates of one folder."""
    assert found.adapter is not None, "one folder alone has no two tokenizers"
    words, templates = found.tokenizer, next(filter(_has_template, found.folders), found.model)
    for name in sorted(names):
        of_words = any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)
        of_templates = any(fnmatch(name, pattern) for pattern in TEMPLATE_FILES)
        source = words if of_words else templates if of_templates else None
        if source is not None and (source / name).exists():
            shutil.copyfile(source / name, out / name)
        elif source is not None:
            (out / name).unlink()
    if templates != words and (out / _SETTINGS).exists():
        settings = read_json(out / _SETTINGS)
        settings.pop(_TEMPLATE, None)
        if _in_settings(templates):
            settings[_TEMPLATE] = read_json(templates / _SETTINGS)[_TEMPLATE]
        write_text(out / _SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False))


def _has_template(folder: Path) -> bool:
    return _in_settings(folder) or any(any(folder.glob(name)) for name in TEMPLATE_FILES)


def _in_settings(folder: Path) -> bool:
    """Whether a chat template stands in tokenizer_config.json."""
    return (folder / _SETTINGS).exists() and bool(read_json(folder / _SETTINGS).get(_TEMPLATE))

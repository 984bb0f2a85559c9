"""One folder format into another, tensor by tensor from memory map to file: no model is built.

Only an adapter takes one, since it is merged into its base on the way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from transom.adapt.lora import plain_weights
from transom.adapt.merge import fold_adapters
from transom.args import ModelArgs
from transom.checkpoints.folders import (
    CONFIG,
    TOKENIZERS,
    Format,
    Found,
    find_model,
    folder_format,
    read_args,
    read_json,
    verify_step,
)
from transom.checkpoints.load import bad_numbers, load, open_state, outline, say_bad_numbers, shapes_of
from transom.checkpoints.safetensors_files import write_text
from transom.checkpoints.save import copy_companions, plan_layout
from transom.checkpoints.staging import staged
from transom.checkpoints.stored import Source, Stored
from transom.errors import RequestError, notice, require
from transom.runtime import DTYPES

CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a Hugging Face config, for tools that look there
_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template"
_TEMPLATES = (f"{_TEMPLATE}.jinja", f"{_TEMPLATE}.json")
_VOCABULARY = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Converted:
    """What was done: what was read, formats, parameters, and bytes of weights written."""

    source: Found
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
    """Write the model of a folder or hub id, an adapter merged into its base, into `out`, which must be another."""
    require(dtype is None or dtype in DTYPES, "dtype", dtype, f"accepted is {', '.join(DTYPES)}")
    found = find_model(source, revision)
    if Path(out).resolve() in (folder.resolve() for folder in found.folders):
        raise RequestError(f"{out}: is the folder that is read; accepted is another one")
    args, state = open_model(found, dtype)
    kind = folder_format(found.model)
    counts: dict[str, int] = {}
    ours = {name: _counted(name, stored, counts) for name, stored in state.items()}
    layout = plan_layout(args, ours, format, dtype, max_shard_size)
    if format == kind == "hf":
        config = read_json(found.model / CONFIG)
        layout.config.update({key: config[key] for key in CARRIED if key in config})
    with staged(Path(out)) as folder:
        layout.write(folder)
        companions = carry_companions(found, folder)
    say_bad_numbers(counts, str(found))
    if format == "hf" and "tokenizer.model" in companions and "tokenizer.json" not in companions:
        notice(f"{out}: tokenizer.model goes along as it is; there is no tokenizer.json, which many tools ask for")
    size = sum(line.nbytes for batch in layout.batches for line in batch.outlines)
    parameters = sum(torch.Size(stored.shape).numel() for stored in state.values())
    return Converted(found, kind, format, parameters, size, tuple(companions))


def open_model(found: Found, dtype: str | None = None) -> tuple[ModelArgs, Source]:
    """Arguments and parameters of what a name stands for; those of an adapter's base are what both multiply by.

    Without an adapter they are still in their files. One that is merged takes the whole model into memory, in
    float32 or better where the caller will cast to a `dtype`, so that the sum is rounded once.
    """
    if found.adapter is not None:
        wide = None if dtype is None else "float64" if dtype == "float64" else "float32"
        model = fold_adapters(load(found, dtype=wide))
        return model.args, {name: Stored.of(parameter.detach()) for name, parameter in plain_weights(model).items()}
    verify_step(found.model)
    args = read_args(found.model)
    return args, open_state(found.model, args, shapes_of(outline(args)))


def _counted(name: str, stored: Stored, counts: dict[str, int]) -> Stored:
    """The same tensor, whose bad numbers are counted when it is read."""

    def read() -> Tensor:
        tensor = stored.read()
        counts[name] = bad_numbers(tensor)
        return tensor

    reader: Callable[[], Tensor] = read
    return Stored(stored.shape, stored.dtype, reader)


def carry_companions(found: Found, out: Path) -> list[str]:
    """What goes along with the weights: the adapter's own first, but never parts of two tokenizers or templates."""
    if found.adapter is None:
        return copy_companions(found.model, out)
    templates = next((folder for folder in found.folders if _has_template(folder)), found.model)
    names = {name for folder in (found.model, found.adapter) for name in copy_companions(folder, out)}
    for name in sorted(names):
        words = any(fnmatch(name, pattern) for pattern in (*TOKENIZERS, *_VOCABULARY, _SETTINGS))
        source = found.tokenizer if words else templates if name in _TEMPLATES else None
        if source is not None and (source / name).exists():
            shutil.copyfile(source / name, out / name)
        elif source is not None:
            (out / name).unlink()
    if templates != found.tokenizer and (out / _SETTINGS).exists():
        settings = read_json(out / _SETTINGS)
        settings.pop(_TEMPLATE, None)
        if _in_settings(templates):
            settings[_TEMPLATE] = read_json(templates / _SETTINGS)[_TEMPLATE]
        write_text(out / _SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False))
    return sorted(path.name for path in out.iterdir() if path.name in names)


def _has_template(folder: Path) -> bool:
    return _in_settings(folder) or any((folder / name).exists() for name in _TEMPLATES)


def _in_settings(folder: Path) -> bool:
    """Whether a chat template stands in tokenizer_config.json."""
    return (folder / _SETTINGS).exists() and bool(read_json(folder / _SETTINGS).get(_TEMPLATE))

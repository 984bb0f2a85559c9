"""One folder format into another, tensor by tensor from memory map to file: no model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transom.checkpoints.folders import (
    CHECKSUMS,
    CONFIG,
    Format,
    folder_format,
    model_folder,
    read_args,
    read_json,
    verify_checksums,
)
from transom.checkpoints.load import bad_numbers, open_state, outline, say_bad_numbers, shapes_of
from transom.checkpoints.save import copy_companions, plan_layout, staged
from transom.checkpoints.stored import Stored
from transom.errors import RequestError, notice

_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a Hugging Face config, for tools that look there


@dataclass(frozen=True)
class Converted:
    """What was done: formats, parameters, and bytes of weights written."""

    source: Path
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
    """Write the model of a folder or hub id into `out`, which must not be that folder."""
    where = model_folder(source, revision=revision)
    if Path(out).resolve() == where.resolve():
        raise RequestError(f"{out}: is the folder that is read; accepted is another one")
    if (where / CHECKSUMS).exists():
        verify_checksums(where)
    args, kind = read_args(where), folder_format(where)
    counts: dict[str, int] = {}
    state = open_state(where, args, shapes_of(outline(args)))
    ours = {name: _counted(name, stored, counts) for name, stored in state.items()}
    layout = plan_layout(args, ours, format, dtype, max_shard_size)
    if format == kind == "hf":
        config = read_json(where / CONFIG)
        layout.config.update({key: config[key] for key in _CARRIED if key in config})
    with staged(Path(out)) as folder:
        layout.write(folder)
        companions = copy_companions(where, folder)
    say_bad_numbers(counts, str(where))
    if format == "hf" and "tokenizer.model" in companions and "tokenizer.json" not in companions:
        notice(f"{out}: tokenizer.model goes along as it is; there is no tokenizer.json, which many tools ask for")
    size = sum(line.nbytes for batch in layout.batches for line in batch.outlines)
    parameters = sum(torch.Size(stored.shape).numel() for stored in state.values())
    return Converted(where, kind, format, parameters, size, tuple(companions))


def _counted(name: str, stored: Stored, counts: dict[str, int]) -> Stored:
    """The same tensor, whose bad numbers are counted when it is read."""

    def read() -> Tensor:
        tensor = stored.read()
        counts[name] = bad_numbers(tensor)
        return tensor

    reader: Callable[[], Tensor] = read
    return Stored(stored.shape, stored.dtype, reader)

"""safetensors files: opened as memory maps, written as a stream, cut into shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transom.base.errors import RequestError, WorkError
from transom.base.files import refuse_pointer, write_text
from transom.checkpoints.files.layout import WEIGHTS
from transom.checkpoints.files.lazy_tensors import LazyTensor, TensorGroup

# Bytes: a line of the cache, where vector instructions, and MKL's promise of equal bits, want data
# to begin.
ALIGNMENT = 64
# Bytes of one write: for larger ones Linux looks for memory in larger pieces, which takes two to
# ten times as long.
_PIECE = 1 << 19
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, views of its memory map; a missing, cut or damaged file is a
    `RequestError`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        refuse_pointer(path)
        raise RequestError(f"{path}: not a whole safetensors file ({error})") from None


def open_safetensors(folder: Path, files: Sequence[str]) -> dict[str, LazyTensor]:
    """Return all tensors of these files in a folder, unread."""
    out: dict[str, LazyTensor] = {}
    for file in files:
        for key, tensor in read_safetensors(folder / file).items():
            if key in out:
                raise RequestError(
                    f"{folder / file}: {key} stands in another file of this index too"
                )
            out[key] = LazyTensor.of(tensor)
    return out


def parse_size(text: str, field: str) -> int:
    """Bytes of `500MB`, `5GB` or `2GiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[KMG]I?)?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise RequestError(f"{field}: got {text!r}; expected a size like 500MB, 5GB or 2GiB")
    return size


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; a full disk is a `WorkError`."""
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise WorkError(f"{path}: could not be written ({error})") from None


def write_stream(
    folder: Path, batches: Sequence[TensorGroup], max_bytes: int | None, name: str = WEIGHTS
) -> None:
    """`name`, or shards of at most `max_bytes` and an index, with one batch in memory at a time.

    A tensor larger than `max_bytes` has a shard of its own.
    """
    # Wide numbers first, as the format wants: every tensor then starts at a multiple of its item's
    # size. Whoever maps the file computes in place: odd sizes come last, so that they move nothing
    # else off the alignment.
    ordered = sorted(batches, key=_place_in_file)
    entries = [
        (key, line) for batch in ordered for key, line in zip(batch.keys, batch.metas, strict=True)
    ]
    shards = _cut(entries, max_bytes)
    stem = Path(name).stem
    many = len(shards) > 1
    names = [
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" if many else name
        for i in range(1, len(shards) + 1)
    ]
    made = (tensor for batch in ordered for tensor in batch.read())
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard, made)
    if many:
        total = sum(line.nbytes for _, line in entries)
        where = {key: file for file, shard in zip(names, shards, strict=True) for key, _ in shard}
        write_text(
            folder / f"{name}.index.json",
            json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2),
        )


Entry = tuple[str, Tensor]


def _place_in_file(batch: TensorGroup) -> tuple[int, bool]:
    widest = max(line.dtype.itemsize for line in batch.metas)
    return -widest, any(line.nbytes % ALIGNMENT for line in batch.metas)


def _cut(entries: Sequence[Entry], max_bytes: int | None) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for key, outline in entries:
        if shards[-1] and max_bytes is not None and size + outline.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((key, outline))
        size += outline.nbytes
    return shards


def _write_shard(path: Path, shard: Sequence[Entry], made: Iterator[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, outline in shard:
        end = start + outline.nbytes
        kind = _NAMES.get(outline.dtype)
        if kind is None:
            raise RequestError(
                f"{path}: {key} is {outline.dtype}; expected {', '.join(map(str, _NAMES))}"
            )
        header[key] = {"dtype": kind, "shape": list(outline.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, outline in shard:
                tensor = next(made)
                assert (tensor.shape, tensor.dtype) == (outline.shape, outline.dtype), key
                _write_tensor(file, tensor)
    except OSError as error:
        raise WorkError(f"{path}: could not be written ({error})") from None


def _write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    # numpy has no bfloat16: bytes are bytes.
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    for start in range(0, len(data), _PIECE):
        file.write(data[start : start + _PIECE])

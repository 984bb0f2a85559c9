"""Read safetensors files as memory maps; write them as a stream, in shards with an index."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transom.base.errors import RequestError, expect, require
from transom.base.files import refuse_pointer, write_text, writing
from transom.checkpoints.files.file_pieces import FilePiece, SourceFile, read_piece
from transom.checkpoints.files.layout import INDEX, WEIGHTS
from transom.checkpoints.files.lazy_tensors import LazyTensor, TensorGroup

# Bytes of a cache line. Vector instructions are fastest on data that begins at one, and MKL gives
# equal bits for equal alignment only.
ALIGNMENT = 64
# Bytes per write. Linux allocates larger pages for larger writes, which takes two to ten times as
# long.
_PIECE = 1 << 19
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}

Entry = tuple[str, Tensor]  # a key, and shape and dtype as a meta tensor


def read_safetensors(path: Path, keys: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of one file, or those of some keys, as views of its memory map.

    Raises:
        RequestError: The file is missing, incomplete or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys or file.keys()}
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        refuse_pointer(path)
        raise RequestError(f"{path}: not a complete safetensors file ({error})") from None


def open_safetensors(
    folder: Path, files: Sequence[str], *, apart: bool = False
) -> dict[str, LazyTensor]:
    """Return the tensors of several files of a folder, not read yet.

    Args:
        folder: The folder.
        files: The names of the files.
        apart: Read tensors into memory of their own. What has been read of a map counts as memory
            of the process as long as a tensor is there, and a map of a file that becomes shorter
            ends the process.

    Raises:
        RequestError: A file is missing or damaged, or two files have the same key.
    """
    out: dict[str, LazyTensor] = {}
    for file in files:
        tensors = read_safetensors(folder / file)
        places = _pieces(folder / file)
        for key, tensor in tensors.items():
            expected = "another file of the index has this key too; expected it once"
            require(key not in out, str(folder / file), key, expected)
            mapped = replace(LazyTensor.of(tensor, mapped=True), pieces=places[key])
            read = functools.partial(read_piece, *places[key], mapped.shape, mapped.dtype)
            out[key] = replace(mapped, read=read, mapped=False) if apart else mapped
    return out


def _pieces(path: Path) -> dict[str, tuple[FilePiece]]:
    """Return where the tensors of a file are, whose header has been checked."""
    source = SourceFile(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    places = {key: one["data_offsets"] for key, one in header.items()}
    return {key: (FilePiece(source, 8 + size + a, b - a),) for key, (a, b) in places.items()}


def alignment_of(dtype: torch.dtype) -> int:
    """Return of what the addresses of numbers are multiples in memory."""
    # The address of float32 data decides on the last bit of its products; that of half precision
    # does not.
    return dtype.itemsize if dtype.itemsize <= 2 else ALIGNMENT


def parse_size(text: str, field: str) -> int:
    """Return the bytes of a text such as `500MB`, `5GB` or `2GiB`.

    Raises:
        RequestError: The text is no such size; `field` names it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[KMG]I?)?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    expect(size >= 1, field, text, "a size like 500MB, 5GB or 2GiB")
    return size


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], more: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, with `more` metadata in its header.

    Raises:
        WorkError: It could not be written.
    """
    groups = [TensorGroup.of(key, LazyTensor.of(tensor)) for key, tensor in tensors.items()]
    write_stream(path.parent, groups, None, path.name, more)


def write_stream(
    folder: Path,
    groups: Sequence[TensorGroup],
    max_bytes: int | None,
    name: str = WEIGHTS,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write tensors while only one group of them is in memory.

    Args:
        folder: The folder to write to.
        groups: All tensors.
        max_bytes: The size of a shard; a larger tensor has a shard of its own. None writes one
            file.
        name: The name of the file, from which those of shards and their index are made.
        more: Metadata of the header, beside the format.

    Raises:
        RequestError: A tensor has a dtype that the format does not have.
        WorkError: A file could not be written.
    """
    # The widest numbers come first, so every tensor begins at a multiple of its item size. Tensors
    # whose size is no multiple of the alignment come last, so that all others are aligned.
    ordered = sorted(groups, key=_place_in_file)
    entries = [entry for group in ordered for entry in zip(group.keys, group.metas, strict=True)]
    shards = _cut(entries, max_bytes)
    count, stem = len(shards), Path(name).stem
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [name]
    made = (tensor for group in ordered for tensor in group.read())
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard, made, more or {})
    if count > 1:
        where = {key: file for file, shard in zip(names, shards, strict=True) for key, _ in shard}
        total = sum(meta.nbytes for _, meta in entries)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(folder / f"{name}{INDEX}", json.dumps(index, indent=2))


def _place_in_file(group: TensorGroup) -> tuple[int, bool]:
    widest = max(meta.dtype.itemsize for meta in group.metas)
    return -widest, any(meta.nbytes % ALIGNMENT for meta in group.metas)


def _cut(entries: Sequence[Entry], max_bytes: int | None) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for key, meta in entries:
        if shards[-1] and max_bytes is not None and size + meta.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((key, meta))
        size += meta.nbytes
    return shards


def _write_shard(
    path: Path, shard: Sequence[Entry], made: Iterator[Tensor], more: Mapping[str, str]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **more}}
    start = 0
    for key, meta in shard:
        known = ", ".join(map(str, _NAMES))
        expect(meta.dtype in _NAMES, f"{path}: {key}: dtype", meta.dtype, known)
        offsets = [start, start + meta.nbytes]
        header[key] = {"dtype": _NAMES[meta.dtype], "shape": [*meta.shape], "data_offsets": offsets}
        start += meta.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, meta in shard:
            tensor = next(made)
            assert (tensor.shape, tensor.dtype) == (meta.shape, meta.dtype), key
            _write_tensor(file, tensor)


def _write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    # numpy has no bfloat16, but can write its bytes.
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    for start in range(0, len(data), _PIECE):
        file.write(data[start : start + _PIECE])

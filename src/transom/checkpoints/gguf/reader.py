"""The container of GGUF files: metadata, and where each tensor is. No torch.

Nothing is allocated before the file is known to have it. Source: `gguf.md`
of ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, expect, explained
from transom.base.files import refuse_pointer

MAGIC = b"GGUF"
# Tensor types that open: code, numbers in a block, bytes of a block.
_TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "MXFP4": (39, 32, 17),
}
_NAMES = {code: name for name, (code, _, _) in _TYPES.items()}
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


class StoredTensor(NamedTuple):
    """Where a tensor is, and in what form.

    Attributes:
        part: The index of its file, if the model is split into several.
        type: The name of its type, such as `Q4_0`.
        shape: Its shape, outputs first as in PyTorch.
        offset: The position of its first byte in the file.
        size: The number of its bytes.
    """

    part: int
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufModel:
    """The metadata and the tensors of a GGUF file, or of all parts of a split one.

    The tensors of `factors` are not in the file yet.
    """

    files: Sequence[Path]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    factors: Mapping[str, list[float]] = field(default_factory=dict)

    def numbers(self, name: str) -> list[float]:
        """Return the numbers of a small F32 tensor."""
        if name in self.factors:
            return self.factors[name]
        stored = self.tensors[name]
        where = f"{self.files[stored.part]}: {name}: type"
        expect(stored.type == "F32", where, stored.type, "F32")
        mapped = map_bytes(self.files[stored.part], stored)
        return [float(one) for one in mapped.view("<f4")]


def map_bytes(file: Path, stored: StoredTensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor as a private memory map."""
    with explained(f"{file}: cannot be read", OSError, ValueError):
        return np.memmap(file, np.uint8, "c", stored.offset, (stored.size,))


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file that is called `.gguf` or that begins as GGUF files do."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # the code that reads the file reports why it cannot be read


def split_files(path: Path) -> list[Path]:
    """Return all parts of a split file, given any of them; other files are the only part.

    Raises:
        RequestError: A part is missing.
    """
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count, stem = match["count"], match["stem"]
    names = [f"{stem}-{part:05d}-of-{count}.gguf" for part in range(1, int(count) + 1)]
    parts = [path.with_name(name) for name in names]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise RequestError(
            f"{path}: one of {len(parts)} parts, of which {missing[0]} is missing; expected all of "
            "them in one folder"
        )
    return parts


def read_gguf(path: Path) -> GgufModel:
    """Return the metadata and the tensors of a model, from all parts if the file is split.

    Raises:
        RequestError: A file is damaged, incomplete, of another version or byte order, or has a
            tensor of a type that does not open.
    """
    files = split_files(path)
    headers = [_read_header(file, part) for part, file in enumerate(files)]
    metadata, tensors = headers[0]
    count = metadata.get("split.count") or 1
    expected = f"{len(files)}; parts are called NAME-00001-of-0000N.gguf"
    expect(count == len(files), f"{path}: split.count", count, expected)
    for file, (_, more) in zip(files[1:], headers[1:], strict=True):
        twice = next(iter(tensors.keys() & more.keys()), None)
        expect(twice is None, str(file), twice, "a name that no other part has")
        tensors |= more
    return GgufModel(files, metadata, tensors)


def _read_header(path: Path, part: int) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    refuse_pointer(path)
    with explained(f"{path}: cannot be read", OSError), path.open("rb") as file:
        start = file.read(8)
        _check_version(path, start)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(path, content).header(part)


def _check_version(path: Path, start: bytes) -> None:
    expected = "a GGUF file of version 2 or 3, which begins with b'GGUF'"
    expect(start[:4] == MAGIC and len(start) == 8, str(path), start, expected)
    version, swapped = int.from_bytes(start[4:], "little"), int.from_bytes(start[4:], "big")
    if version not in (2, 3):
        big = swapped in (1, 2, 3)
        got = f"version {swapped} in big-endian order" if big else f"version {version}"
        raise RequestError(f"{path}: {got}; expected version 2 or 3 in little-endian order")


@dataclass
class _Cursor:
    """Reads the header of a file from its beginning to its end."""

    path: Path
    content: mmap.mmap
    position: int = len(MAGIC) + 4
    what: str = field(default="the counts", init=False)  # what is read, for messages

    def take(self, size: int) -> int:
        """Return the position, and move beyond `size` bytes."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.content):
            raise RequestError(f"{self.path}: cut: the file ends within {self.what}")
        return start

    def number(self, code: str) -> Any:
        """Return one number of a `struct` format."""
        return struct.unpack_from(f"<{code}", self.content, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        """Return a string."""
        start = self.take(self.number("Q"))
        with explained(f"{self.path}: {self.what}: not UTF-8", UnicodeDecodeError):
            return self.content[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return a value of metadata; arrays become lists."""
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        inner, count = (self.number("I"), self.number("Q")) if kind == _ARRAY else (kind, 0)
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        expected = "the type of a number or a text, or a list of them"
        expect(inner in _NUMBERS, f"{self.path}: {self.what}", inner, expected)
        start = self.take(count * struct.calcsize(_NUMBERS[inner]))
        return list(struct.unpack_from(f"<{count}{_NUMBERS[inner]}", self.content, start))

    def header(self, part: int) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """Return the metadata, and the tensors with their positions in the file."""
        tensors, entries = self.number("Q"), self.number("Q")
        metadata = self.named(entries, "the metadata", lambda: self.value(self.number("I")))
        found = self.named(tensors, "the list of tensors", lambda: self.tensor(part))
        alignment = metadata.get("general.alignment", 32)
        fits = type(alignment) is int and alignment > 0 and alignment % 8 == 0
        expect(fits, f"{self.path}: general.alignment", alignment, "a multiple of 8")
        base = -(-self.position // alignment) * alignment
        return metadata, {name: self.placed(name, found[name], base, alignment) for name in found}

    def named(self, count: int, what: str, read: Callable[[], Any]) -> dict[str, Any]:
        """Return `count` things, each of which comes after its name."""
        found: dict[str, Any] = {}
        for _ in range(count):
            self.what = what
            name = self.text()
            expect(name not in found, f"{self.path}: {what}", name, "each name once")
            self.what = name
            found[name] = read()
        return found

    def tensor(self, part: int) -> StoredTensor:
        """Return a tensor whose offset is counted from the end of the header."""
        where, dimensions = f"{self.path}: {self.what}", self.number("I")
        expected = f"at most {_MOST_DIMENSIONS}"
        expect(dimensions <= _MOST_DIMENSIONS, f"{where}: dimensions", dimensions, expected)
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        code, offset = self.number("I"), self.number("Q")
        expect(code in _NAMES, f"{where}: type", code, ", ".join(_TYPES))
        _, block, size = _TYPES[_NAMES[code]]
        fits = bool(shape) and shape[-1] % block == 0
        expected = f"rows of a multiple of {block} numbers, the block of {_NAMES[code]}"
        expect(fits, f"{where}: shape", shape, expected)
        return StoredTensor(part, _NAMES[code], shape, offset, math.prod(shape) // block * size)

    def placed(self, name: str, tensor: StoredTensor, base: int, alignment: int) -> StoredTensor:
        """Return a tensor with its position in the file, which must contain all of it."""
        start, end = base + tensor.offset, base + tensor.offset + tensor.size
        if end > len(self.content):
            raise RequestError(
                f"{self.path}: cut: tensor {name} ends at byte {end:,}, the file at "
                f"{len(self.content):,}"
            )
        aligned = tensor.offset % alignment == 0
        expected = f"a multiple of the alignment, {alignment}"
        expect(aligned, f"{self.path}: {name}: offset", tensor.offset, expected)
        return tensor._replace(offset=start)

"""Names, compression and strict JSON of data files."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from transom.base.errors import explained, optional
from transom.base.files import refuse_pointer

RowFormat = Literal["lines", "json", "parquet"]
ROW_FORMATS: dict[str, RowFormat] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ROW_NAMES = f"{', '.join(ROW_FORMATS)}, each also with {', '.join(COMPRESSIONS)}"
# Templates, `repr` and the JSON writer all recurse; Python ends recursion at about 1000 frames.
MAX_DEPTH = 100


# -- names -----------------------------------------------------------------------------------------


def suffix_of(path: str | Path) -> str:
    """Return the suffix in lower case without a compression suffix: `.jsonl` for `A.JSONL.gz`."""
    return _uncompressed(path).suffix.lower()


def stem_of(path: Path) -> str:
    """Return the file name without its suffix and without a compression suffix."""
    return _uncompressed(path).stem


def _uncompressed(path: str | Path) -> Path:
    """Return the path without a compression suffix."""
    out = Path(path)
    return out.with_suffix("") if out.suffix.lower() in COMPRESSIONS else out


def row_format(path: str | Path) -> RowFormat | None:
    """Return the format of a file of rows, or None for a file of any other kind."""
    return ROW_FORMATS.get(suffix_of(path))


# -- bytes -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn any failure to read or decompress `path` into a `RequestError` that names it."""
    cut = f"{path}: cannot be decompressed"
    with (
        explained(f"{path}: cannot be read", OSError),
        explained(cut, EOFError, zlib.error, lzma.LZMAError),
    ):
        yield


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if it has a suffix of `COMPRESSIONS`."""
    refuse_pointer(path)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    openers[".zst"] = _open_zst
    return cast(BinaryIO, openers.get(path.suffix.lower(), Path.open)(path, "rb"))


def _open_zst(path: Path, _: str) -> BinaryIO:
    pa = optional("pyarrow", f"{path}: reading .zst needs pyarrow: pip install 'transom[parquet]'")
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd")))


# -- JSON ------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Python's own reader accepts NaN, two equal keys, and half a surrogate pair.

    Raises:
        ValueError: The text is not strict JSON; the message is the reason.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair, which UTF-8 can't encode") from None
    return value


_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def _deeper_than(value: Any, depth: int) -> bool:
    """Return whether containers are nested more than `depth` levels deep, without recursion."""
    level = [value]
    for _ in range(depth):
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"the key {twice!r} twice in one object")
    return out


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond the range of numbers")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number; null stands for a value that is not known")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)

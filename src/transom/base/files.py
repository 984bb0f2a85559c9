"""Files: the cache folder, flushing to disk, reading files, strict JSON. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, WorkError, expect, explained, notice

# How every pointer of Git LFS begins (its specification, version 1).
_POINTER = b"version https://git-lfs.github.com/spec/"
GGUF = "gguf.json"  # in a folder of the cache that stands for a GGUF file: where its weights are
_MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors library


def cache_dir() -> Path:
    """Return the folder for files that can be made again: $TRANSOM_CACHE, or ~/.cache/transom."""
    return Path(os.environ.get("TRANSOM_CACHE") or "~/.cache/transom").expanduser()


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text and a line end to a file; raise `WorkError` if it cannot be written."""
    with writing(path):
        path.write_text(text + "\n", encoding="utf-8")


def writing(path: Path, *kinds: type[Exception]) -> explained:
    """Return a context that turns failures to write a file into a `WorkError` that names it."""
    return explained(f"{path}: could not be written", OSError, *kinds, by=WorkError)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pointer(path: Path) -> None:
    """Raise `RequestError` if a file is a pointer of Git LFS instead of the file itself."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # the code that reads the file reports why it cannot be read
    if start == _POINTER:
        raise RequestError(
            f"{path}: got a Git LFS pointer; expected the file itself: install git-lfs and run "
            "`git lfs pull` in its folder"
        )


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        RequestError: If the file cannot be read or is a pointer of Git LFS.
    """
    refuse_pointer(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: Path) -> str:
    """Return the text of a file; raise `RequestError` if it cannot be read or is not UTF-8."""
    with explained(f"{path}: expected text in UTF-8", UnicodeDecodeError):
        return read_bytes(path).decode("utf-8")


def json_object(content: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that a file contains.

    Args:
        content: The content of the file.
        path: The file, for messages.

    Raises:
        RequestError: If the content is anything else.
    """
    with explained(f"{path}: not JSON", ValueError, RecursionError):
        data = json.loads(content)
    expect(isinstance(data, dict), str(path), type(data).__name__, "a JSON object")
    return dict(data)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise `RequestError` if there is none."""
    return json_object(read_bytes(path), path)


def json_text(document: Any, **options: Any) -> str:
    """Return a document as JSON that every program can read.

    JSON has no NaN and no infinity. Such numbers become null, and a notice tells how many.

    Args:
        document: Data that `json.dumps` accepts.
        **options: Options of `json.dumps`.
    """
    try:
        return json.dumps(document, allow_nan=False, **options)
    except ValueError:  # a number is not finite
        replaced: list[str] = []
        finite = json.loads(json.dumps(document), parse_constant=replaced.append)
    notice(f"{len(replaced)} NaN or infinite numbers are written as null, since JSON has neither")
    return json.dumps(finite, **options)


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a safetensors file, which describes its tensors by key.

    Return None if there is no such file or no readable header.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _MOST_HEADER else None
    except (OSError, ValueError):
        return None  # the code that reads the weights reports what is wrong with the file
    return header if isinstance(header, dict) else None


def refuse_infinite(data: Any, where: str, path: str = "") -> None:
    """Raise `RequestError` for the first number of JSON data that is NaN or infinite.

    Args:
        data: The data.
        where: The file, for messages.
        path: The key of the data in the file.
    """
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(data, Mapping):
        inside = data.items()
    elif isinstance(data, list):
        inside = enumerate(data)
    elif isinstance(data, float) and not math.isfinite(data):
        raise RequestError(f"{where}: {path}: got {data!r}; expected a finite number")
    for key, value in inside:
        refuse_infinite(value, where, f"{path}.{key}" if path else str(key))


def gguf_pointer(folder: Path) -> dict[str, Any]:
    """Return the content of `gguf.json`, or nothing if the folder is not that of a GGUF file."""
    pointer = folder / GGUF
    return read_json(pointer) if pointer.exists() else {}


def shown_name(path: Path) -> str:
    """Return the path of a model, or of a file in its folder, for messages.

    A folder of the cache that stands for a GGUF file, and each file in it, have the name of the
    GGUF file.
    """
    folder = path if path.is_dir() else path.parent
    return str(next(iter(gguf_pointer(folder).get("files", ())), path))

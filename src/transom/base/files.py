"""Files: where this machine keeps what can be made again, forcing to disk, strict JSON. No
torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, WorkError, notice, require

# How every pointer of Git LFS begins (its specification, version 1).
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors library


def cache_dir() -> Path:
    """$TRANSOM_CACHE, or ~/.cache/transom."""
    return Path(os.environ.get("TRANSOM_CACHE") or "~/.cache/transom").expanduser()


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file and end its last line; a full disk is a `WorkError`."""
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise WorkError(f"{path}: could not be written ({error})") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pointer(path: Path) -> None:
    """Raise a `RequestError` that names git-lfs where `path` is a pointer of Git LFS and not the
    file itself.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # whoever reads the file says why it cannot be read
    if start == _POINTER:
        raise RequestError(
            f"{path}: a Git LFS pointer, not the file itself; install git-lfs and run `git lfs "
            f"pull` in its folder"
        )


def read_bytes(path: Path) -> bytes:
    """Return the content of a file; raise `RequestError` if it cannot be read or is a pointer of
    Git LFS.
    """
    refuse_pointer(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None


def json_object(content: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in the content of a file; anything else is a `RequestError`."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON ({error})") from None
    require(isinstance(data, dict), str(path), type(data).__name__, "expected a JSON object")
    return dict(data)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; anything else is a `RequestError` that names the file."""
    return json_object(read_bytes(path), path)


def json_text(document: Any, **options: Any) -> str:
    """Return `document` as JSON that every reader accepts; `options` are those of `json.dumps`.

    JSON has no NaN and no infinity: such numbers become null, with a notice of how many.
    """
    try:
        return json.dumps(document, allow_nan=False, **options)
    except ValueError:  # some number is not finite
        finite, dropped = _finite(document)
    notice(f"{dropped} NaN or infinite numbers are written as null, since JSON has neither")
    return json.dumps(finite, allow_nan=False, **options)


def _finite(value: Any) -> tuple[Any, int]:
    """Return `value` with None for every number that is not finite, and how many there were."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    if isinstance(value, Mapping):
        pairs = {key: _finite(one) for key, one in value.items()}
        return {key: one for key, (one, _) in pairs.items()}, sum(
            count for _, count in pairs.values()
        )
    if isinstance(value, (list, tuple)):
        items = [_finite(one) for one in value]
        return [one for one, _ in items], sum(count for _, count in items)
    return value, 0


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a safetensors file, which describes its tensors by key, without torch.

    Return None if there is no such file or no readable header.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _MOST_HEADER else None
    except (OSError, ValueError):
        return None  # whoever reads the weights says what is wrong with the file
    return header if isinstance(header, dict) else None


def refuse_infinite(data: Any, where: str, path: str = "") -> None:
    """Raise for the first number of some JSON that is infinite or not a number, naming its key
    below `where`.
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

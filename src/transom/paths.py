"""Files: where this machine keeps what can be made again, forcing to disk, strict JSON. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transom.errors import RequestError


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is a `RequestError` naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise RequestError(f"{path}: accepted is one JSON object")
    return data

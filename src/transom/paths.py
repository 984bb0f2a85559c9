"""Where this machine keeps what can be made again, and how a file is forced to disk. No torch."""

from __future__ import annotations

import os
from pathlib import Path


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

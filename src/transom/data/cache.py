"""Entries of the cache folder, which are made once and then memory-mapped.

An entry is a folder with a few shards and a `meta.json`, named after the hash of everything that
its content depends on. A shard is a sequence of rows: each column of numbers is one file, in which
the rows lie one after another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transom.base import files
from transom.base.errors import notice
from transom.base.locks import FolderLock
from transom.checkpoints.files.staging import staged

META_FILE = "meta.json"
T = TypeVar("T")


@dataclass(frozen=True)
class CacheEntry:
    """A complete entry: its folder, and the metadata that its maker returned."""

    folder: Path
    meta: dict[str, Any]


def cache_entry(
    cache_dir: str | Path | None, key: list[Any], make: Callable[[Path], dict[str, Any]]
) -> CacheEntry:
    """Return the entry for a key, which is made first if it is missing or damaged.

    A second process that needs the same entry waits until the first one has made it.

    Args:
        cache_dir: The folder of all entries; None is `$TRANSOM_CACHE`, or `~/.cache/transom`.
        key: Everything that the content depends on, as JSON values.
        make: Writes the files of the entry into a folder and returns its metadata, as JSON values.

    Raises:
        WorkError: The folder can't be written to, or the disk is full.
    """
    root = files.cache_dir() if cache_dir is None else Path(cache_dir)
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    with FolderLock(folder, wait=True):
        meta = _read_meta(folder)
        if meta is None:
            with staged(folder, configs=(), stale=()) as temporary:
                made = make(temporary)
                meta = {**made, "sizes": _sizes(temporary)}
                (temporary / META_FILE).write_text(json.dumps(meta, indent=2))
                for path in (*temporary.iterdir(), temporary):
                    files.sync(path)
    return CacheEntry(folder, meta)


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of an entry, or None if it is missing or its files have other sizes
    than written.
    """
    if not folder.exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        meta: dict[str, Any] = json.loads((folder / META_FILE).read_text())
        if meta["sizes"].items() <= _sizes(folder).items():
            return meta
    notice(f"{folder}: a damaged cache entry is made again")
    shutil.rmtree(folder)
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a folder by name."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


@contextlib.contextmanager
def shard_writer(
    folder: Path, name: str, dtypes: Mapping[str, str]
) -> Iterator[Callable[..., None]]:
    """Write rows of tokens into the files `NAME.COLUMN` of a folder.

    `offsets` says where each row begins in `tokens`, int64 [rows + 1]; `ids.json` has the ids.

    Args:
        folder: The folder.
        name: The name of the shard.
        dtypes: Those of the columns, of which one is called `tokens`.

    Yields:
        `append(id, tokens, **columns)`, which adds a row. A column has one number for each token,
        or one number for the row.
    """
    ids: list[str] = []
    total = 0
    with contextlib.ExitStack() as stack:
        kinds = {**dtypes, "offsets": "int64"}
        files = {one: stack.enter_context((folder / f"{name}.{one}").open("wb")) for one in kinds}

        def write(column: str, values: ArrayLike) -> None:
            # ndarray.tofile would lose the errno of a full disk.
            files[column].write(np.asarray(values, dtype=kinds[column]).tobytes())

        def append(id: str, tokens: Sequence[int], **columns: ArrayLike) -> None:
            nonlocal total
            total += len(tokens)
            ids.append(id)
            for column, values in {"tokens": tokens, "offsets": total, **columns}.items():
                write(column, values)

        write("offsets", 0)
        yield append
    (folder / f"{name}.ids.json").write_text(json.dumps(ids))


def read_shard(
    folder: Path, name: str, dtypes: Mapping[str, str], *, ids: bool = True
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Return the columns of a shard and `offsets` as memory maps, and the ids of its rows, or none
    without `ids`.
    """
    columns: dict[str, NDArray[Any]] = {}
    for column, dtype in {**dtypes, "offsets": "int64"}.items():
        path = folder / f"{name}.{column}"
        empty = path.stat().st_size == 0  # the system can't map an empty file
        columns[column] = np.zeros(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
    return columns, json.loads((folder / f"{name}.ids.json").read_text()) if ids else []


def with_progress(items: Iterable[T], what: str, total: int | None, shown: bool) -> Iterator[T]:
    """Yield the items, with a progress bar on standard error if `shown`.

    `total` is None if the number of items is unknown.
    """
    if not shown:
        return iter(items)
    from rich.console import Console
    from rich.progress import track

    return iter(track(items, what, total=total, console=Console(stderr=True)))

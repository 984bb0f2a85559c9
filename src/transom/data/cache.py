"""Entries of the cache folder, which are made once and then memory-mapped.

An entry is a folder with a few shards and a `meta.json`, named after the hash of everything that
its content depends on. A shard is a sequence of rows: each column of numbers is one file, in which
the rows lie one after another.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transom.base import files
from transom.base.errors import RequestError, WorkError, notice
from transom.base.locks import FolderLock

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
        RequestError: The folder can't be written to.
        WorkError: The disk is full.
    """
    root = files.cache_dir() if cache_dir is None else Path(cache_dir)
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    with FolderLock(folder, wait=True):
        meta = _read_meta(folder)
        if meta is None:
            with _temporary_beside(folder) as temporary:
                made = make(temporary)
                sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                meta = {**made, "sizes": sizes}
                (temporary / META_FILE).write_text(json.dumps(meta, indent=2))
    return CacheEntry(folder, meta)


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of an entry, or None if it is missing or its files have other sizes
    than written.
    """
    if not folder.exists():
        return None
    try:
        meta: dict[str, Any] = json.loads((folder / META_FILE).read_text())
        wrong = [name for name, size in meta["sizes"].items() if _size(folder / name) != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wrong = [META_FILE]
    if not wrong:
        return meta
    notice(f"{folder}: {wrong[0]} is damaged; the cache entry is made again")
    shutil.rmtree(folder)
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@contextlib.contextmanager
def _temporary_beside(folder: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `folder` if the block succeeds, or removed."""
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            files.sync(path)
        if not folder.exists():  # where no lock is possible, another process may have been faster
            temporary.rename(folder)
        files.sync(folder.parent)
    except OSError as error:
        where = folder.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkError(f"{where}: the disk is full; token files need more space") from error
        expected = f"expected a folder that can be written to ({error.strerror})"
        raise RequestError(f"cache_dir: got {str(where)!r}; {expected}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ShardWriter:
    """Context manager that writes rows of tokens into the files `NAME.COLUMN` of a folder.

    `offsets` says where each row begins in `tokens`, int64 [rows + 1]; `ids.json` has the ids.
    """

    def __init__(self, folder: Path, name: str, dtypes: Mapping[str, str]) -> None:
        """Open the files. `dtypes` are those of the columns, of which one is called `tokens`."""
        self._ids_file = folder / f"{name}.ids.json"
        self._dtypes = {**dtypes, "offsets": "int64"}
        self._files = {one: (folder / f"{name}.{one}").open("wb") for one in self._dtypes}
        self._ids: list[str] = []
        self._tokens = 0
        self._write("offsets", 0)

    def append(self, id: str, tokens: Sized, **columns: ArrayLike) -> None:
        """Add a row. A column has one number for each token, or one number for the row."""
        self._tokens += len(tokens)
        for name, values in {"tokens": tokens, "offsets": self._tokens, **columns}.items():
            self._write(name, values)
        self._ids.append(id)

    def _write(self, name: str, values: Any) -> None:
        # ndarray.tofile would lose the errno of a full disk.
        self._files[name].write(np.asarray(values, dtype=self._dtypes[name]).tobytes())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            self._ids_file.write_text(json.dumps(self._ids))


def read_column(path: Path, dtype: str) -> NDArray[Any]:
    """Return the numbers of a column as a memory map."""
    empty = path.stat().st_size == 0  # the system can't map an empty file
    return np.zeros(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")


def read_ids(path: Path) -> list[str]:
    """Return the ids of the rows of a shard."""
    ids: list[str] = json.loads(path.read_text())
    return ids


def with_progress(items: Iterable[T], what: str, total: int | None, shown: bool) -> Iterator[T]:
    """Yield the items, with a progress bar on standard error if `shown`.

    `total` is None if the number of items is unknown.
    """
    if not shown:
        return iter(items)
    from rich.console import Console
    from rich.progress import track

    return iter(track(items, what, total=total, console=Console(stderr=True)))

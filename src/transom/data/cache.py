"""Entries of the cache folder: made once, found by a hash of everything they depend on, and
memory-mapped.

An entry is a folder with a few shards and a `meta.json`. A shard is a sequence of rows: each column
of numbers is one file in which the rows lie one after another, and `offsets` says where they begin.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

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
                _write(temporary / META_FILE, json.dumps(meta, indent=2).encode())
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
    """Yield a new folder that is renamed to `folder` after the block, or removed if the block
    fails.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        yield temporary
        files.sync(temporary)
        try:
            temporary.rename(folder)
        except OSError as error:
            # On a file system without locks another process may have made the same entry. Its files
            # are equal.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        files.sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkError(
                f"{folder.parent}: the disk is full; the token files need more space"
            ) from error
        raise RequestError(
            f"cache_dir: got {str(folder.parent)!r}; expected a folder that can be written to "
            f"({error.strerror})"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


# -- shards ------------------------------------------------------------------------------------


class ShardWriter:
    """Context manager that writes the files of one shard, row by row.

    The columns go to disk at once; ids, offsets and the numbers per row stay in memory until the
    end of the block.
    """

    def __init__(
        self, folder: Path, name: str, columns: Mapping[str, str], values: Sequence[str] = ()
    ) -> None:
        """Open the files of the shard `name`.

        Args:
            folder: Where the files go.
            name: The name that all files begin with.
            columns: The dtype of each column. All columns of a row have the same length.
            values: Names of the integers that each row has.
        """
        self._path, self._columns = folder / name, columns
        self._files = {column: _file(self._path, column).open("wb") for column in columns}
        self._values: dict[str, list[int]] = {"offsets": [0], **{value: [] for value in values}}
        self._ids: list[str] = []

    def append(self, id: str, columns: Mapping[str, ArrayLike], **values: int) -> None:
        """Add a row by its id, its numbers in each column, and its integers."""
        length = 0
        for name, dtype in self._columns.items():
            row = np.asarray(columns[name], dtype=dtype)
            length = len(row)
            # ndarray.tofile would lose the errno of a full disk.
            self._files[name].write(row.tobytes())
        for name, value in {"offsets": self._values["offsets"][-1] + length, **values}.items():
            self._values[name].append(value)
        self._ids.append(id)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for file in self._files.values():
            with file:
                if kind is None:
                    _sync(file)
        if kind is None:
            for name, numbers in self._values.items():
                _write(_file(self._path, name), np.asarray(numbers, np.int64).tobytes())
            _write(_file(self._path, "ids.json"), json.dumps(self._ids).encode())


def read_column(folder: Path, name: str, column: str, dtype: str) -> NDArray[Any]:
    """Return a column of a shard as a memory map."""
    path = _file(folder / name, column)
    empty = path.stat().st_size == 0  # the system refuses to map an empty file
    return np.zeros(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")


def read_values(folder: Path, name: str, value: str) -> NDArray[np.int64]:
    """Return the `offsets` of a shard, int64 [rows + 1], or one of its values, int64 [rows]."""
    return np.fromfile(_file(folder / name, value), dtype=np.int64)


def read_ids(folder: Path, name: str) -> list[str]:
    """Return the ids of the rows of a shard."""
    ids: list[str] = json.loads(_file(folder / name, "ids.json").read_text())
    return ids


def _file(path: Path, part: str) -> Path:
    return path.with_name(f"{path.name}.{part}")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def with_progress(items: Iterable[T], what: str, total: int | None, shown: bool) -> Iterator[T]:
    """Yield the items, with a progress bar on standard error if `shown`.

    `total` is None if the number of items is unknown.
    """
    if not shown:
        return iter(items)
    from rich.console import Console
    from rich.progress import track

    return iter(track(items, what, total=total, console=Console(stderr=True)))

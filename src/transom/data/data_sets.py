"""Data sets by name: a file, a folder of splits, `stdlib-docs`, or a name of `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transom.base.errors import expect, explained, notice, optional
from transom.data.chat.instructions import NAME as STDLIB
from transom.data.chat.instructions import stdlib_rows
from transom.data.file_formats import ROW_NAMES, row_format
from transom.data.row_files import DataRow, numbered_row, read_rows, without_nulls
from transom.data.split_files import SPLITS, split_files

# Names of the `datasets` library: owner/name:config.
NAME = re.compile(r"[\w-]+(\.[\w-]+)*(/[\w.-]+)?(:[\w.-]+)?")


def rows_of(name: str | Path, split: str = "train") -> Iterator[DataRow]:
    """Return the rows of one split in the order of the files.

    Args:
        name: A file or `stdlib-docs`, all of which are `train`; a folder with files for each split;
            or a name of the `datasets` library.
        split: `train`, `valid` or `test`.

    Raises:
        RequestError: There is no such data, or it has no such split.
    """
    splits = splits_of(name)
    expect(split in splits, "split", split, f"a split that {name} has: {', '.join(splits)}")
    return splits[split]()


def splits_of(name: str | Path) -> dict[str, Callable[[], Iterator[DataRow]]]:
    """Return a function for each split of a data set, which returns its rows."""
    path = Path(name).expanduser()
    if str(name) == STDLIB:
        return {"train": stdlib_rows}
    if path.is_dir():
        files = split_files(path)
        return {split: partial(_rows_of_files, paths) for split, paths in files.items()}
    if path.exists():
        return {"train": partial(read_rows, path)}
    known = NAME.fullmatch(str(name)) is not None and row_format(path) is None
    formats = f"that ends in {ROW_NAMES}, a folder of such files, or a name of `datasets`"
    expect(known, "data", str(name), f"a file {formats}")
    return _splits_by_name(str(name))


def _rows_of_files(paths: Sequence[Path]) -> Iterator[DataRow]:
    for path in paths:
        yield from read_rows(path)


def _splits_by_name(name: str) -> dict[str, Callable[[], Iterator[DataRow]]]:
    """Return the splits of a data set of the hub, `owner/name` or `owner/name:config`."""
    needs = "no such file or folder, and data by name needs `datasets`: pip install datasets"
    datasets = optional("datasets", f"data: got {name!r}; {needs}")
    dataset, _, config = name.partition(":")
    with explained(f"data: got {name!r}; `datasets` can't load it", OSError, ValueError):
        found = datasets.load_dataset(dataset, config or None)
    words = {
        split: next(word for word in words if word in found)
        for split, words in SPLITS.items()
        if not found.keys().isdisjoint(words)
    }
    unread = found.keys() - words.values()
    if unread:
        notice(f"{name}: splits that are not read: {', '.join(sorted(unread))}")
    return {
        split: partial(_table_rows, f"{name}:{word}", found[word]) for split, word in words.items()
    }


def _table_rows(name: str, table: Iterable[Mapping[str, Any]]) -> Iterator[DataRow]:
    for number, row in enumerate(table, start=1):
        yield numbered_row(name, number, without_nulls(row))

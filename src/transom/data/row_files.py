"""Rows of .jsonl, .json and .parquet files, of folders with splits and of `datasets` by name. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transom.errors import RequestError, notice, require

SUFFIXES = (".jsonl", ".json", ".parquet")
# What people call the three parts of a data set; `train-00000-of-00002.parquet` belongs to `train`.
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
NAME = re.compile(r"[\w-]+(\.[\w-]+)*(/[\w.-]+)?(:[\w.-]+)?")  # of the `datasets` library: owner/name:config


class Row(NamedTuple):
    """One row: `id` is its file and line, or its number in a table; without columns, the `problem` says why.

    `where` is the same with the whole path.
    """

    id: str
    where: str
    columns: dict[str, Any] | None
    problem: str = ""


def rows_of(name: str | Path, split: str = "train") -> Iterator[Row] | None:
    """Rows of one part of a data set in the order of the files, or None where there is no such part.

    `name` is a file (all of it is `train`), a folder with a file or more for each split, or a name that the
    `datasets` library knows.
    """
    require(split in SPLITS, "split", split, f"accepted is one of {', '.join(SPLITS)}")
    path = Path(name).expanduser()
    if path.is_dir():
        files = split_files(path, split)
        return (row for file in files for row in read_rows(file)) if files else None
    if path.exists():
        return read_rows(path) if split == "train" else None
    known = NAME.fullmatch(str(name)) is not None and path.suffix not in SUFFIXES
    accepted = f"accepted is a file that ends in {', '.join(SUFFIXES)}, a folder of such, or a name of `datasets`"
    require(known, "data", str(name), f"no such file or folder; {accepted}")
    return _by_name(str(name), split)


def split_files(folder: Path, split: str) -> list[Path]:
    """Files of a split in a folder or in its `data/`, in the order of their names; two formats are refused."""
    here = folder if any(_splits(folder)) else folder / "data"
    found = [path for known, path in _splits(here) if known == split]
    suffixes = sorted({path.suffix for path in found})
    require(len(suffixes) < 2, f"{folder}: files of the split {split}", suffixes, "accepted is one format")
    if split == "train" and not found:
        raise RequestError(f"{folder}: no training rows; accepted is a folder with train.jsonl, .json or .parquet")
    return found


def _splits(folder: Path) -> Iterator[tuple[str, Path]]:
    """(split, file) of every file in a folder that is named after one."""
    for path in sorted(folder.glob("*")):
        stem = re.sub(r"-\d+-of-\d+$", "", path.stem)
        for split, names in SPLITS.items():
            if stem in names and path.suffix in SUFFIXES and path.is_file():
                yield split, path


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file; one that is not readable at all is a `RequestError`, a row that is not is told as such."""
    require(path.suffix in SUFFIXES, "data", str(path), f"accepted is a file that ends in {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as stream:
            whole = path.suffix == ".json" and _begins_list(stream.read(4096))
        if path.suffix == ".parquet":
            return _parquet(path)
        return _json_list(path) if whole else _json_lines(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error})") from None


def _begins_list(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


# -- formats of files --------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[Row]:
    empty = 0
    with path.open("rb") as lines:  # split at \n only: str.splitlines knows nine more line ends
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                empty += 1
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                value = None
            yield _row(path, str(number), value, line[:40].decode(errors="replace"))
    if empty:
        notice(f"{path}: {empty} empty lines left out")


def _json_list(path: Path) -> Iterator[Row]:
    """Items of one list, read one by one, so that each is known by the line it begins on."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}; accepted is JSON") from None
    decode, at = json.JSONDecoder().raw_decode, text.index("[") + 1
    line, counted, on_line, more = 1, 0, 0, not _follows(text, at, "]")
    while more:
        at = _behind_space(text, at)
        breaks = text.count("\n", counted, at)
        line, counted, on_line = line + breaks, at, 1 if breaks else on_line + 1
        number = f"{line}.{on_line}" if on_line > 1 else str(line)
        try:
            value, end = decode(text, at)
            more = _follows(text, end, ",")
            if not more and not _follows(text, end, "]"):
                raise ValueError("neither a comma nor the end of the list")
        except (ValueError, RecursionError):
            yield _row(path, number, None, text[at : at + 40])
            notice(f"{path}:{line}: no JSON from here on, so the rest is not read")
            return
        yield _row(path, number, value, text[at : at + 40])
        at = _behind_space(text, end) + 1


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _follows(text: str, at: int, mark: str) -> bool:
    return text.startswith(mark, _behind_space(text, at))


def _row(path: Path, number: str, value: Any, shown: str) -> Row:
    fits = isinstance(value, dict)
    problem = "" if fits else f"{shown.strip()!r}: accepted is one JSON object"
    return Row(f"{path.name}:{number}", f"{path}:{number}", value if fits else None, problem)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise RequestError(f"{path}: reading Parquet needs pyarrow: pip install 'transom[parquet]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for group in range(table.num_row_groups):
                for columns in table.read_row_group(group).to_pylist():
                    number += 1
                    yield Row(f"{path.name}:{number}", f"{path}:{number}", _given(columns))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: not a readable Parquet file ({error})") from None


def _given(value: Any) -> Any:
    """Without what is null: columns write every field of every row, also those that a row was made without."""
    if isinstance(value, dict):
        return {key: _given(one) for key, one in value.items() if one is not None}
    return [_given(one) for one in value] if isinstance(value, list) else value


# -- the `datasets` library --------------------------------------------------------------------------


def _by_name(name: str, split: str) -> Iterator[Row] | None:
    """Rows of a data set of the hub, or of that library's cache; `owner/name:config` names one of several."""
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise RequestError(
            f"data = {name!r}: no such file or folder, and data by name needs `datasets`: pip install datasets"
        ) from None
    dataset, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(dataset, config or None)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"data = {name!r}: `datasets` cannot load it ({reason})") from None
    known = next((known for known in SPLITS[split] if known in found), None)
    if known is None and split == "train":
        raise RequestError(f"data = {name!r}: its splits are {', '.join(found)}; accepted is one called train")
    return None if known is None else _numbered(f"{name}:{known}", found[known])


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    for number, columns in enumerate(rows, start=1):
        yield Row(f"{name}:{number}", f"{name}:{number}", _given(columns))

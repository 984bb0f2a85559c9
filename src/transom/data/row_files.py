"""Rows of files, of folders with splits and of `datasets`: the reader of all verbs. No torch."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transom.base.errors import RequestError, notice, require
from transom.data.file_formats import (
    ROW_NAMES,
    open_bytes,
    parse_json,
    parse_json_at,
    readable,
    row_format,
    skip_space,
)
from transom.data.split_files import SPLITS, no_training_rows, split_files

NAME = re.compile(
    r"[\w-]+(\.[\w-]+)*(/[\w.-]+)?(:[\w.-]+)?"
)  # of the `datasets` library: owner/name:config


class DataRow(NamedTuple):
    """One row: `id` is its file and line, or its number in a table. `problem` says why it has no
    columns.

    `where` is the same with the whole path.
    """

    id: str
    where: str
    columns: dict[str, Any] | None
    problem: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """The columns that are not null; tables write every column of every row."""
        return {key: value for key, value in (self.columns or {}).items() if value is not None}


@dataclass
class RowCounts:
    """Counts of lines and names of columns that a reader leaves out."""

    blank: int = 0  # lines of white space only
    unread: set[str] = field(default_factory=set)  # names of columns of a table that are not read


def notice_unread(name: str | Path, unread: Counter[str]) -> None:
    """Print the keys that nothing reads, and in how many rows each of them is."""
    if unread:
        words = ", ".join(f"{key} ({count} rows)" for key, count in sorted(unread.items()))
        notice(f"{name}: keys that are not read: {words}")


def rows_of(name: str | Path, split: str = "train") -> Iterator[DataRow] | None:
    """Return the rows of one split in the order of the files, or None if there is no such split.

    `name` is a file (all of it is `train`), a folder with a file or more for each split, or a name
    that the `datasets` library knows. The names of files of a folder that are not read are printed
    with `train`.
    """
    require(split in SPLITS, "split", split, f"expected one of {', '.join(SPLITS)}")
    path = Path(name).expanduser()
    if path.is_dir():
        found = split_files(path)
        if split == "train" and not found.files.get("train"):
            raise no_training_rows(path, found)
        if split == "train" and found.ignored:
            notice(f"{path}: {found.notice()}")
        files = found.files.get(split)
        return (row for file in files for row in read_rows(file)) if files else None
    if path.exists():
        return read_rows(path) if split == "train" else None
    known = NAME.fullmatch(str(name)) is not None and row_format(path) is None
    expected = (
        f"expected a file that ends in {ROW_NAMES}, a folder of such, or a name of `datasets`"
    )
    require(known, "data", str(name), f"no such file or folder; {expected}")
    return _by_name(str(name), split)


def has_split(name: str | Path, split: str) -> bool:
    """Return whether a data set has rows of a split of their own."""
    path = Path(name).expanduser()
    return split in split_files(path).files if path.is_dir() else rows_of(name, split) is not None


def read_rows(
    path: Path, *, text_column: str | None = None, counts: RowCounts | None = None
) -> Iterator[DataRow]:
    """Yield the rows of a file; a bad row has a `problem`, an unreadable file is refused.

    With `text_column` a table must have that column as text, and no other is read. What is left out
    is added to `counts`; without them the number of blank lines is printed.
    """
    format = row_format(path)
    require(format is not None, "data", str(path), f"expected a file that ends in {ROW_NAMES}")
    with (
        readable(path),
        open_bytes(path) as stream,
    ):  # a file that is missing is refused at the call
        head = stream.read(4096) if format == "json" else b""
    if format == "parquet":
        rows = _parquet(path, text_column, counts)
    elif format == "json" and not _is_lines(path, head):
        rows = _json_values(path)
    else:
        rows = _json_lines(path, counts)
    return _guarded(path, rows)


def _guarded(path: Path, rows: Iterator[DataRow]) -> Iterator[DataRow]:
    with readable(path):
        yield from rows


# -- formats of files ------------------------------------------------------------------------------


def _is_lines(path: Path, head: bytes) -> bool:
    """Return whether a .json file holds lines of JSON rather than one value."""
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return False
    with readable(path), open_bytes(path) as lines:
        first = next((line for line in lines if line.strip()), b"{}")
    try:
        parse_json(first.decode("utf-8-sig"))
    except ValueError:
        # The first line of an object over many lines is not complete; a faulty one of many is.
        return first.strip().endswith(b"}") and first.strip() != b"}"
    return True


def _json_lines(path: Path, counts: RowCounts | None) -> Iterator[DataRow]:
    empty = 0
    with open_bytes(path) as lines:  # split at \n only: str.splitlines knows nine more line ends
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                empty += 1
                continue
            value, reason = None, ""
            try:
                value = parse_json(line.decode("utf-8-sig"))
            except ValueError as error:
                reason = str(error)
            yield _row(path, str(number), value, line[:40].decode(errors="replace"), reason)
    if counts is not None:
        counts.blank += empty
    elif empty:
        notice(f"{path}: {empty} empty lines left out")


def _json_values(path: Path) -> Iterator[DataRow]:
    """Yield the items of a list, or an object over many lines, each with its first line."""
    with open_bytes(path) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}; expected JSON") from None
    at = skip_space(text, 0)
    is_list = text.startswith("[", at)
    at = skip_space(text, at + is_list)
    line, counted, on_line = 1, 0, 0
    more = not (is_list and text.startswith("]", at))
    while more:
        breaks = text.count("\n", counted, at)
        line, counted, on_line = line + breaks, at, 1 if breaks else on_line + 1
        number = f"{line}.{on_line}" if on_line > 1 else str(line)
        try:
            value, end = parse_json_at(text, at)
            end = skip_space(text, end)
            more = is_list and text.startswith(",", end)
            if is_list and not more and not text.startswith("]", end):
                raise ValueError("neither a comma nor the end of the list comes after it")
        except ValueError as error:
            yield _row(path, number, None, text[at : at + 40], f"{error}; the rest is not read")
            return
        yield _row(path, number, value, text[at : at + 40])
        at = skip_space(text, end + 1) if more else end
    end = skip_space(text, at + is_list)
    if end < len(text):
        line += text.count("\n", counted, end)
        yield _row(
            path, str(line), None, text[end : end + 40], "more after the end of the JSON value"
        )


def _row(path: Path, number: str, value: Any, shown: str, reason: str = "") -> DataRow:
    fits = isinstance(value, dict)
    why = f" ({reason})" if reason else ""
    problem = "" if fits else f"{shown.strip()!r}: expected one JSON object{why}"
    return DataRow(f"{path.name}:{number}", f"{path}:{number}", value if fits else None, problem)


def _parquet(path: Path, text_column: str | None, counts: RowCounts | None) -> Iterator[DataRow]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise RequestError(
            f"{path}: reading Parquet needs pyarrow: pip install 'transom[parquet]'"
        ) from None
    number = 0
    with open_bytes(path) as stream:
        source = path if stream.__class__ is io.BufferedReader else io.BytesIO(stream.read())
    try:
        with parquet.ParquetFile(source) as table:
            schema = table.schema_arrow
            twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
            require(not twice, f"{path}: columns", twice, "expected every name once")
            if text_column is not None and not _is_text(schema, text_column):
                expected = f'expected a string column "{text_column}"'
                raise RequestError(f"{path}: columns are {', '.join(schema.names)}: {expected}")
            columns = None if text_column is None else [text_column]
            if counts is not None and columns is not None:
                counts.unread |= set(schema.names) - set(columns)
            for group in range(table.num_row_groups):
                for row in _dicts(table.read_row_group(group, columns=columns)):
                    number += 1
                    id, where = f"{path.name}:{number}", f"{path}:{number}"
                    if row is None:
                        yield DataRow(id, where, None, "expected text in UTF-8")
                    else:
                        yield DataRow(
                            id, where, {key: _without_nulls(value) for key, value in row.items()}
                        )
    except pa.ArrowException as error:
        raise RequestError(f"{path}: not a readable Parquet file ({error})") from None


def _dicts(table: Any) -> Iterable[dict[str, Any] | None]:
    """Return the rows of a table as plain data, None for one with text that is not UTF-8."""
    try:
        rows: list[dict[str, Any] | None] = table.to_pylist()
    except UnicodeDecodeError:
        return [_dict(table.slice(at, 1)) for at in range(table.num_rows)]
    return rows


def _dict(table: Any) -> dict[str, Any] | None:
    try:
        (row,) = table.to_pylist()
    except UnicodeDecodeError:
        return None
    return dict(row)


def _is_text(schema: Any, name: str) -> bool:
    """Return whether a column holds text, plain or as a dictionary (pandas' categories)."""
    import pyarrow as pa

    if name not in schema.names:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_view = getattr(pa.types, "is_string_view", lambda kind: False)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_view(kind))


def _without_nulls(value: Any) -> Any:
    """Return a cell without its null fields: a table writes all fields of a struct."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


# -- the `datasets` library ------------------------------------------------------------------------


def _by_name(name: str, split: str) -> Iterator[DataRow] | None:
    """Return rows of a data set of the hub or its cache; `owner/name:config` names one of
    several.
    """
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise RequestError(
            f"data: got {name!r}; no such file or folder, and data by name needs `datasets`: pip "
            f"install datasets"
        ) from None
    dataset, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(dataset, config or None)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"data: got {name!r}; `datasets` cannot load it ({reason})") from None
    known = next((known for known in SPLITS[split] if known in found), None)
    others = [other for other in found if not any(other in words for words in SPLITS.values())]
    if split == "train" and others:
        notice(f"{name}: splits that are not read: {', '.join(others)}")
    if known is None and split == "train":
        raise RequestError(
            f"data: got {name!r}; its splits are {', '.join(found)}; expected one called train"
        )
    return None if known is None else _numbered(f"{name}:{known}", found[known])


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[DataRow]:
    for number, columns in enumerate(rows, start=1):
        cells = {key: _without_nulls(value) for key, value in columns.items()}
        yield DataRow(f"{name}:{number}", f"{name}:{number}", cells)

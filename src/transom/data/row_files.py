"""Rows of files, of folders with splits, and of the `datasets` library."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
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

# Names of the `datasets` library: owner/name:config.
NAME = re.compile(r"[\w-]+(\.[\w-]+)*(/[\w.-]+)?(:[\w.-]+)?")


class DataRow(NamedTuple):
    """One row of a file or a table.

    Attributes:
        id: The name of the file, and the number of the line or the row from 1.
        where: The same with the whole path.
        columns: The values by key; None if the row can't be read.
        problem: Why it can't be read.
    """

    id: str
    where: str
    columns: dict[str, Any] | None
    problem: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """Return the columns that are not null. Tables have every column in every row."""
        return {key: value for key, value in (self.columns or {}).items() if value is not None}


@dataclass
class RowCounts:
    """What a reader left out: the number of blank lines, and the names of columns of tables."""

    blank: int = 0
    unread: set[str] = field(default_factory=set)


def notice_unread(name: str | Path, unread: Counter[str]) -> None:
    """Print the keys that are not read and the number of rows that have them."""
    if unread:
        words = ", ".join(f"{key} ({count} rows)" for key, count in sorted(unread.items()))
        notice(f"{name}: keys that are not read: {words}")


def rows_of(name: str | Path, split: str = "train") -> Iterator[DataRow] | None:
    """Return the rows of one split in the order of the files, or None if there is no such split.

    A notice lists the files of a folder that are not read.

    Args:
        name: A file, all of which is `train`; a folder with files for each split; or a name of the
            `datasets` library.
        split: `train`, `valid` or `test`.

    Raises:
        RequestError: There is no such data, or it has no rows to train on.
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
    formats = f"that ends in {ROW_NAMES}, a folder of such files, or a name of `datasets`"
    require(known, "data", str(name), f"expected a file {formats}")
    return _by_name(str(name), split)


def has_split(name: str | Path, split: str) -> bool:
    """Return whether a data set has files of a split."""
    path = Path(name).expanduser()
    return split in split_files(path).files if path.is_dir() else rows_of(name, split) is not None


def read_rows(
    path: Path, *, text_column: str | None = None, counts: RowCounts | None = None
) -> Iterator[DataRow]:
    """Return the rows of a file. A malformed row has a `problem`.

    Args:
        path: The file.
        text_column: The only column of a table to read, which must have text.
        counts: Receives what is left out. If it is None, the number of blank lines is printed.

    Raises:
        RequestError: The file is missing, unreadable or of another format.
    """
    format = row_format(path)
    require(format is not None, "data", str(path), f"expected a file that ends in {ROW_NAMES}")
    with readable(path), open_bytes(path) as stream:  # a missing file is an error of this call
        head = stream.read(4096) if format == "json" else b""
    if format == "parquet":
        return _guarded(path, _parquet(path, text_column, counts))
    lines = format != "json" or _is_lines(path, head)
    return _guarded(path, _json_lines(path, counts) if lines else _json_values(path))


def _guarded(path: Path, rows: Iterator[DataRow]) -> Iterator[DataRow]:
    with readable(path):
        yield from rows


def _numbered(
    path: Path | str, number: int | str, columns: dict[str, Any] | None, problem: str = ""
) -> DataRow:
    name = path.name if isinstance(path, Path) else path
    return DataRow(f"{name}:{number}", f"{path}:{number}", columns, problem)


# -- formats of files ------------------------------------------------------------------------------


def _is_lines(path: Path, head: bytes) -> bool:
    """Return whether a .json file has a JSON value on each line rather than one value."""
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return False
    with readable(path), open_bytes(path) as lines:
        first = next((line for line in lines if line.strip()), b"{}")
    try:
        parse_json(first.decode("utf-8-sig"))
    except ValueError:
        # The first line of an object over many lines has no end, that of a malformed row has one.
        return first.strip().endswith(b"}") and first.strip() != b"}"
    return True


def _json_lines(path: Path, counts: RowCounts | None) -> Iterator[DataRow]:
    counted = RowCounts() if counts is None else counts
    with open_bytes(path) as lines:  # str.splitlines would also split at other characters
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                counted.blank += 1
                continue
            value, reason = None, ""
            try:
                value = parse_json(line.decode("utf-8-sig"))
            except ValueError as error:
                reason = str(error)
            yield _json_row(path, number, value, line[:40].decode(errors="replace"), reason)
    if counts is None and counted.blank:
        notice(f"{path}: {counted.blank} empty lines left out")


def _json_values(path: Path) -> Iterator[DataRow]:
    """Yield the items of a list, or one object, with the numbers of the lines they begin in."""
    with open_bytes(path) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: byte {error.start}: not UTF-8; expected JSON") from None
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
                raise ValueError("neither a comma nor the end of the list follows")
        except ValueError as error:
            yield _json_row(path, number, None, text[at:], f"{error}; the rest is not read")
            return
        yield _json_row(path, number, value, text[at : at + 40])
        at = skip_space(text, end + 1) if more else end
    end = skip_space(text, at + is_list)
    if end < len(text):
        line += text.count("\n", counted, end)
        yield _json_row(path, line, None, text[end:], "more after the end of the JSON value")


def _json_row(path: Path, number: int | str, value: Any, shown: str, reason: str = "") -> DataRow:
    """Return a row, or a problem that shows the beginning of its text if it is no object."""
    if isinstance(value, dict):
        return _numbered(path, number, value)
    why = f" ({reason})" if reason else ""
    return _numbered(path, number, None, f"{shown[:40].strip()!r}: expected one JSON object{why}")


def _parquet(path: Path, text_column: str | None, counts: RowCounts | None) -> Iterator[DataRow]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        needs = "reading Parquet needs pyarrow: pip install 'transom[parquet]'"
        raise RequestError(f"{path}: {needs}") from None
    with open_bytes(path) as stream:
        source = path if stream.__class__ is io.BufferedReader else io.BytesIO(stream.read())
    try:
        with parquet.ParquetFile(source) as table:
            columns = _columns(path, table.schema_arrow, text_column, counts)
            groups = (
                table.read_row_group(group, columns=columns)
                for group in range(table.num_row_groups)
            )
            for number, row in enumerate((row for group in groups for row in _dicts(group)), 1):
                problem = "" if row is not None else "expected text in UTF-8"
                yield _numbered(path, number, row, problem)
    except pa.ArrowException as error:
        raise RequestError(f"{path}: not a readable Parquet file ({error})") from None


def _columns(
    path: Path, schema: Any, text_column: str | None, counts: RowCounts | None
) -> list[str] | None:
    """Return the columns of a table to read, None for all of them."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    require(not twice, f"{path}: columns", twice, "expected every name once")
    if text_column is None:
        return None
    expected = f'expected a string column "{text_column}"'
    require(_is_text(schema, text_column), f"{path}: columns", schema.names, expected)
    if counts is not None:
        counts.unread |= set(schema.names) - {text_column}
    return [text_column]


def _dicts(table: Any) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a table without null fields, None for one with text that is not UTF-8."""
    try:
        yield from map(_without_nulls_inside, table.to_pylist())
    except UnicodeDecodeError:
        for at in range(table.num_rows) if table.num_rows > 1 else ():
            yield from _dicts(table.slice(at, 1))
        if table.num_rows == 1:
            yield None


def _without_nulls_inside(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose cells have no null fields. A table has all fields of a struct."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _is_text(schema: Any, name: str) -> bool:
    """Return whether a column has text, plain or as a dictionary (pandas' categories)."""
    import pyarrow as pa

    if name not in schema.names:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_view = getattr(pa.types, "is_string_view", lambda kind: False)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_view(kind))


# -- the `datasets` library ------------------------------------------------------------------------


def _by_name(name: str, split: str) -> Iterator[DataRow] | None:
    """Return the rows of a data set of the hub, as `owner/name` or `owner/name:config`."""
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise RequestError(
            f"data: got {name!r}; no such file or folder, and data by name needs `datasets`: "
            "pip install datasets"
        ) from None
    dataset, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(dataset, config or None)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"data: got {name!r}; `datasets` can't load it ({reason})") from None
    known = next((known for known in SPLITS[split] if known in found), None)
    others = [other for other in found if not any(other in words for words in SPLITS.values())]
    if split == "train" and others:
        notice(f"{name}: splits that are not read: {', '.join(others)}")
    if known is None and split == "train":
        splits = f"its splits are {', '.join(found)}; expected one called train"
        raise RequestError(f"data: got {name!r}; {splits}")
    if known is None:
        return None
    rows = enumerate(found[known], start=1)
    return (_numbered(f"{name}:{known}", at, _without_nulls_inside(row)) for at, row in rows)

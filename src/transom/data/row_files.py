"""Rows of JSON, JSON Lines and Parquet files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from transom.base.errors import RequestError, expect, notice, optional
from transom.base.files import refuse_pointer
from transom.data.file_formats import (
    ROW_NAMES,
    open_bytes,
    parse_json,
    readable,
    row_format,
)
from transom.planning.tables import counted


@dataclass
class LineEnds:
    """Counts the line ends of a file, from its beginning to places that only grow."""

    place: int = 0
    count: int = 0

    def before(self, place: int, stream: BinaryIO) -> int:
        """Return how many there are before `place`, and move the stream there."""
        assert place >= self.place, "pieces are read in their order"
        stream.seek(self.place)
        while block := stream.read(min(1 << 20, place - self.place)):
            self.place += len(block)
            self.count += block.count(b"\n")
        return self.count


class FileRange(NamedTuple):
    """A range of bytes of a file of rows, and the rows that begin there.

    Attributes:
        first: The first byte.
        last: The byte after the last one.
        ends: The line ends before the range. All pieces of a file have the same object.
    """

    first: int
    last: float
    ends: LineEnds


WHOLE_FILE = FileRange(0, math.inf, LineEnds())


class DataRow(NamedTuple):
    """One row of a file or a table.

    Attributes:
        id: The name of the file, and the number of the line or the row from 1.
        where: The same with the whole path.
        values: The values by key; None if the row can't be read.
        problem: Why it can't be read.
    """

    id: str
    where: str
    values: dict[str, Any] | None
    problem: str = ""

    @property
    def columns(self) -> dict[str, Any]:
        """Return the values by key. Raise `RequestError` if the row can't be read."""
        if self.values is None:
            raise RequestError(self.problem)
        return self.values

    @property
    def given(self) -> dict[str, Any]:
        """Return the columns that are not null. Tables have every column in every row."""
        return {key: value for key, value in self.columns.items() if value is not None}


def read_rows(
    path: Path,
    only: str | None = None,
    piece: FileRange = WHOLE_FILE,
    notes: Counter[str] | None = None,
) -> Iterator[DataRow]:
    """Yield the rows of a file. A malformed row has a `problem`.

    Args:
        path: The file.
        only: The only column of a table to read, if it has it. The others are null.
        piece: Which rows of JSON Lines and Parquet files to read.
        notes: Counts blank lines, for which there is a notice otherwise.

    Raises:
        RequestError: The file is missing, unreadable or of another format.
    """
    format = row_format(path)
    expect(format is not None, "data", str(path), f"a file that ends in {ROW_NAMES}")
    with readable(path):
        if format == "parquet":
            yield from _parquet(path, only, piece)
        else:
            yield from (_json_lines if format == "lines" else _json_file)(path, piece, notes)


def numbered_row(
    path: Path | str, number: int, columns: dict[str, Any] | None, problem: str = ""
) -> DataRow:
    """Return row `number` of a file or a table."""
    name = path.name if isinstance(path, Path) else path
    return DataRow(f"{name}:{number}", f"{path}:{number}", columns, problem)


# -- formats of files ------------------------------------------------------------------------------


def _json_lines(path: Path, piece: FileRange, notes: Counter[str] | None) -> Iterator[DataRow]:
    blank, before, place = 0, 0, piece.first
    with open_bytes(path) as lines:  # str.splitlines would also split at other characters
        if place:  # the line that has the byte before belongs to another piece
            before = piece.ends.before(place - 1, lines) + 1
            place += len(lines.readline()) - 1
        for number, line in enumerate(lines, start=before + 1):
            if place >= piece.last:
                break
            place += len(line)
            if line.strip():
                value, reason = _parsed(line)
                yield _json_row(path, number, value, line, reason)
            else:
                blank += 1
    if notes is not None:
        notes["empty lines left out"] += blank
    elif blank:
        notice(f"{path}: {counted(blank, 'empty line')} left out")


def _json_file(path: Path, piece: FileRange, notes: Counter[str] | None) -> Iterator[DataRow]:
    """Yield the rows of a .json file: its lines, the items of its list, or its one object."""
    with open_bytes(path) as lines:
        first = next((line for line in lines if line.strip()), b"")
    if isinstance(_parsed(first)[0], dict):
        yield from _json_lines(path, piece, notes)
        return
    with open_bytes(path) as stream:
        content = stream.read()
    value, reason = _parsed(content)
    if isinstance(value, list):
        for number, item in enumerate(value, start=1):
            yield _json_row(path, number, item)
    else:
        yield _json_row(path, 1, value, content, reason)


def _parsed(content: bytes) -> tuple[Any, str]:
    """Return the value of a JSON text in UTF-8, and the reason if it has none."""
    try:
        return parse_json(content.decode("utf-8-sig")), ""
    except ValueError as error:
        return None, f" ({error})"


def _json_row(path: Path, number: int, value: Any, text: bytes = b"", reason: str = "") -> DataRow:
    """Return a row, or a problem that shows the beginning of its text if it is no object."""
    if isinstance(value, dict):
        return numbered_row(path, number, value)
    shown = text[:40].decode(errors="replace").strip() or str(value)[:40]
    return numbered_row(path, number, None, f"{shown!r}: expected one JSON object{reason}")


def _parquet(path: Path, only: str | None, piece: FileRange) -> Iterator[DataRow]:
    needs = f"{path}: reading Parquet needs pyarrow: pip install 'transom[parquet]'"
    pa, parquet = optional("pyarrow", needs), optional("pyarrow.parquet", needs)
    refuse_pointer(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            expect(not twice, f"{path}: columns", twice, "every name once")
            # The byte at which a row group begins is estimated from the number of rows before it.
            metadata, size = table.metadata, path.stat().st_size
            sizes = (metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))
            *rows, end = accumulate(sizes, initial=0)
            places = [size * row // max(1, end) for row in rows]
            groups = [at for at, place in enumerate(places) if piece.first <= place < piece.last]
            number = rows[groups[0]] if groups else 0
            for batch in table.iter_batches(
                row_groups=groups, columns=[only] if only in names else None
            ):
                for row in batch.to_pylist():
                    number += 1
                    columns = {**dict.fromkeys(names), **without_nulls(row)}
                    yield numbered_row(path, number, columns)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        where = f"{path}: not a readable Parquet file after row {number}"
        raise RequestError(f"{where} ({error})") from None


def without_nulls(value: Any) -> Any:
    """Return a value of a table without null fields. A table has all fields of a struct."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value

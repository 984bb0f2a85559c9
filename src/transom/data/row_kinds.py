"""Kinds of rows, each described by its keys, and rows read as objects of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from transom.base.errors import Problem, RequestError, expect, located, nearest, notice
from transom.data.row_files import DataRow
from transom.planning.tables import counted

T = TypeVar("T")
Columns = Mapping[str, Any]


class RowKind(NamedTuple, Generic[T]):
    """A kind of rows.

    Attributes:
        name: The name of the kind.
        needs: The keys that tell the kind.
        reads: Other keys that are read.
        make: Returns the object of a row from the columns that are read and its id. Raises
            `RequestError` for a malformed row.
        unread_inside: Returns the keys that are not read inside of the columns that are read.
    """

    name: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    make: Callable[[Columns, str], T]
    unread_inside: Callable[[Columns], set[str]] = lambda _: set()

    def read(self, columns: Columns) -> dict[str, Any]:
        """Return the columns that are read."""
        return {key: columns[key] for key in (*self.needs, *self.reads) if key in columns}


def recognise(columns: Columns, kinds: Sequence[RowKind[T]]) -> RowKind[T]:
    """Return the kind of a row: the first one whose keys it has."""
    for one in kinds:
        if all(key in columns for key in one.needs):
            return one
    keys = sorted(columns)
    expect(bool(keys), "columns", None, "a row with a value; all are null")
    known = [key for one in kinds for key in one.needs]
    hint = next((hint for key in keys if (hint := nearest(key, known))), "")
    expected = "; ".join(" and ".join(one.needs) for one in kinds)
    raise RequestError(f"keys: got {keys}; expected rows with {expected}{hint}")


def read_as(
    name: str | Path,
    rows: Iterable[DataRow],
    kinds: Sequence[RowKind[T]],
    problems: list[Problem] | None = None,
) -> Iterator[T]:
    """Yield the objects of rows, which all have the same kind.

    A notice counts the keys that are not read.

    Args:
        name: The data set, for messages.
        rows: The rows.
        kinds: The kinds that they may have.
        problems: Receives the malformed rows. If it is None, the first of them raises an error.

    Raises:
        RequestError: There is no row, or a row is malformed.
    """
    found, empty = None, True
    unread: Counter[str] = Counter()
    for row in rows:
        empty = False
        with located(row.where, problems):
            columns = row.given
            kind = recognise(columns, kinds)
            expected = f"{found} in every row, like the rows before"
            expect(found in (None, kind.name), "kind of row", kind.name, expected)
            read = kind.read(columns)
            made = kind.make(read, row.id)
            found = kind.name
            unread.update(columns.keys() - read.keys() | kind.unread_inside(read))
            yield made
    if unread:
        each = (f"{key} ({counted(count, 'row')})" for key, count in sorted(unread.items()))
        words = ", ".join(each)
        notice(f"{name}: keys that are not read: {words}")
    expect(not empty, "data", str(name), "one row or more")


def text_of(value: Any, name: str) -> str:
    """Return a text. Raise `RequestError` if it is empty or no text."""
    expect(isinstance(value, str) and bool(value.strip()), name, value, "text that is not empty")
    return str(value)

"""Data sets for fine-tuning by name: a file, a folder of splits, `stdlib-docs`, a name of
`datasets`. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transom.base.errors import RequestError, notice, require
from transom.data.chat.conversations import ChatExample, recognise
from transom.data.chat.instructions import NAME as STDLIB
from transom.data.chat.instructions import stdlib_instructions
from transom.data.row_files import has_split, notice_unread, rows_of
from transom.data.split_files import split_files
from transom.data.text.sources import held_out


class Problem(NamedTuple):
    """A row that cannot be used: its file and line, and one sentence."""

    where: str
    sentence: str


def read_examples(
    name: str | Path, split: str = "train", problems: list[Problem] | None = None
) -> list[ChatExample]:
    """Examples of one split, all of one format; malformed rows are added to `problems`, or the
    first is refused.

    A split that the data does not have is a `RequestError`; keys that nothing reads are counted and
    said.
    """
    if str(name) == STDLIB:
        require(split == "train", "split", split, f"valid only for {STDLIB} is train")
        return stdlib_instructions()
    rows = rows_of(name, split)
    if rows is None:
        raise RequestError(
            f"split: got {split!r}; {name} has no such rows; expected one that it has"
        )
    examples: list[ChatExample] = []
    found: str | None = None
    unread: Counter[str] = Counter()
    for row in rows:
        try:
            if row.columns is None:
                raise RequestError(row.problem)
            format = recognise(row.given)
            if found is not None and format.name != found:
                raise RequestError(
                    f"{format.name}, where rows before are {found}; expected one format in a set"
                )
            examples.append(format.example(row.given, row.id))
            found = format.name
            unread.update(format.unread(row.given))
        except RequestError as error:
            if problems is None:
                raise RequestError(f"{row.where}: {error}") from None
            problems.append(Problem(row.where, str(error)))
    notice_unread(name, unread)
    if not examples and not problems:
        raise RequestError(f"{name}: no rows; expected one or more")
    return examples


def read_splits(name: str | Path, fraction: float) -> tuple[list[ChatExample], list[ChatExample]]:
    """(examples to train on, examples to measure with): the data's own `valid`, else `fraction` by
    hash of ids.
    """
    train = read_examples(name)
    if str(name) != STDLIB and Path(name).is_dir():
        unused = [path.name for path in split_files(Path(name)).files.get("test", ())]
        if unused:
            notice(
                f"{name}: the split test is neither trained on nor measured with: "
                f"{', '.join(unused[:8])}"
            )
    if has_own_valid(name):
        return train, read_examples(name, "valid")
    return split_examples(train, fraction)


def split_examples(
    examples: Sequence[ChatExample], fraction: float
) -> tuple[list[ChatExample], list[ChatExample]]:
    """Return (examples to train on, examples to measure with): `fraction` of them by the hash of
    their ids.

    Nothing is measured with where nothing would be left to train on.
    """
    measured = [example for example in examples if held_out(_document(example), fraction)]
    train = [example for example in examples if not held_out(_document(example), fraction)]
    return (train, measured) if train else (measured, [])


def has_own_valid(name: str | Path) -> bool:
    """Return whether a data set has a split to measure with, so that nothing is held out of
    `train`.
    """
    return str(name) != STDLIB and has_split(name, "valid")


def _document(example: ChatExample) -> str:
    """What examples made of one docstring share, so that none of them tells the answers to the
    others.
    """
    return example.id.partition("#")[0] if example.id.startswith(f"{STDLIB}:") else example.id

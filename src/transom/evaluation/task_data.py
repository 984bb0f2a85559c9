"""Rows of an evaluation out of files of rows: questions with choices, and prompts with accepted
answers.

What a file holds is seen from the keys of its first row, and every row after it must be of the same
kind. No torch.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import RequestError, require
from transom.data.file_formats import row_format
from transom.data.row_files import DataRow, notice_unread, read_rows
from transom.data.text.sources import TEXT_KEY, SourceArgs, read_documents

Kind = Literal["text", "choices", "answers"]
PROMPT_KEYS = ("prompt", "question")
CHOICES_KEY, ANSWER_KEY, MESSAGES_KEY = "choices", "answer", "messages"
KNOWN = {*PROMPT_KEYS, CHOICES_KEY, ANSWER_KEY, MESSAGES_KEY}
ACCEPTED = (
    f'expected lines with "{TEXT_KEY}", with "prompt" (or "question"), "choices" and '
    f'"answer", or with '
    '"prompt" (or "question", or "messages") and "answer"'
)


@dataclass(frozen=True)
class ChoiceRow:
    """A question and its choices, of which `answer` is the index of the right one."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class AnswerRow:
    """A prompt, as text or as messages, and the answers that are accepted."""

    id: str
    prompt: str
    messages: tuple[Mapping[str, Any], ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class DataSet:
    """One --data: a source of text, or the rows of a file."""

    path: str
    kind: Kind
    choices: list[ChoiceRow]
    answers: list[AnswerRow]


def open_data(paths: Sequence[str], limit: int | None = None) -> list[DataSet]:
    """Data sets by their content; every row of a task is checked, and that files of text are
    there.
    """
    out = []
    for path in paths:
        kind = kind_of(path)
        if kind == "text":
            read_documents(SourceArgs(path))  # lists its files, which must be there
        choices = read_choices(path, limit) if kind == "choices" else []
        answers = read_answers(path, limit) if kind == "answers" else []
        out.append(DataSet(path, kind, choices, answers))
    return out


def kind_of(path: str) -> Kind:
    """Return what a source holds: the first row of a file of rows decides, and all else is text."""
    file = Path(path)
    if row_format(file) is None or not file.is_file():
        return "text"
    first, row = next(_lines(file), (None, None))
    if first is None or row is None:
        raise RequestError(f"{file}: no row with anything in it; {ACCEPTED}")
    if CHOICES_KEY in first:
        return "choices"
    if ANSWER_KEY in first:
        return "answers"
    if TEXT_KEY in first:
        return "text"
    raise RequestError(f"{row.where}: keys are {', '.join(first) or 'none'}; {ACCEPTED}")


def read_choices(path: str, limit: int | None = None) -> list[ChoiceRow]:
    """The first `limit` rows {"prompt" or "question", "choices", "answer"} of a file; an answer is
    one of three.

    It is the index of a choice from 0, its letter from A, or its text.
    """
    return [
        ChoiceRow(
            row.id, _prompt(columns, row.where), choices, _answer(columns, choices, row.where)
        )
        for columns, row in _rows(path, limit)
        for choices in [_choices(columns, row.where)]
    ]


def read_answers(path: str, limit: int | None = None) -> list[AnswerRow]:
    """The first `limit` rows {"prompt", "question" or "messages", "answer": text or list of texts}
    of a file.
    """
    out = []
    for columns, row in _rows(path, limit):
        where = row.where
        if CHOICES_KEY in columns:
            raise RequestError(
                f"{where}: has choices, and the rows before it have none; expected one kind a file"
            )
        given = columns.get(ANSWER_KEY)
        answers = [given] if isinstance(given, str) else given
        fits = (
            isinstance(answers, list)
            and bool(answers)
            and all(isinstance(one, str) for one in answers)
        )
        require(fits, f"{where}: answer", given, "expected a text or a list of texts")
        messages = _messages(columns, where) if MESSAGES_KEY in columns else ()
        prompt = "" if messages else _prompt(columns, where)
        out.append(AnswerRow(row.id, prompt, messages, tuple(answers or ())))
    return out


def _rows(path: str, limit: int | None) -> Iterator[tuple[dict[str, Any], DataRow]]:
    """Yield the content and the place of each row; print the keys of the file that nothing
    reads.
    """
    unread: Counter[str] = Counter()
    for columns, row in itertools.islice(_lines(Path(path)), limit):
        unread.update(set(columns) - KNOWN)
        yield columns, row
    notice_unread(path, unread)


def _lines(file: Path) -> Iterator[tuple[dict[str, Any], DataRow]]:
    """Yield the columns that are not null and the place of each row; one that cannot be read is
    refused.
    """
    for row in read_rows(file):
        if row.columns is None:
            raise RequestError(f"{row.where}: {row.problem}")
        yield row.given, row


def _prompt(row: Mapping[str, Any], where: str) -> str:
    given = [key for key in PROMPT_KEYS if key in row]
    if len(given) != 1 or not isinstance(row[given[0]], str) or not row[given[0]]:
        name = given[0] if given else "prompt"
        require(
            False,
            f"{where}: {name}",
            row.get(name),
            'expected one text, under "prompt" or "question"',
        )
    return str(row[given[0]])


def _messages(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    messages = row[MESSAGES_KEY]
    fits = (
        isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)
    )
    if not fits or any(key in row for key in PROMPT_KEYS):
        raise RequestError(
            f"{where}: messages: expected a list of objects, and no prompt beside them"
        )
    return tuple(messages)


def _choices(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    choices = row.get(CHOICES_KEY)
    fits = (
        isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(one, str) and one for one in choices)
    )
    expected = "expected a list of two texts or more, and no messages beside it"
    require(fits and MESSAGES_KEY not in row, f"{where}: choices", choices, expected)
    return tuple(choices or ())


def _answer(row: Mapping[str, Any], choices: Sequence[str], where: str) -> int:
    """The index that an answer means; one that means two things is refused."""
    answer = row.get(ANSWER_KEY)
    letters = string.ascii_uppercase[: len(choices)]
    meant = {answer} if type(answer) is int and 0 <= answer < len(choices) else set[int]()
    if isinstance(answer, str):
        meant = {index for index, choice in enumerate(choices) if choice == answer}
        meant |= {letters.index(answer)} if len(answer) == 1 and answer in letters else set()
    means = "means more than one choice" if meant else "means no choice"
    expected = (
        f"{means}; expected a number from 0 to {len(choices) - 1}, a letter from {letters[:1]} to "
        f"{letters[-1:]}, or the text of one choice"
    )
    require(len(meant) == 1, f"{where}: answer", answer, expected)
    return meant.pop()

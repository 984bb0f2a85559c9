"""Data sets to evaluate on, and what a model scores on them.

A data set is text, questions with choices, or prompts with accepted answers.

The keys of the first row of a file decide what the file holds, and all its rows must be of that
kind. This module does not import torch.
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
from transom.base.files import sha256_of
from transom.data.file_formats import row_format
from transom.data.row_files import DataRow, notice_unread, read_rows
from transom.data.text.sources import SourceArgs, read_documents
from transom.evaluation.intervals import Ratio

TaskKind = Literal["text", "choices", "answers"]
PROMPT_KEYS = ("prompt", "question")
KNOWN = {*PROMPT_KEYS, "choices", "answer", "messages"}
EXPECTED = (
    'expected lines with "text", with "prompt" (or "question"), "choices" and "answer", or with '
    '"prompt" (or "question", or "messages") and "answer"'
)


@dataclass(frozen=True)
class ChoiceRow:
    """A question and its choices. `answer` is the index of the right choice."""

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
    """A source of text, or the rows of a file with the hash of the file."""

    path: str
    kind: TaskKind
    choices: Sequence[ChoiceRow] = ()
    answers: Sequence[AnswerRow] = ()
    sha256: str = ""


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What a model scored on one data set.

    Attributes:
        data: The data set.
        sha256: Hash of a file of rows; for text that of all ids and texts, as in run.json.
        scores: Scores by name. Their units, documents or rows, are those of `rows`.
        facts: Counts and settings.
        rows: The result of each document or row.
        seconds: How long it took.
    """

    data: DataSet
    sha256: str
    scores: dict[str, Ratio]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    seconds: float = 0.0


def open_data(paths: Sequence[str], limit: int | None = None) -> list[DataSet]:
    """Return the data sets of some paths, with the first `limit` rows of each file of rows.

    Raises:
        RequestError: A row is wrong, or a text file is missing.
    """
    out = []
    for path in paths:
        kind = kind_of(path)
        if kind == "text":
            read_documents(SourceArgs(path))  # lists the files, which must exist
            out.append(DataSet(path, kind))
        elif kind == "choices":
            out.append(DataSet(path, kind, read_choices(path, limit), (), sha256_of(Path(path))))
        else:
            out.append(DataSet(path, kind, (), read_answers(path, limit), sha256_of(Path(path))))
    return out


def kind_of(path: str) -> TaskKind:
    """Return what a source holds: the first row decides for a file of rows; all else is text."""
    file = Path(path)
    if row_format(file) is None or not file.is_file():
        return "text"
    first, row = next(_lines(file), (None, None))
    if first is None or row is None:
        raise RequestError(f"{file}: no row with content; {EXPECTED}")
    kinds: dict[str, TaskKind] = {"choices": "choices", "answer": "answers", "text": "text"}
    kind = next((kinds[key] for key in kinds if key in first), None)
    if kind is None:
        raise RequestError(f"{row.where}: got the keys {', '.join(first) or 'none'}; {EXPECTED}")
    return kind


def read_choices(path: str, limit: int | None = None) -> list[ChoiceRow]:
    """Return the first `limit` rows {"prompt" or "question", "choices", "answer"} of a file.

    The answer is the index of a choice from 0, its letter from A, or its text.
    """
    out = []
    for columns, row in _rows(path, limit):
        choices: Any = columns.get("choices")
        fits = _is_list(choices, str, 2) and all(choices) and "messages" not in columns
        expected = "expected a list of two texts or more, and no messages"
        require(fits, f"{row.where}: choices", choices, expected)
        answer = _answer(columns.get("answer"), choices, row.where)
        out.append(ChoiceRow(row.id, _prompt(columns, row.where), tuple(choices), answer))
    return out


def read_answers(path: str, limit: int | None = None) -> list[AnswerRow]:
    """Return the first `limit` rows {"prompt", "question" or "messages", "answer"} of a file.

    The answer is a text or a list of texts.
    """
    out = []
    for columns, row in _rows(path, limit):
        if "choices" in columns:
            raise RequestError(
                f"{row.where}: has choices, unlike the rows before it; expected one kind per file"
            )
        given, messages = columns.get("answer"), columns.get("messages", [])
        answers: Any = [given] if isinstance(given, str) else given
        fits = _is_list(answers, str, 1)
        require(fits, f"{row.where}: answer", answers, "expected a text or a list of texts")
        if "messages" in columns:
            fits = _is_list(messages, dict, 1) and not columns.keys() & set(PROMPT_KEYS)
            expected = "expected a list of objects, and no prompt beside them"
            require(fits, f"{row.where}: messages", messages, expected)
        prompt = "" if messages else _prompt(columns, row.where)
        out.append(AnswerRow(row.id, prompt, tuple(messages), tuple(answers)))
    return out


def _rows(path: str, limit: int | None) -> Iterator[tuple[dict[str, Any], DataRow]]:
    """Yield the columns and the place of each row; print which keys are not read."""
    unread: Counter[str] = Counter()
    for columns, row in itertools.islice(_lines(Path(path)), limit):
        unread.update(set(columns) - KNOWN)
        yield columns, row
    notice_unread(path, unread)


def _lines(file: Path) -> Iterator[tuple[dict[str, Any], DataRow]]:
    """Yield the columns that are not null and the place of each row."""
    for row in read_rows(file):
        if row.columns is None:
            raise RequestError(f"{row.where}: {row.problem}")
        yield row.given, row


def _is_list(value: Any, kind: type, least: int) -> bool:
    """Return whether a value is a list of `least` items or more, all of a type."""
    fits = isinstance(value, list) and len(value) >= least
    return fits and all(isinstance(one, kind) for one in value)


def _prompt(columns: Mapping[str, Any], where: str) -> str:
    given = [key for key in PROMPT_KEYS if key in columns]
    name = given[0] if given else "prompt"
    prompt = columns.get(name)
    fits = len(given) == 1 and isinstance(prompt, str) and bool(prompt)
    require(fits, f"{where}: {name}", prompt, 'expected one text, under "prompt" or "question"')
    return str(prompt)


def _answer(answer: Any, choices: Sequence[str], where: str) -> int:
    """Return the index of the one choice that `answer` means."""
    letters = string.ascii_uppercase[: len(choices)]
    meant: set[int] = set()
    if type(answer) is int and 0 <= answer < len(choices):
        meant = {answer}
    elif isinstance(answer, str):
        meant = {index for index, choice in enumerate(choices) if choice == answer}
        meant |= {letters.index(answer)} if len(answer) == 1 and answer in letters else set()
    expected = (
        f"means {'more than one choice' if meant else 'no choice'}; expected a number from 0 to "
        f"{len(choices) - 1}, a letter from {letters[:1]} to {letters[-1:]}, or the text of one"
    )
    require(len(meant) == 1, f"{where}: answer", answer, expected)
    return meant.pop()

"""Data sets to evaluate on, and what a model scores on them.

A data set is text, questions with choices, or prompts with accepted answers.

The keys of the first row of a file decide what the file holds, and all its rows must be of that
kind. This module does not import torch.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from transom.base.errors import RequestError, expect, located, require
from transom.base.files import sha256_of
from transom.data.file_formats import row_format
from transom.data.row_files import read_rows
from transom.data.row_kinds import Columns, RowKind, read_as, recognise
from transom.data.text.sources import SourceArgs, read_documents
from transom.evaluation.intervals import Ratio

TaskKind = Literal["text", "choices", "answers"]
PROMPT_KEYS = ("prompt", "question")
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
        else:
            rows = {kind: read_tasks(path, limit)}
            out.append(DataSet(path, kind, **rows, sha256=sha256_of(Path(path))))
    return out


def kind_of(path: str) -> TaskKind:
    """Return what a source holds: the first row decides for a file of rows; all else is text."""
    file = Path(path)
    if row_format(file) is None or not file.is_file():
        return "text"
    row = next(read_rows(file), None)
    expect(row is not None, "data", path, f"one row or more with {EXPECTED}")
    assert row is not None, "checked in the line before"
    with located(row.where):
        return cast(TaskKind, recognise(row.given, KINDS).name)


def read_tasks(path: str, limit: int | None = None) -> list[Any]:
    """Return the first `limit` rows of a file, all as `ChoiceRow` or all as `AnswerRow`.

    Rows have the keys "prompt" (or "question"), "choices" and "answer", where the answer is the
    index of a choice from 0, its letter from A, or its text; or the keys "prompt", "question" or
    "messages", and "answer", which is a text or a list of texts.

    Raises:
        RequestError: A row is malformed, or it has another kind than the rows before.
    """
    return list(read_as(path, islice(read_rows(Path(path)), limit), KINDS))


def _choices(row: Columns, id: str) -> ChoiceRow:
    choices = row["choices"]
    fits = _is_list(choices, str, 2) and all(choices) and "messages" not in row
    expect(fits, "choices", choices, "a list of two texts or more, and no messages")
    return ChoiceRow(id, _prompt(row), tuple(choices), _answer(row["answer"], choices))


def _answers(row: Columns, id: str) -> AnswerRow:
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    expect(_is_list(answers, str, 1), "answer", row["answer"], "a text or a list of texts")
    messages = row.get("messages", [])
    if "messages" in row:
        fits = _is_list(messages, dict, 1) and not row.keys() & set(PROMPT_KEYS)
        expect(fits, "messages", messages, "a list of objects, and no prompt beside them")
    return AnswerRow(id, "" if messages else _prompt(row), tuple(messages), tuple(answers))


def _text(row: Columns, id: str) -> Any:
    raise RequestError("row: got a text; expected questions in a file of questions")


PROMPTS = (*PROMPT_KEYS, "messages")
KINDS: tuple[RowKind[Any], ...] = (
    RowKind("choices", ("choices", "answer"), PROMPTS, _choices),
    RowKind("answers", ("answer",), PROMPTS, _answers),
    RowKind("text", ("text",), (), _text),
)


def _is_list(value: Any, kind: type, least: int) -> bool:
    """Return whether a value is a list of `least` items or more, all of a type."""
    fits = isinstance(value, list) and len(value) >= least
    return fits and all(isinstance(one, kind) for one in value)


def _prompt(row: Columns) -> str:
    given = [key for key in PROMPT_KEYS if key in row]
    name = given[0] if given else "prompt"
    prompt = row.get(name)
    fits = len(given) == 1 and isinstance(prompt, str) and bool(prompt)
    expect(fits, name, prompt, 'one text, under "prompt" or "question"')
    return str(prompt)


def _answer(answer: Any, choices: Sequence[str]) -> int:
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
    require(len(meant) == 1, "answer", answer, expected)
    return meant.pop()

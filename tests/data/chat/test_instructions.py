"""The embedded set: what it asks about the library of this machine is true."""

from __future__ import annotations

import ast
import calendar
import importlib
import inspect
import json
import textwrap
from collections import Counter
from typing import Any

import pytest

from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import read_examples, split_examples


def examples_of(*given: Any, **more: Any) -> list[ChatExample]:
    return list(read_examples(*given, **more))


@pytest.fixture(scope="module")
def made() -> list[ChatExample]:
    return examples_of("stdlib-docs")


def test_there_are_thousands_of_short_ones_and_none_twice(made: list[ChatExample]) -> None:
    assert 3000 < len(made) < 9000
    assert {example.kind for example in made} == {"chat"} and {
        len(example.messages) for example in made
    } == {2}
    questions = [example.messages[0]["content"] for example in made]
    assert len(set(questions)) == len(questions) == len({example.id for example in made})
    assert max(len(m["content"]) for example in made for m in example.messages) <= 300
    kinds = Counter(example.id.rpartition("#")[2] for example in made)
    assert set(kinds) == {"what", "signature", "which", "where"} and min(kinds.values()) > 300


def test_answers_are_those_of_the_library_itself(made: list[ChatExample]) -> None:
    answers = {example.messages[0]["content"]: example.messages[1]["content"] for example in made}
    for module, name in (
        (calendar, "monthrange"),
        (textwrap, "dedent"),
        (inspect, "getdoc"),
        (json, "dumps"),
    ):
        paragraph = " ".join((inspect.getdoc(getattr(module, name)) or "").split("\n\n")[0].split())
        said = answers.get(f"What does `{module.__name__}.{name}` do?")
        assert said == paragraph or (said is None and not paragraph.endswith("."))
    assert "What does `calendar.monthrange` do?" in answers
    assert (
        answers["Write the signature of `calendar.monthrange`."]
        == "`calendar.monthrange(year, month)`"
    )
    assert answers["Which module has `monthrange`?"] == "`monthrange` is in the module `calendar`."


def test_signatures_are_those_that_python_sees(made: list[ChatExample]) -> None:
    safe = (
        "calendar",
        "inspect",
        "json",
        "shutil",
        "statistics",
        "textwrap",
        "ast",
        "difflib",
        "fnmatch",
    )
    compared = 0
    for example in made:
        name, _, kind = example.id.removeprefix("stdlib-docs:").partition("#")
        module, _, last = name.rpartition(".")
        if kind == "signature" and module in safe:
            function = inspect.unwrap(getattr(importlib.import_module(module), last))
            call = ast.parse(
                example.messages[1]["content"].strip("`").replace(name, "def f", 1) + ": pass"
            )
            assert isinstance(call.body[0], ast.FunctionDef)
            given = [one.arg for one in ast.walk(call.body[0].args) if isinstance(one, ast.arg)]
            assert sorted(given) == sorted(inspect.signature(function).parameters), name
            compared += 1
    assert compared > 30


def test_the_set_has_a_name_and_is_held_out_by_what_it_is_about(made: list[ChatExample]) -> None:
    train, measured = split_examples("stdlib-docs", 0.1)
    assert len(train) + len(measured) == len(made) and 0.05 < len(measured) / len(made) < 0.15
    # No question about what another one tells the answer of.
    documents = [{example.id.partition("#")[0] for example in part} for part in (train, measured)]
    assert not documents[0] & documents[1]

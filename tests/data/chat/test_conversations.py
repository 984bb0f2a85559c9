"""Rows of every format as examples, and what is refused, by file and line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from tests.chat.chat_texts import CALL, TOOLS
from transom.base.errors import Problem, RequestError
from transom.data.chat.conversations import ChatExample, example_of
from transom.data.chat.finetune_sets import read_examples, split_examples
from transom.data.data_sets import rows_of

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [USER, ANSWER]


def examples_of(*given: Any, **more: Any) -> list[ChatExample]:
    return list(read_examples(*given, **more))


def example(row: dict[str, Any]) -> ChatExample:
    return example_of(row, "f:1")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


# Formats


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": CHAT},
        {"messages": json.dumps(CHAT)},  # as many tables keep them
        {"conversations": json.dumps(CHAT)},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)
def test_conversations_become_messages(row: dict[str, Any]) -> None:
    assert example(row) == ChatExample("f:1", "chat", tuple(CHAT))


def test_alpaca_and_sharegpt_have_systems_and_inputs() -> None:
    asked = example({"instruction": "q", "input": "x", "output": "a", "system": "s"})
    assert [m["content"] for m in asked.messages] == ["s", "q\n\nx", "a"]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
    shared = example({"conversations": turns, "system": "s", "tools": json.dumps(TOOLS)})
    assert [m["role"] for m in shared.messages] == ["system", "user", "assistant"]
    assert shared.tools == tuple(TOOLS) and shared.messages[2]["weight"] == 0


@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city":  "Köln"}', "", None])
def test_calls_stay_as_they_are_given(arguments: Any) -> None:
    """The chat template decides whether it wants an object or text; no arguments are an empty
    object.
    """
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": TOOLS,
    }
    kept = {"type": "function", "function": {"name": "weather", "arguments": arguments or {}}}
    assert example(row).messages[1] == {"role": "assistant", "tool_calls": [kept]}
    row["messages"][1]["tool_calls"] = json.dumps([call])
    assert example(row).messages[1] == {"role": "assistant", "tool_calls": [kept]}


def test_weights_are_kept() -> None:
    made = example(
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 0.5}], "weight": 2}
    )
    assert [m.get("weight") for m in made.messages] == [None, 0.0, None, 0.5] and made.weight == 2.0


def test_prompts_and_completions_are_texts_or_messages() -> None:
    bare = example({"prompt": "q", "completion": "a"})
    assert bare == ChatExample("f:1", "completion", (USER,), ((ANSWER,),), bare=True)
    assert example({"prompt": [USER], "completion": [ANSWER]}) == ChatExample(
        "f:1", "completion", (USER,), ((ANSWER,),)
    )
    labelled = example({"prompt": "q", "completion": "a", "label": False})
    assert labelled == ChatExample("f:1", "label", (USER,), ((ANSWER,),), label=False, bare=True)


# As TRL 1.16 `extract_prompt` splits them (trl/data_utils.py); an explicit prompt stays as it is.
PAIRS = [
    (
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
        "q",
        ("a", "b"),
        False,
    ),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "The sky is",
        (" blue.", " green."),
        True,
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ("a", "b"), True),
    ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "q", ("a", "b"), False),
    (
        {"prompt": "q", "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
        "q",
        ("a", "b"),
        False,
    ),
    (
        {"prompt": "q", "chosen": CHAT, "rejected": [USER, {**ANSWER, "content": "b"}]},
        "q",
        ("a", "b"),
        False,
    ),
    (
        {"prompt": [USER], "chosen": CHAT, "rejected": [USER, {**ANSWER, "content": "b"}]},
        "q",
        ("a", "b"),
        False,
    ),
]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # TRL ends the prompt after "bl"
        ("The sky", "The sky is blue", "The"),  # TRL's answer is "y"
        ("The sky ", "The sky is", "The"),
        ("a b1", "a b22", "a"),
        ("so (x)", "so (y)", "so"),
        ("q:\nyes", "q:\nno", "q:\n"),
        ("q:\n\nyes", "q:\n\n\nno", "q:"),
        ("q:\tyes", "q:\tno", "q:"),
        ("q:  yes", "q: no", "q:"),
        ("天气很好", "天气很坏", "天气很"),
        ("is e\u0301", "is e\u0300", "is"),
    ],
)
def test_a_shared_prompt_ends_where_a_word_does(chosen: str, rejected: str, prompt: str) -> None:
    made = example({"chosen": chosen, "rejected": rejected})
    assert made.messages[0]["content"] == prompt
    assert [prompt + str(answer[0]["content"]) for answer in made.answers] == [chosen, rejected]


@pytest.mark.parametrize(("row", "prompt", "answers", "bare"), PAIRS)
def test_pairs_share_a_prompt(
    row: dict[str, Any], prompt: str, answers: tuple[str, str], bare: bool
) -> None:
    # Sets of pairs often keep the chosen conversation under `messages` as well.
    made = example({**row, "messages": CHAT})
    assert (made.kind, made.messages, made.bare) == (
        "pair",
        ({"role": "user", "content": prompt},),
        bare,
    )
    assert made.answers == tuple(({"role": "assistant", "content": text},) for text in answers)


def test_prompts_with_an_answer_to_compare_with() -> None:
    made = example({"prompt": "1 + 1?", "answer": 2, "tests": None})
    assert (made.kind, made.bare, made.reference) == ("answer", True, {"answer": 2})
    assert example({"messages": [USER], "solution": "a"}).kind == "answer"
    assert example({"messages": CHAT, "solution": "a"}).kind == "chat"  # it is answered already


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"mesages": CHAT},
            "keys: got ['mesages']; expected rows with chosen and rejected; .*did you mean 'messages'",
        ),
        ({"messages": []}, "messages: got []; expected a list of one message or more"),
        ({"messages": ["hi"]}, "messages[0]: got 'hi'; expected an object"),
        (
            {"messages": [{"role": "usr", "content": "q"}]},
            "messages[0].role: got 'usr'; expected one of system,",
        ),
        (
            {"messages": [USER]},
            "roles of messages: got ['user']; expected a conversation with an assistant's turn",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "messages[1].content: got ' '; expected text",
        ),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "messages[1].content: got None; expected text",
        ),
        (
            {"messages": [{**USER, "weight": 0}, ANSWER]},
            "messages[0].weight: got 0; ",
        ),
        (
            {"messages": [USER, {**ANSWER, "weight": -1}]},
            "messages[1].weight: got -1; expected a number of 0",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{}]}]},
            "messages[1].tool_calls[0]: got {}; expected an",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image", "url": "x.png"}]}, ANSWER]},
            "messages[0].content: got [{'type': 'image', .*expected text",
        ),
        ({"messages": CHAT, "tools": "[" * 9999}, "tools: got "),
        ({"messages": CHAT, "tools": '[{"a": NaN}]'}, "tools: got "),
        ({"messages": CHAT, "tools": "no"}, "tools: got 'no'; expected a list of objects"),
        (
            {"conversations": [{"from": "bard", "value": "q"}]},
            "conversations[0].from: got 'bard'; expected one of",
        ),
        ({"prompt": "q", "completion": ""}, "completion: got ''; expected text that is not empty"),
        ({"prompt": "q", "completion": "a", "label": 1}, "label: got 1; expected true or false"),
        (
            {"prompt": "q", "completion": [USER]},
            "roles of completion: got ['user']; expected answers",
        ),
        ({"instruction": "q", "output": None}, "output: got None; expected text"),
        ({"text": ""}, "text: got ''; expected text"),
        ({"chosen": "a", "rejected": "a"}, "rejected: got 'a'; "),
        ({"chosen": "a", "rejected": "b"}, "prompt: got ''; expected one, or answers that begin"),
        (
            {"chosen": "blue", "rejected": "black"},
            "prompt: got ''; expected one, or answers that begin",
        ),
    ],
)
def test_malformed_rows_are_one_sentence(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(
        RequestError, match=".*".join(map(re.escape, sentence.split(".*")))
    ) as caught:
        example(row)
    assert "\n" not in str(caught.value)


# Files


def test_every_fault_is_found_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": CHAT, "source": "x"},
        "not json\n",
        "\n",
        "[1]\n",
        {"messages": [USER]},
        {"text": "x"},
    ]
    path = write(tmp_path / "rows.jsonl", [*rows, {"messages": CHAT}])
    problems: list[Problem] = []
    assert [one.id for one in examples_of(path, problems=problems)] == [
        "rows.jsonl:1",
        "rows.jsonl:7",
    ]
    assert [one.where for one in problems] == [f"{path}:{line}" for line in (2, 4, 5, 6)]
    assert "kind of row: got 'text'; expected messages" in problems[3].sentence
    told = capsys.readouterr().err
    assert "1 empty line left out" in told and "keys that are not read: source (1 row)" in told
    with pytest.raises(RequestError, match=f"{path}:2: 'not json': expected one JSON object"):
        examples_of(path)


def test_a_json_list_is_read_item_by_item(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"instruction": "q", "output": "a"}, 5, {"instruction": "r", "output": "b"}]
    path.write_text(json.dumps(rows, indent=1))
    problems: list[Problem] = []
    found = examples_of(path, problems=problems)
    assert [one.id for one in found] == ["rows.json:1", "rows.json:3"]
    assert [one.where for one in problems] == [f"{path}:2"]
    path.write_text('[{"text": "a"}, {"text": "b"}\n {"text": "c"}]')
    problems.clear()
    assert examples_of(path, problems=problems) == []
    assert problems[0].where == f"{path}:1" and "line 2" in problems[0].sentence
    path.write_text('{"text": "a"}\n{"text": "b"}\n')  # lines, under the other name
    assert len(examples_of(path)) == 2
    path.write_text("[]")
    with pytest.raises(RequestError, match="expected one row or more"):
        examples_of(path)


def test_parquet_rows_lose_what_is_null(tmp_path: Path) -> None:
    from pyarrow import parquet

    other = {
        "type": "function",
        "function": {"name": "add", "arguments": {"one": 1}},
    }  # no city, no id
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL, other]}
    table = pa.Table.from_pylist(
        [{"messages": CHAT, "tools": None}, {"messages": [USER, calls], "tools": "[]"}]
    )
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    first, second = examples_of(tmp_path)
    assert first == ChatExample("train-00000-of-00001.parquet:1", "chat", tuple(CHAT))
    assert second.messages[1] == {"role": "assistant", "tool_calls": [CALL, other]}


def test_folders_have_splits(tmp_path: Path) -> None:
    for name in ("train", "validation", "other"):
        write(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert [one.text for one in examples_of(tmp_path)] == ["train"]
    assert [one.text for one in split_examples(tmp_path, 0.5)[1]] == ["validation"]
    with pytest.raises(
        RequestError, match=r"split: got 'test'; expected a split that .*: train, valid"
    ):
        examples_of(tmp_path, "test")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(RequestError, match=r"train: got \['train'\]; expected each file once"):
        examples_of(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"files of rows: got \[\]; expected train.jsonl"):
        examples_of(tmp_path / "empty")


def test_a_file_alone_is_held_out_by_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(400)])
    train, measured = split_examples(path, 0.25)
    assert sorted(one.id for one in (*train, *measured)) == sorted(
        one.id for one in examples_of(path)
    )
    assert 70 < len(measured) < 130
    train, measured = split_examples(
        write(tmp_path / "rows.jsonl", [{"text": "the only one"}]), 0.999
    )
    assert len(train) == 1 and list(measured) == []


def test_names_need_the_datasets_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match="data by name needs `datasets`"):
        rows_of("owner/name")
    with pytest.raises(RequestError, match=r"data: got .*; expected a file that ends in .jsonl"):
        rows_of("owner/name.jsonl")
    asked = []

    def load_dataset(*words: str | None) -> dict[str, list[dict[str, Any]]]:
        asked.append(words)
        return {"train": [{"text": "a", "tools": None}], "validation": [], "train_sft": []}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = list(rows_of("owner/name:main"))
    assert [(row.id, row.given) for row in rows] == [("owner/name:main:train:1", {"text": "a"})]
    assert asked == [("owner/name", "main")] and "not read: train_sft" in capsys.readouterr().err
    assert list(rows_of("owner/name", "valid")) == []
    with pytest.raises(RequestError, match=r"split: got 'test'; expected .*: train, valid"):
        rows_of("owner/name", "test")

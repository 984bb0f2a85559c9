"""Encoded examples in the cache: made once, found again by all they depend on, equal for any
number of processes.
"""

from __future__ import annotations

import json
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.chat.chat_texts import PUBLISHED, say
from transom.base.errors import Problem, RequestError, WorkError, reset_notices
from transom.chat.sandbox import SandboxedTemplate
from transom.chat.template import ChatTemplate
from transom.data.chat import shards
from transom.data.chat.finetune_sets import Examples, find_examples, split_examples
from transom.data.chat.rows import ChatEncoder, EncodedChats
from transom.data.chat.shards import prepare_chats
from transom.tokenizers.training import byte_tokenizer

TOKENIZER = byte_tokenizer(("<s>", "</s>", "<|im_start|>", "<|im_end|>"))
TALK = [say("user", "q"), say("assistant", "a"), say("user", "r"), say("assistant", "bc")]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(path: Path, count: int = 10) -> Path:
    rows = [{"messages": [*TALK[:3], say("assistant", "word " * n)]} for n in range(1, count + 1)]
    return write(path, rows)


def encoder(name: str = "qwen3", **changes: Any) -> ChatEncoder:
    template = ChatTemplate(PUBLISHED[name], TOKENIZER)
    return ChatEncoder(TOKENIZER, template, **{"seq_len": 200, **changes})


def rows_of(encoded: EncodedChats) -> list[Any]:
    return [
        [(row.id, row.ids.tolist(), row.weights.tolist()) for row in item] for item in encoded.items
    ]


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The templates that were rendered."""
    seen: list[str] = []
    original = SandboxedTemplate.render

    def render(self: SandboxedTemplate, *given: Any, **more: Any) -> str:
        seen.append(self.source)
        return original(self, *given, **more)

    monkeypatch.setattr(SandboxedTemplate, "render", render)
    return seen


def test_a_second_preparation_renders_nothing_and_returns_the_same(
    tmp_path: Path, renderings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{**TALK[0], "name": "Ann"}, *TALK[1:]]} for _ in range(3)]
    examples = find_examples(write(tmp_path / "a.jsonl", rows))
    expected = encoder().encode(examples)
    first = prepare_chats([examples], encoder(), tmp_path / "cache")
    second = encoder()
    assert renderings and second.key  # which renders short conversations to find the end of a turn
    del renderings[:]
    reset_notices()
    capsys.readouterr()
    again = prepare_chats([find_examples(tmp_path / "a.jsonl")], second, tmp_path / "cache")
    for made in (first, again):
        assert rows_of(made) == rows_of(expected) and made.counts == expected.counts
        assert made.lengths.tolist() == expected.lengths.tolist()
    assert "leaves out: name of user" in capsys.readouterr().err
    assert not renderings


def test_content_template_tokenizer_and_settings_each_have_an_entry(tmp_path: Path) -> None:
    path = conversations(tmp_path / "a.jsonl")
    with_time = ChatTemplate(PUBLISHED["qwen3"] + "{{ strftime_now('%d') }}", TOKENIZER)
    other = byte_tokenizer(("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>"))
    encoders = [
        encoder(),
        encoder("smollm2"),
        encoder(seq_len=20),
        encoder(seq_len=20, truncate="drop"),
        encoder(train_on="all"),
        encoder(stop_tokens=(7,)),
        ChatEncoder(other, ChatTemplate(PUBLISHED["qwen3"], other), 200),
        ChatEncoder(TOKENIZER, with_time.at(datetime(2026, 1, 1)), 200),
        ChatEncoder(TOKENIZER, with_time.at(datetime(2026, 1, 2)), 200),
    ]
    for _ in range(2):
        for one in encoders:
            prepare_chats([find_examples(path)], one, tmp_path / "cache")
    conversations(path, 11)
    prepare_chats([find_examples(path)], encoder(), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(encoders) + 1


@pytest.mark.parametrize("kind", ["conversations", "pairs", "labelled"])
def test_two_processes_write_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(shards, "CHUNK_EXAMPLES", 3)
    path = tmp_path / "a.jsonl"
    if kind == "conversations":
        conversations(path)
    elif kind == "pairs":
        write(path, [{"prompt": "q", "chosen": "a" * n, "rejected": "b"} for n in range(1, 11)])
    else:
        rows = [{"prompt": "q", "completion": "a" * n, "label": n > 4} for n in range(1, 11)]
        write(path, rows)
    files = []
    for processes in (1, 2):
        cache = tmp_path / f"cache {processes}"
        made = prepare_chats([find_examples(path)], encoder(), cache, processes=processes)
        labels = {item[0].label for item in made.items}
        assert labels == ({True, False} if kind == "labelled" else {None})
        assert made.counts["examples"] == 10
        (entry,) = cache.iterdir()
        files.append({file.name: file.read_bytes() for file in entry.iterdir()})
    assert files[0] == files[1] and len(files[0]["rows.tokens"]) > 100


@pytest.mark.parametrize("processes", [1, 2])
def test_an_example_that_cannot_be_encoded_is_named(tmp_path: Path, processes: int) -> None:
    row = {"messages": TALK, "tools": [{"type": "function", "function": {"name": "f"}}]}
    path = write(tmp_path / "a.jsonl", [{"messages": TALK}, row, {"messages": TALK}])
    given = ([find_examples(path)], encoder("zephyr"), tmp_path / "cache")
    with pytest.raises(RequestError, match=r"a\.jsonl:2: tools: "):
        prepare_chats(*given, processes=processes)
    assert not list((tmp_path / "cache").glob("*"))
    problems: list[Problem] = []
    for _ in range(2):  # the second time from the cache
        assert len(prepare_chats(*given, processes=processes, problems=problems).items) == 2
    assert [one.where for one in problems] == ["a.jsonl:2"] * 2
    with pytest.raises(RequestError, match=r"a\.jsonl:2: tools: "):
        prepare_chats(*given)


def test_a_process_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.data.processes.WORKER", "raise SystemExit(3)")
    examples = find_examples(conversations(tmp_path / "a.jsonl"))
    with pytest.raises(WorkError, match="ended with status 3"):
        prepare_chats([examples], encoder(), tmp_path / "cache", processes=2)


def test_examples_that_change_while_they_are_read_are_noticed(tmp_path: Path) -> None:
    examples = find_examples(conversations(tmp_path / "a.jsonl"))
    conversations(tmp_path / "a.jsonl", 11)
    with pytest.raises(WorkError, match="changed while they were read"):
        prepare_chats([examples], encoder(), tmp_path / "cache")


def test_parts_of_several_sets_are_joined(tmp_path: Path) -> None:
    paths = [conversations(tmp_path / f"{name}.jsonl", 4) for name in "ab"]
    parts = [split_examples(path, 0.4) for path in paths]
    train, measured = zip(*parts, strict=True)
    joined = prepare_chats(train, encoder(), tmp_path / "cache")
    ids = [item[0].id for item in joined.items]
    assert sorted(ids) == ids and len(ids) == joined.counts["rows"] == 2 * sum(map(len, train))
    assert [joined.items[at] for at in range(len(ids))] and joined.counts["examples"] < 8
    held = prepare_chats(measured, encoder(), tmp_path / "cache")
    assert held.counts["examples"] + joined.counts["examples"] == 8
    assert not {item[0].id for item in held.items} & set(ids)
    assert list(prepare_chats([Examples(paths[0])], encoder(), tmp_path / "cache").items) == []


def test_examples_of_several_kinds_are_refused(tmp_path: Path) -> None:
    pair = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    parts = [find_examples(pair), find_examples(conversations(tmp_path / "b.jsonl"))]
    with pytest.raises(RequestError, match=r"data.sources: got .several kinds of rows"):
        prepare_chats(parts, encoder(), tmp_path / "cache")


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path: Path) -> None:
    text = "x" * 2000
    peaks = []
    for count in (200, 1000):
        path = write(tmp_path / f"{count}.jsonl", [{"text": f"{n} {text}"} for n in range(count)])
        tracemalloc.start()
        examples = find_examples(path)
        made = prepare_chats([examples], ChatEncoder(TOKENIZER, None, 4096), tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(made.items) == count
    assert peaks[1] < peaks[0] * 1.3

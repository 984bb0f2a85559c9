"""LabelledText lines: what is read, what is refused, and batches that are a function of (seed,
epoch, item).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.training.runs import without_bos
from transom.base.errors import RequestError
from transom.data.batch import NO_TARGET
from transom.data.labelled import (
    LabelledBatches,
    LabelledText,
    encode_rows,
    label_names,
    read_labelled,
    read_labels,
    split_held_out,
    write_labels,
)
from transom.data.text.sources import SourceArgs, read_documents
from transom.inference.embedding import encode_texts
from transom.tokenizers.training import byte_tokenizer


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def batches(count: int = 10, labels: list[str] | None = None, **changes: Any) -> LabelledBatches:
    texts = [chr(97 + i) * (i + 1) for i in range(count)]
    rows = [LabelledText(f"f:{i}", t, label=i % 2, positive=t[:2]) for i, t in enumerate(texts)]
    fields = {"labels": labels, "seq_len": 16, "rows_per_step": 4, "seed": 0, **changes}
    return LabelledBatches(rows, byte_tokenizer(), **fields)


# Lines


def test_lines_become_rows_with_the_ids_of_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path,
        [{"text": "good", "label": "yes"}, "\n", {"text": "bad", "label": "no", "more": 1}],
    )
    rows = read_labelled(path, "classification")
    assert rows == [
        LabelledText("rows.jsonl:1", "good", "yes"),
        LabelledText("rows.jsonl:3", "bad", "no"),
    ]
    # The same id, so that the tokenizer of a run is not trained on held-out rows either.
    assert [row.id for row in rows] == [
        document.id for document in read_documents(SourceArgs(str(path)))
    ]
    told = capsys.readouterr().err
    assert "1 empty line left out" in told and "keys that are not read: more (1 row)" in told
    pairs = read_labelled(write(tmp_path, [{"text": "a", "positive": "b"}]), "embedding")
    assert pairs == [LabelledText("rows.jsonl:1", "a", positive="b")]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("no json\n", "classification"),
        ({"text": "a"}, "classification"),
        ({"text": "", "label": 1}, "classification"),
        ({"text": "a", "label": ""}, "classification"),
        ({"text": "a", "label": -1}, "classification"),
        ({"text": "a", "label": True}, "classification"),
        ({"text": "a", "label": 1.0}, "classification"),
        ({"text": "a", "label": "\ud800"}, "classification"),
        ({"text": 3, "label": 1}, "classification"),
        ({"text": "a", "label": 1}, "embedding"),
        ({"text": "a", "positive": 1}, "embedding"),
        ([1], "embedding"),
    ],
)
def test_a_wrong_line_is_refused_by_its_place(tmp_path: Path, line: Any, kind: Any) -> None:
    good = {"text": "a", "label": 0, "positive": "b"}
    path = write(tmp_path, [good, line])
    with pytest.raises(RequestError, match=r"rows.jsonl:2: .*expected"):
        read_labelled(path, kind)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"expected a file that ends in .jsonl"):
        read_labelled(tmp_path / "a.txt", "classification")
    with pytest.raises(RequestError, match="cannot be read"):
        read_labelled(tmp_path / "none.jsonl", "classification")
    with pytest.raises(RequestError, match="expected one row or more"):
        read_labelled(write(tmp_path, []), "classification")
    with pytest.raises(RequestError, match="expected all texts or all numbers"):
        read_labelled(
            write(tmp_path, [{"text": "a", "label": 0}, {"text": "a", "label": "0"}]),
            "classification",
        )


def test_labels_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [LabelledText("a", "x", label) for label in ("no", "yes", "no")]
    assert label_names(words, 2) == ["no", "yes"] and capsys.readouterr().err == ""
    assert (
        label_names(words, 3) == ["no", "yes", "unused 2"]
        and "only 2 of them are in the data" in capsys.readouterr().err
    )
    assert label_names([LabelledText("a", "x", 2)], 3) == ["0", "1", "2"]
    for rows in (words, [LabelledText("a", "x", 1)]):
        with pytest.raises(RequestError, match=r"model.head.num_labels: got 1; expected 2 or more"):
            label_names(rows, 1)
    write_labels(tmp_path, ["no", "yes"])
    assert read_labels(tmp_path) == ["no", "yes"] and read_labels(tmp_path / "none") is None


def test_rows_are_held_out_by_their_place() -> None:
    rows = [LabelledText(f"f.jsonl:{i}", "x", 0) for i in range(400)]
    train, measured = split_held_out(rows, 0.25)
    assert sorted([*train, *measured]) == sorted(rows) and 70 < len(measured) < 130
    assert split_held_out(rows[:7], 0.25)[0] == [row for row in rows[:7] if row in train]


# Rows of tokens


def test_texts_begin_with_bos_and_long_ones_are_cut_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert encode_texts(byte_tokenizer(), ["ab", "abcdef"], 4) == [[256, 97, 98], [256, 97, 98, 99]]
    assert "1 of 2 texts are longer than 4 tokens" in capsys.readouterr().err


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(RequestError, match="label of f:9: got 'maybe'"):
        encode_rows([LabelledText("f:9", "x", "maybe")], byte_tokenizer(), ["no", "yes"], 8)


@pytest.mark.parametrize("adds", [True, False])
def test_bos_stands_where_transformers_puts_one(tmp_path: Path, adds: bool) -> None:
    byte_tokenizer().save(tmp_path)
    tokenizer = byte_tokenizer() if adds else without_bos(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert encode_texts(tokenizer, ["ab", "é"], 9) == theirs(["ab", "é"])["input_ids"]


# Batches


def test_a_batch_is_padded_on_the_right() -> None:
    batch = batches(labels=["0", "1"]).next()
    assert batch.tokens.shape == (4, int(batch.lengths.max()))
    for tokens, length, target in zip(batch.tokens, batch.lengths, batch.targets, strict=True):
        text = bytes(tokens[1:length].tolist()).decode()
        assert tokens[0] == 256 and tokens[length:].eq(0).all()
        assert len(text) == min(length - 1, 15) and target == (ord(text[0]) - 97) % 2
    inputs = batch.inputs()
    assert inputs.lengths is batch.lengths and inputs.tokens is batch.tokens


def test_pairs_are_neighbours_and_equal_positives_share_a_number() -> None:
    rows = [
        LabelledText(f"f:{i}", t, positive=p)
        for i, (t, p) in enumerate([("a", "x"), ("b", "y"), ("c", "x")])
    ]
    made = LabelledBatches(rows, byte_tokenizer(), labels=None, seq_len=8, rows_per_step=3, seed=0)
    batch = made.next()
    assert batch.targets[1::2].eq(NO_TARGET).all()
    found = {chr(batch.tokens[i, 1]): int(batch.targets[i]) for i in (0, 2, 4)}
    assert found["a"] == found["c"] != found["b"]
    positives = {chr(batch.tokens[i, 1]): chr(batch.tokens[i + 1, 1]) for i in (0, 2, 4)}
    assert positives == {"a": "x", "b": "y", "c": "x"}


def test_every_line_comes_once_an_epoch_in_another_order() -> None:
    made = batches(10, ["0", "1"], rows_per_step=5)
    epochs = [[int(n) for _ in range(2) for n in made.next().lengths] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [min(i + 2, 16) for i in range(10)]
    assert epochs[0] != epochs[1] and made.items_per_epoch == 10


def test_ranks_and_micro_batches_share_one_batch() -> None:
    whole, parts = (
        batches(labels=["0", "1"]),
        [batches(labels=["0", "1"], rank=r, world_size=2) for r in (0, 1)],
    )
    for _ in range(4):  # over the end of the epoch
        batch, halves = whole.next(), [part.next() for part in parts]
        assert torch.equal(torch.cat([half.lengths for half in halves]), batch.lengths)
        micro = list(batch.micro_batches(2))
        assert torch.equal(torch.cat([one.targets for one in micro]), batch.targets)
        for one, half in zip(micro, halves, strict=True):
            assert torch.equal(one.tokens, half.tokens)


def test_pairs_stay_together_in_micro_batches() -> None:
    first, second = batches().next().micro_batches(2)
    for one in (first, second):
        assert (one.targets >= 0).tolist() == [True, False, True, False]


def test_state_is_a_place() -> None:
    made, again = batches(labels=["0", "1"]), batches(labels=["0", "1"])
    for _ in range(3):
        made.next()
    again.load_state(made.state)
    assert made.state == {"epoch": 1, "item": 2}
    assert torch.equal(made.next().tokens, again.next().tokens)
    for state in ({"epoch": 0}, {"epoch": -1, "item": 0}, {"epoch": 0, "item": 10}):
        with pytest.raises(RequestError):
            made.load_state(state)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match=r"data.batch_size: got 11; expected at most 10"):
        batches(rows_per_step=11)
    with pytest.raises(RequestError, match="rows_per_step: got 3"):
        batches(rows_per_step=3, world_size=2)

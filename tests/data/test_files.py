"""One reader of rows for every verb: names, compression, splits of folders, and JSON that is not
quite JSON.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from transom.base.errors import RequestError
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import read_examples, split_examples
from transom.data.labelled import read_labelled
from transom.data.row_files import read_rows
from transom.data.split_files import split_files
from transom.data.text.sources import ReadReport, SourceArgs, read_documents
from transom.evaluation.task_data import open_data

ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def examples_of(*given: Any, **more: Any) -> list[ChatExample]:
    return list(read_examples(*given, **more))


def write(path: Path, content: bytes | list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        content
        if isinstance(content, bytes)
        else "".join(json.dumps(row) + "\n" for row in content).encode()
    )
    path.write_bytes(lines)
    return path


def documents(path: Path) -> list[str]:
    return [document.text for document in read_documents(SourceArgs(path=str(path)))]


# Names and bytes of one file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", LIST),
        ("a.json", json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("a.json", b"\xef\xbb\xbf" + LIST),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.json.xz", lzma.compress(LIST)),
        ("a.jsonl.zst", pa.Codec("zstd").compress(LINES, asbytes=True)),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_every_verb_reads_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    assert documents(path) == documents(tmp_path) == ["one", "two"]
    assert [example.text for example in examples_of(path)] == ["one", "two"]
    assert open_data([str(path)])[0].kind == "text"


def test_a_head_reads_every_format_of_rows(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    listed = write(tmp_path / "a.json", json.dumps(rows, indent=1).encode())
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (listed, tmp_path / "a.parquet"):
        read = read_labelled(path, "classification")
        assert [(row.text, row.label) for row in read] == [("a", "x"), ("b", "y")]
        assert [row.id for row in read] == [
            one.id for one in read_documents(SourceArgs(path=str(path)))
        ]


def test_a_text_loses_its_byte_order_mark_and_its_compression(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n")
    write(tmp_path / "b.txt.gz", gzip.compress(b"two"))
    assert documents(tmp_path) == ["one\r\n", "two"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.xz", "a.jsonl.zst"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    packed = {
        "gz": gzip.compress(LINES * 50),
        "xz": lzma.compress(LINES * 50),
        "zst": b"no archive",
    }
    path = write(tmp_path / name, packed[name.rpartition(".")[2]][:-9])
    with pytest.raises(RequestError, match=name):
        documents(path)


def test_json_that_is_no_data_is_text_in_a_folder_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "package.json", b'{\n "name": "x"\n}')
    write(tmp_path / "rows.json", LIST)
    report = ReadReport()
    read = list(read_documents(SourceArgs(path=str(tmp_path)), report))
    assert [one.text for one in read] == ['{\n "name": "x"\n}', "one", "two"]
    assert report.counts() == ["1 .json file without rows read as plain text"]
    with pytest.raises(RequestError, match=r"package.json:1: columns"):
        documents(tmp_path / "package.json")


# Folders


def names(folder: Path) -> dict[str, list[str]]:
    found = split_files(folder).items()
    return {
        split: [path.relative_to(folder).as_posix() for path in files] for split, files in found
    }


@pytest.mark.parametrize(
    ("files", "split"),
    [
        (["train.jsonl", "train_2.jsonl", "train-3.jsonl"], "train"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], "train"),
        (["train-1-of-2.jsonl", "train-2-of-2.jsonl"], "train"),
        (["data/train.jsonl.gz"], "train"),
        (["training/a.jsonl", "training/deep/b.jsonl"], "train"),
        (["my_train_rows.JSONL"], "train"),
        (["a.jsonl", "b.jsonl"], "train"),  # no name of a split anywhere
        (["dev.jsonl"], "valid"),
        (["val.jsonl"], "valid"),
        (["validation-00000-of-00001.jsonl"], "valid"),
        (["eval.jsonl"], "test"),
        (["testing/a.jsonl"], "test"),
        (["train/a.jsonl", "parts/train_2.json"], "train"),
    ],
)
def test_files_have_the_split_that_datasets_gives_them(
    tmp_path: Path, files: list[str], split: str
) -> None:
    for name in files:
        write(tmp_path / name, ROWS)
    found = names(tmp_path)
    assert sorted(found.pop(split)) == sorted(files) and not found


@pytest.mark.parametrize(
    ("files", "field"),
    [
        (["train-00000-of-00002.jsonl"], r"shards of train: got .*1-of-2'; expected all 2"),
        (["train-00001-of-00002.jsonl"], r"shards of train: got .*2-of-2'; expected all 2"),
        (
            ["train-0-of-1.jsonl", "train-0-of-2.jsonl", "train-1-of-2.jsonl"],
            "0-of-1'; expected all 2 shards of one set",
        ),
        (["train/x-00001-of-00003.jsonl", "train/x-00002-of-00003.jsonl"], "shards of x"),
        (["train_test.jsonl"], "expected a name with the word of one split"),
        (["train.jsonl", "train.json"], "expected each file once"),
        (["train.jsonl", "old/train.jsonl"], "expected each file once"),
        (["train.jsonl", "train.jsonl.gz"], "expected each file once"),
        (["train.csv"], r"files of rows: got \[\]; expected train.jsonl"),
    ],
)
def test_files_that_would_be_missed_are_refused(
    tmp_path: Path, files: list[str], field: str
) -> None:
    for name in files:
        write(tmp_path / name, ROWS)
    with pytest.raises(RequestError, match=field):
        examples_of(tmp_path)


def test_what_is_not_read_of_a_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "train.jsonl",
        "dev.jsonl",
        "test.jsonl",
        "extra.jsonl",
        "train.csv",
        "old/more.jsonl",
        "README.md",
    ):
        write(tmp_path / name, ROWS)
    train, measured = split_examples(tmp_path, 0.0)
    told = capsys.readouterr().err
    assert len(train) == len(measured) == 2
    assert "3 files not" in told
    assert told.count("['extra.jsonl', 'old/more.jsonl', 'train.csv']") == 1
    assert "the split test is not used" in told and "README" not in told


# Rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": NaN}', "NaN"),
        (b'{"text": -Infinity}', "Infinity"),
        (b'{"n": 1e999, "text": "a"}', "1e999"),
        (b'{"text": "a", "text": "b"}', "'text' twice"),
        (b'{"text": ' + b"[" * 600 + b"]" * 600 + b"}", "nested"),
        (b'{"text": ' + b"[" * 99999, "nested"),
        (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"text": "\\udc00"}', "surrogate"),
        (b'{"text": "a\0b"}', "control character"),
        (b'{"text": "a"} {"text": "b"}', "Extra data"),
        (b'{"text": "\xff"}', "utf-8"),
    ],
)
def test_a_row_that_is_not_strict_json_is_named_with_its_reason(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "fine"}\r\n\r\n' + line + b"\r\n")
    for read in (examples_of, documents):
        with pytest.raises(RequestError, match=f"a.jsonl:3: .*{reason}") as caught:
            read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"text": "a"},\n\n {"text": "b"}\n] x', "Extra data: line 4"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "Extra data: line 2"),
        ('[{"text": "a"},\n NaN]', "NaN"),
        ('[{"text": "a"},', "line 1 column 1"),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}', "Extra data: line 4"),
    ],
)
def test_a_json_file_that_is_malformed_anywhere_is_one_problem(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = write(tmp_path / "a.json", content.encode())
    ((_, where, values, problem),) = read_rows(path)
    assert (where, values) == (f"{path}:1", None) and reason in problem


def test_right_values_are_kept(tmp_path: Path) -> None:
    rows = [{"text": "a\0b", "n": 10**400}, {"text": "\U0001f600", "n": [[[1]]]}]
    path = write(tmp_path / "a.jsonl", rows)
    assert [row.columns for row in read_rows(path)] == rows
    assert documents(path) == ["a\0b", "\U0001f600"]
    with pytest.raises(RequestError, match=r"a\.jsonl:1: weight") as caught:
        examples_of(write(path, [{"text": "a", "weight": 10**400}]))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_null_columns_are_as_if_they_were_not_there(tmp_path: Path, name: str) -> None:
    empty = dict.fromkeys(("chosen", "rejected", "prompt", "completion", "label", "text"))
    rows: list[dict[str, Any]] = [
        {**empty, "messages": [USER, ANSWER]},
        {**empty, "messages": None},
    ]
    path = tmp_path / name
    if name == "a.jsonl":
        write(path, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    problems: list[Any] = []
    (example,) = examples_of(path, problems=problems)
    assert example.messages == (USER, ANSWER)
    assert [(one.where, one.sentence.split(":")[0]) for one in problems] == [
        (f"{path}:2", "columns")
    ]
    assert "null" in problems[0].sentence


def test_null_texts_are_counted_as_empty_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": "a"}]
    write(tmp_path / "a.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = ReadReport()
    read = list(read_documents(SourceArgs(path=str(tmp_path)), report))
    assert [one.id for one in read] == ["a.jsonl:2", "a.parquet:2"] and report.notes[
        "empty documents left out"
    ] == 2


def test_tables_with_dictionaries_views_and_bad_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for kind in (pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view()):
        parquet.write_table(pa.table({"text": pa.array(["b", "a", "b"]).cast(kind)}), path)
        assert documents(path) == ["b", "a", "b"]
        assert [example.text for example in examples_of(path)] == ["b", "a", "b"]
    bad = pa.array([b"fine", b"fine", b"\xff"]).cast(pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), path, row_group_size=2)
    for read in (examples_of, documents):
        with pytest.raises(
            RequestError, match=r"a\.parquet: not a readable .* after row 0 .*utf-8"
        ):
            read(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"columns: got \['text'\]"):
        examples_of(tmp_path / "a.parquet")


def test_keys_of_turns_that_nothing_reads_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "q", "loss": False}, {"from": "gpt", "value": "a"}]
    examples_of(write(tmp_path / "a.jsonl", [{"conversations": turns}]))
    assert "conversations.loss (1 row)" in capsys.readouterr().err
    listed = [{"prompt": "Count.", "completion": "[1, 2]"}]  # a text that looks like a list
    (example,) = examples_of(write(tmp_path / "b.jsonl", listed))
    assert example.answers[0][0]["content"] == "[1, 2]"

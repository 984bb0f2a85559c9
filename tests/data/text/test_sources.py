"""Reading documents: which files, which ids, what is skipped and counted, what is refused."""

import os
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet

from transom.base.errors import RequestError
from transom.base.fields import read
from transom.data.text.sources import (
    ReadReport,
    SourceArgs,
    held_out,
    read_documents,
    read_split,
    require_whole,
)


def found(path, **fields):
    report = ReadReport()
    return dict(read_documents(SourceArgs(path=str(path), **fields), report)), report


@pytest.fixture
def folder(tmp_path):
    files = {
        "b.txt": b"line\r\nend",
        "a/z.md": "é\u2028x".encode(),
        "a/tests/t.py": b"assert 1",
        "empty.txt": b"",
        "image.png": b"\x89PNG\0\0",
        "latin1.txt": "é".encode("latin-1"),
        ".git/config": b"[core]",
        ".hidden": b"x",
        "rows.jsonl": b'{"text": "one\\u2028more"}\n\n{"text": "two", "n": 2}\n{"text": ""}\n',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    return tmp_path


def test_a_folder_gives_every_text_in_order_and_counts_the_rest(folder):
    documents, report = found(folder)
    assert documents == {
        "a/tests/t.py": "assert 1",
        "a/z.md": "é\u2028x",
        "b.txt": "line\r\nend",
        "rows.jsonl:1": "one\u2028more",
        "rows.jsonl:3": "two",
    }
    assert list(documents) == sorted(documents)
    assert report == ReadReport(
        files=7,
        documents=5,
        notes=Counter(
            {
                "empty documents left out": 2,
                "empty lines left out": 1,
                "binary files left out": 1,
                "files left out because the text is not UTF-8": 1,
                "hidden paths left out": 2,
                "paths left out (links to folders, special files)": 1,
            }
        ),
        unread={"n"},
    )


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"exclude": ("tests", "*.jsonl")}, ["a/z.md", "b.txt"]),
        ({"include": ("a",), "exclude": ("a/tests/*",)}, ["a/z.md"]),
        ({"include": ("t.*", "b.txt")}, ["a/tests/t.py", "b.txt"]),
    ],
)
def test_patterns_match_paths_and_the_names_in_them(folder, fields, ids):
    documents, report = found(folder, **fields)
    assert list(documents) == ids
    assert report.files + report.notes["files left out by include and exclude"] == 7


def test_a_glob_gives_ids_below_its_fixed_part(folder):
    documents, report = found(folder / "a" / "**" / "**" / "*.*")
    assert list(documents) == ["tests/t.py", "z.md"]
    assert report.documents == 2


def test_parquet_rows_come_from_every_row_group(tmp_path):
    table = pa.table({"text": ["one", None, "three"], "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    documents, report = found(tmp_path / "rows.parquet")
    assert documents == {"rows.parquet:1": "one", "rows.parquet:3": "three"}
    assert report.counts() == ["1 empty document left out", "columns not read: ['other']"]


@pytest.mark.parametrize(
    "line", ['{"text": "cut', '{"txt": "x"}', '{"text": 3}', "[1]", r'{"text": "\ud800"}']
)
def test_a_bad_row_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(RequestError, match=r"rows\.jsonl:2: .*expected (a|one) JSON object"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent", None, "expected a file, a folder or a glob"),
        ("x*.txt", None, r"expected text \(found no files\)"),
        ("a.bin", b"\0", "got 'a binary file'; expected UTF-8 text"),
        ("a.txt", b"ab\xff", "byte 2: got 'bytes that are not UTF-8'; expected UTF-8 text"),
        (
            "a.txt",
            b"",
            r"expected text \(found 1 file, 1 empty document left out\)",
        ),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
    ],
)
def test_a_source_without_text_is_refused(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=sentence):
        found(tmp_path / name)


def test_a_parquet_file_without_the_column_names_what_it_has(tmp_path):
    parquet.write_table(pa.table({"content": ["x"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r'a\.parquet:1: text: got 1; expected .* string "text"'):
        found(tmp_path)
    parquet.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"columns: got \['content'\]; expected"):
        found(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_not_left_out(folder):
    (folder / "a").chmod(0)
    try:
        with pytest.raises(RequestError, match="cannot be read"):
            found(folder)
    finally:
        (folder / "a").chmod(0o700)


def test_held_out_is_a_share_of_the_ids_and_grows_with_the_fraction():
    ids = [f"{number}.txt" for number in range(4000)]
    small, large = ({id for id in ids if held_out(id, fraction)} for fraction in (0.1, 0.2))
    assert small < large
    assert 300 < len(small) < 500
    assert not any(held_out(id, 0.0) for id in ids)
    assert all(held_out(id, 1.0) for id in ids)


@pytest.mark.parametrize(
    "field",
    [
        {"weight": 0},
        {"weight": float("inf")},
        {"weight": [[5, 1.0]]},
        {"weight": [[0, 1.0], [9, 1.0], [9, 2.0]]},
        {"weight": [[0, -1.0]]},
        {"weight": []},
        {"path": ""},
    ],
)
def test_wrong_fields_are_named(field):
    with pytest.raises(RequestError, match=next(iter(field))):
        read(SourceArgs, {"path": "x", **field})


def test_a_single_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    head, tail = read_split(SourceArgs(path=str(tmp_path / "input.txt")), 0.1)
    assert head.text + tail.text == text
    assert tail.text.startswith("line 9")
    assert (held_out(head.id, 0.1), held_out(tail.id, 0.1)) == (False, True)


def own_folders(root):
    """A text, and below it a run with a step, a cache of tokens, and a folder that is neither."""
    texts = {
        "a.txt": "a",
        "runs/x/config.yaml": "steps: 3",
        "runs/x/run.json": "{}",
        "runs/x/step_000003/config.json": "{}",
        "cache/0123/meta.json": "{}",
        "cache/0123/train.tokens": "tokens",
        "project/config.yaml": "a: 1",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("pattern", ["", "/**"])
def test_folders_that_a_run_writes_are_no_sources_and_counted(tmp_path, pattern):
    own_folders(tmp_path)
    report = ReadReport()
    found = [document.id for document in read_documents(SourceArgs(f"{tmp_path}{pattern}"), report)]
    assert found == ["a.txt", "project/config.yaml"]
    assert "2 folders of runs or of cached tokens left out" in report.counts()


def test_a_run_that_is_named_itself_is_read(tmp_path):
    own_folders(tmp_path)
    found = [document.id for document in read_documents(SourceArgs(str(tmp_path / "runs" / "x")))]
    assert "config.yaml" in found


@pytest.mark.parametrize(
    "fields", [{"weight": 2.0}, {"include": ("*.jsonl",)}, {"exclude": ("a",)}]
)
def test_fields_that_a_reader_of_rows_does_not_know_are_refused(fields):
    require_whole(SourceArgs(path="x", name="y"), "fine-tuning")
    with pytest.raises(RequestError, match=f"data.sources {next(iter(fields))}: got "):
        require_whole(SourceArgs(path="x", **fields), "fine-tuning")

"""Token files: what they hold, when they are reused, and what happens when one is damaged."""

import errno
import os

import numpy as np
import pytest

from transom.base.errors import RequestError, WorkError
from transom.base.files import cache_dir
from transom.data import cache
from transom.data.text import shards
from transom.data.text.shards import prepare
from transom.data.text.sources import SourceArgs, held_out
from transom.tokenizers.training import byte_tokenizer, train_chars

TEXTS = {f"{number}.txt": f"text {number} é" * (number + 1) for number in range(40)}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "texts").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    return SourceArgs(path=str(tmp_path / "texts"))


def test_every_document_is_in_one_part_with_its_tokens_and_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 7 * shards.DOCUMENT_CHARACTERS)
    tokenizer = byte_tokenizer()
    corpus = prepare(source, tokenizer, tmp_path / "cache", held_out_fraction=0.3)
    seen = {}
    for part, expected in ((corpus.train, False), (corpus.held_out, True)):
        assert part.tokens.dtype == np.uint16
        assert len(part) == len(part.bytes) == len(part.lengths) == len(part.offsets) - 1 > 0
        for index, id in enumerate(part.ids):
            assert held_out(id, 0.3) is expected
            assert part.bytes[index] == len(TEXTS[id].encode())
            seen[id] = tokenizer.decode(part.document(index))
    assert seen == TEXTS
    assert corpus.report.documents == len(TEXTS)


def test_the_files_are_made_once_for_the_same_texts_and_tokenizer(source, tmp_path, monkeypatch):
    first = prepare(source, byte_tokenizer(), tmp_path / "cache")
    other = prepare(source, byte_tokenizer(("<a>", "<b>")), tmp_path / "cache")
    assert other.folder != first.folder
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_parts", lambda *_: pytest.fail("tokenised again"))
        again = prepare(source, byte_tokenizer(), tmp_path / "cache")
    assert (again.folder, again.sha256) == (first.folder, first.sha256)
    (tmp_path / "texts" / "0.txt").write_text("changed")
    changed = prepare(source, byte_tokenizer(), tmp_path / "cache")
    assert changed.sha256 != first.sha256
    assert changed.folder != first.folder


@pytest.mark.parametrize("name", ["train.tokens", "held_out.offsets", "meta.json"])
def test_a_damaged_entry_is_made_anew_and_says_so(source, tmp_path, capsys, name):
    first = prepare(source, byte_tokenizer(), tmp_path / "cache")
    tokens = np.array(first.train.tokens)
    with (first.folder / name).open("r+b") as file:
        file.truncate((first.folder / name).stat().st_size // 2)
    again = prepare(source, byte_tokenizer(), tmp_path / "cache")
    assert f"{first.folder}: a damaged cache entry is made again" in capsys.readouterr().err
    assert np.array_equal(again.train.tokens, tokens)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_failed_write_leaves_nothing_behind(source, tmp_path, monkeypatch, number):
    def fail(_handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WorkError, match=f"could not be written .*{os.strerror(number)}"):
        prepare(source, byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []


def test_files_of_a_killed_process_with_the_same_id_are_replaced(source, tmp_path):
    first = prepare(source, byte_tokenizer(), tmp_path / "cache")
    left = tmp_path / "again" / f".{first.folder.name}.tmp-{os.getpid()}"
    left.mkdir(parents=True)
    (left / "train.tokens").write_bytes(b"half")
    again = prepare(source, byte_tokenizer(), tmp_path / "again")
    assert np.array_equal(again.train.tokens, first.train.tokens)
    assert [entry.name for entry in (tmp_path / "again").iterdir()] == [first.folder.name]


def test_texts_that_change_between_the_two_readings_are_noticed(source, tmp_path, monkeypatch):
    readings = iter([TEXTS, TEXTS | {"0.txt": "changed"}])
    monkeypatch.setattr(
        shards, "read_split", lambda *_: (shards.Document(*item) for item in next(readings).items())
    )
    with pytest.raises(WorkError, match="changed while they were read"):
        prepare(source, byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []


def test_an_entry_that_another_process_finished_first_stays_complete(source, tmp_path, monkeypatch):
    first = prepare(source, byte_tokenizer(), tmp_path / "cache")
    tokens = np.array(first.train.tokens)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_read_meta", lambda _folder: None)  # as if it was not there yet
        again = prepare(source, byte_tokenizer(), tmp_path / "cache")
    assert np.array_equal(again.train.tokens, tokens)
    assert np.array_equal(first.train.tokens, tokens)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [first.folder.name]


def test_a_large_vocabulary_takes_wider_tokens(tmp_path):
    characters = "".join(chr(0x10000 + number) for number in range(1 << 16))
    (tmp_path / "a.txt").write_text(characters[-3:], encoding="utf-8")
    corpus = prepare(
        SourceArgs(path=str(tmp_path / "a.txt")), train_chars([characters]), tmp_path / "cache"
    )
    assert corpus.train.tokens.tolist() == [65536, 65537, 65538]
    assert len(corpus.held_out) == len(corpus.held_out.tokens) == 0


@pytest.mark.parametrize(
    ("fraction", "sentence"), [(1.0, "below 1"), (-0.1, "0 or more"), (0.9999999, "leaves")]
)
def test_a_fraction_that_leaves_no_training_text_is_refused(source, tmp_path, fraction, sentence):
    with pytest.raises(RequestError, match=rf"held_out_fraction: got .*{sentence}"):
        prepare(source, byte_tokenizer(), tmp_path / "cache", held_out_fraction=fraction)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("TRANSOM_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "transom")


def test_progress_goes_to_standard_error(source, tmp_path, capsys):
    prepare(source, byte_tokenizer(), tmp_path / "cache", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenizing" in err

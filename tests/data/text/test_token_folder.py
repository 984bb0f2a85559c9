"""Folders of tokens: equal for any division of the work, and read as the text would be."""

import json
import shutil
from itertools import chain, zip_longest
from pathlib import Path

import fsspec
import pytest

from transom.base.errors import RequestError
from transom.data.store import FileStore
from transom.data.text import tokenizing
from transom.data.text.batches import TextBatches
from transom.data.text.shards import prepare
from transom.data.text.sources import (
    ReadReport,
    SourceArgs,
    TextFile,
    read_documents,
    read_files,
)
from transom.data.text.token_folder import open_corpus
from transom.data.text.tokenizing import tokenize
from transom.tokenizers.training import byte_tokenizer

TOKENIZER = byte_tokenizer()
ROW = b'{"text": "%d"}'
AWKWARD = {
    "plain": b"".join(ROW % at + b"\n" for at in range(6)),
    "no line end": b"\n".join(ROW % at for at in range(4)),
    "blank lines": b"\n\n" + ROW % 1 + b"\n \n\n" + ROW % 2 + b"\n\n",
    "CRLF and a byte order mark": b"\xef\xbb\xbf" + b"\r\n".join(ROW % at for at in range(4)),
    "a long line": ROW % 1 + b"\n" + ROW % 10**50 + b"\n" + ROW % 2,
    "characters that end lines of text": '{"text": "\u2028\x85é"}\n\r\n{"text": "b"}'.encode(),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizing, "SHARD_BYTES", 200)
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"text {number} é " * (number + 1), encoding="utf-8")
    rows = [json.dumps({"text": f"row {number}" * 9}) for number in range(9)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "0.bin").write_bytes(b"\0")  # whose shard may have no documents
    return SourceArgs(str(folder))


@pytest.fixture
def made(texts, tmp_path):
    return tmp_path / "made", tokenize(texts, TOKENIZER, str(tmp_path / "made"), workers=1)[0]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(corpus, world_size=1):
    settings = {"bos_id": 256, "eos_id": 257, "vocab_size": 258, "seq_len": 24, "seed": 3}
    batches = TextBatches([corpus.train], [1.0], rows_per_step=4, **settings)
    return [batches.next().tokens.tolist() for _ in range(batches.items_per_epoch // 2)]


def test_any_number_of_processes_and_parts_writes_the_same_bytes(texts, made, tmp_path):
    folder, manifest = made
    assert len(manifest["shards"]) >= 5
    assert sum(shard["documents"] for shard in manifest["shards"]) == 21
    other = tmp_path / "other"
    for part in (3, 1, 2):
        found, _ = tokenize(texts, TOKENIZER, str(other), workers=2, part=f"{part}/3")
        assert (found["shards"] is None) is (part != 2)
        if part != 2:
            with pytest.raises(RequestError, match="got 'tokens of some parts'; expected all"):
                open_corpus(SourceArgs(str(other)), TOKENIZER)
    assert files_of(other) == files_of(folder)


@pytest.mark.parametrize("content", AWKWARD.values(), ids=AWKWARD)
def test_the_pieces_of_a_file_have_its_documents(content, tmp_path, monkeypatch):
    file = TextFile(tmp_path / "a.jsonl", "a.jsonl", named=True)
    file.path.write_bytes(content)
    whole = ReadReport()
    documents = list(read_files([file], whole))
    for size in range(1, len(content)):
        monkeypatch.setattr(tokenizing, "SHARD_BYTES", size)
        report, parts = ReadReport(), []
        for first in range(3):
            pieces = tokenizing._pieces(file)[first::3]  # as part 1, 2 or 3 of 3
            parts.append([list(read_files([piece], report)) for piece in pieces])
        ordered = [one for some in zip_longest(*parts, fillvalue=[]) for one in some]
        assert list(chain.from_iterable(ordered)) == documents
        assert report == whole


def test_a_fault_in_a_piece_names_its_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes((ROW % 1 + b"\n") * 40 + b"{\n" + ROW % 2)
    with pytest.raises(RequestError, match=r"a.jsonl:41: '{': expected one JSON object"):
        tokenize(SourceArgs(str(file)), TOKENIZER, str(tmp_path / "out"), workers=1, part="3/3")


@pytest.mark.parametrize("groups", [1, 3])
def test_parquet_files_are_cut_by_row_groups(groups, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = TextFile(tmp_path / "a.parquet", "a.parquet", named=True)
    table = pytest.importorskip("pyarrow").table({"text": [f"row {at}" for at in range(20)]})
    parquet.write_table(table, file.path, row_group_size=-(-20 // groups))
    pieces = [list(read_files([one], ReadReport())) for one in tokenizing._pieces(file)]
    assert list(chain.from_iterable(pieces)) == list(read_files([file], ReadReport()))
    assert sum(map(bool, pieces)) == groups


def test_a_notice_counts_large_files_that_cannot_be_cut(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a" * 201)
    (tmp_path / "b.jsonl").write_bytes((ROW % 1 + b"\n") * 40)
    for part, shown in (("1/1", False), ("1/2", True)):
        out = str(tmp_path.parent / f"out-{part[2]}")
        tokenize(SourceArgs(str(tmp_path)), TOKENIZER, out, workers=1, part=part)
        sentence = "1 file of more than 200 bytes can't be divided among parts; uncompressed .jsonl"
        assert (sentence in capsys.readouterr().err) is shown


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_folder_has_the_rows_and_the_held_out_documents_of_its_text(texts, made, fraction):
    folder, _ = made
    text = prepare(texts, TOKENIZER, held_out_fraction=fraction)
    read = open_corpus(SourceArgs(str(folder)), TOKENIZER, held_out_fraction=fraction)
    assert rows_of(read) == rows_of(text)
    for one, other in ((read.train, text.train), (read.held_out, text.held_out)):
        assert list(one.ids) == other.ids and one.bytes.tolist() == other.bytes.tolist()
        assert [one.document(at).tolist() for at in range(len(one))] == [
            other.document(at).tolist() for at in range(len(other))
        ]
    assert bool(len(read.held_out)) is (fraction > 0)


def test_a_killed_run_continues_with_the_missing_shards(texts, made, tmp_path, monkeypatch):
    folder, _ = made
    out, put = tmp_path / "out", FileStore.put
    written = []

    def failing(self, name, path):
        written.append(name)
        if len(written) == 13:  # in the middle of the third shard, of which files are there
            raise KeyboardInterrupt
        put(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            tokenize(texts, TOKENIZER, str(out), workers=1)
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(
            FileStore, "put", lambda self, *given: (again.append(given[0]), put(self, *given))
        )
        tokenize(texts, TOKENIZER, str(out), workers=1)
    assert files_of(out) == files_of(folder)
    whole = {name[:8] for name in written[:10]}
    assert len(whole) == 2 and not {name[:8] for name in again} & whole
    assert written[12] in again


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_shards_of_a_url_are_fetched_once(texts, made, tmp_path, scheme, monkeypatch):
    url = f"file://{tmp_path}/store" if scheme == "file" else "memory://tokens-of-a-test"
    tokenize(texts, TOKENIZER, url, workers=1)
    expected = open_corpus(SourceArgs(str(made[0])), TOKENIZER)
    assert rows_of(open_corpus(SourceArgs(url), TOKENIZER)) == rows_of(expected)
    monkeypatch.setattr(FileStore, "fetch", lambda *_: pytest.fail("fetched again"))
    assert rows_of(open_corpus(SourceArgs(url), TOKENIZER)) == rows_of(expected)
    files, root = fsspec.url_to_fs(url)
    files.rm(root, recursive=True)


@pytest.fixture
def bucket(monkeypatch):
    """Start an S3 server on this machine, and return the URL of a bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    settings = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
    settings["ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    server.stop()


@pytest.mark.slow
def test_an_object_store_gets_the_bytes_of_a_folder(texts, made, bucket, tmp_path):
    url, files = f"{bucket}/tokens", fsspec.filesystem("s3")
    for part in ("2/2", "1/2"):
        tokenize(texts, TOKENIZER, url, workers=1, part=part)
    assert {Path(one).name: files.cat_file(one) for one in files.ls(url)} == files_of(made[0])
    expected = open_corpus(SourceArgs(str(made[0])), TOKENIZER)
    assert rows_of(open_corpus(SourceArgs(url), TOKENIZER)) == rows_of(expected)
    missing = f"{made[1]['shards'][2]['name']}.tokens"
    files.rm_file(f"{url}/{missing}")
    with pytest.raises(RequestError, match=f"{url}/{missing}: got no file; expected one"):
        open_corpus(SourceArgs(url), TOKENIZER, tmp_path / "other cache")
    with pytest.raises(RequestError, match="s3://absent/x/: got no file; expected one"):
        tokenize(texts, TOKENIZER, "s3://absent/x")
    assert not files.exists("absent")


@pytest.mark.parametrize("where", ["path", "file"])
@pytest.mark.parametrize("harm", ["missing", "altered", "shorter"])
def test_a_missing_or_altered_shard_is_named(made, where, harm):
    folder, manifest = made
    file = folder / f"{manifest['shards'][2]['name']}.tokens"
    content = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(
            content[:-2] if harm == "shorter" else bytes([content[0] ^ 1]) + content[1:]
        )
    source = SourceArgs(str(folder) if where == "path" else f"file://{folder}")
    with pytest.raises(RequestError, match=rf"{file.name}: (cannot be read|got no file|got other)"):
        open_corpus(source, TOKENIZER)


def test_other_tokenizers_files_and_folders_are_refused(texts, made, tmp_path):
    folder, other = str(made[0]), byte_tokenizer(("<a>", "<b>"))
    sentence = r"'tokenizer': '.*'}; expected format 1 and this tokenizer, with hash "
    with pytest.raises(RequestError, match=sentence):
        open_corpus(SourceArgs(folder), other)
    with pytest.raises(RequestError, match=sentence):
        tokenize(texts, other, folder)
    with pytest.raises(RequestError, match="expected no include for a folder of tokens"):
        open_corpus(SourceArgs(folder, include=("a",)), TOKENIZER)
    with pytest.raises(
        RequestError, match="expected text; tokens are only read with the tokenizer"
    ):
        read_documents(SourceArgs(folder))
    Path(texts.path, "more.txt").write_text("more")
    for out in (folder, texts.path):
        with pytest.raises(RequestError, match=r"OUT: got .* tokens of the same files"):
            tokenize(texts, TOKENIZER, out)
    with pytest.raises(RequestError, match=r"--part: got '3/2'; expected I/N"):
        tokenize(texts, TOKENIZER, folder, part="3/2")
    with pytest.raises(RequestError, match=r"nothing://x: cannot be opened \("):
        open_corpus(SourceArgs("nothing://x"), TOKENIZER)


def test_a_folder_of_tokens_below_a_source_is_left_out(texts, made):
    shutil.move(made[0], Path(texts.path, "tokens"))
    report = ReadReport()
    assert len(list(read_documents(texts, report))) == 21
    assert report.notes["folders of runs or of cached tokens left out"] == 1

"""A GGUF file in place of a model folder: split files, the cache, and what verbs make of it."""

import json

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from tests.checkpoints.gguf.vocabularies import byte_pairs, byte_pairs_metadata
from tests.training.finetune.runs import asked, write_rows
from transom.base.errors import RequestError
from transom.checkpoints.convert import convert
from transom.checkpoints.files.location import find_model
from transom.checkpoints.fingerprint import fingerprint, read_facts
from transom.checkpoints.gguf import folder as gguf_folder
from transom.checkpoints.load import load
from transom.checkpoints.open_model import open_model
from transom.cli.main import main
from transom.layers.inputs import TransformerInput


def logits(name, ids, **options):
    return load(name, **options)(TransformerInput(ids), inference=True).logits


@pytest.fixture(scope="module")
def model():
    return tiny_hf("llama-tied")


@pytest.fixture
def whole(model, tmp_path):
    return write_gguf(model, tmp_path / "whole.gguf", tmp_path / "hf")


def test_any_part_of_a_split_file_opens_the_model(model, whole, tmp_path):
    write_gguf(model, tmp_path / "parts.gguf", tmp_path / "hf", split=8)
    parts = sorted(tmp_path.glob("parts-0000?-of-00003.gguf"))
    ids = random_ids()
    for part in parts:
        assert torch.equal(logits(part, ids), logits(whole, ids))
    parts[1].unlink()
    with pytest.raises(RequestError, match=r"one of 3 parts, of which parts-00002-of-00003\.gguf"):
        find_model(parts[2])
    alone = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(RequestError, match=r"renamed\.gguf: split\.count: got 3; expected 1"):
        find_model(alone)


def test_links_keep_their_names_as_in_the_cache_of_the_hub(model, tmp_path):
    write_gguf(model, tmp_path / "parts.gguf", tmp_path / "hf", split=8)
    (tmp_path / "blobs").mkdir()
    for part in sorted(tmp_path.glob("*.gguf")):
        blob = part.rename(tmp_path / "blobs" / part.name[6:11])
        part.symlink_to(blob)
    first = tmp_path / "parts-00001-of-00003.gguf"
    assert str(find_model(tmp_path / "hf" / ".." / first.name)) == str(first)
    assert load(first).args.n_layers == 2


def test_the_name_of_the_file_does_not_matter(whole, tmp_path):
    blob = whole.rename(tmp_path / "sha256-0123")
    assert str(find_model(blob)) == str(blob)


def test_a_changed_file_is_translated_again(whole, tmp_path):
    before = find_model(whole).model
    write_gguf(tiny_hf("llama-tied", num_hidden_layers=1), whole, tmp_path / "hf")
    assert find_model(whole).model != before
    assert load(whole).args.n_layers == 1


@pytest.mark.parametrize("faster", [False, True])
def test_an_interrupted_or_overtaken_translation_leaves_a_complete_folder(
    whole, monkeypatch, faster
):
    translate = gguf_folder._translate

    def interrupted(opened, folder):
        translate(opened, folder)
        monkeypatch.undo()
        if faster:
            find_model(whole)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf_folder, "_translate", interrupted)
    if not faster:
        with pytest.raises(KeyboardInterrupt):
            find_model(whole)
    found = find_model(whole).model
    assert [path.name for path in found.parent.iterdir()] == [whole.name]
    assert load(whole).args.n_layers == 2


def test_a_cache_that_cannot_be_written_is_named_and_not_needed(
    whole, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    expected, cached = logits(whole, random_ids()), find_model(whole).model
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "file"))
    assert torch.equal(logits(whole, random_ids()), expected)
    other = find_model(whole).model
    assert other != cached and (other.parent, other.name) == (
        find_model(whole).model.parent,
        whole.name,
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the cache folder {tmp_path / 'file'} can't be written (Not a directory)" in line


@pytest.mark.parametrize("format", ["hf", "native", "mistral"])
def test_a_converted_file_is_the_same_model(whole, tmp_path, format):
    done = convert(whole, tmp_path / "out", format)
    assert (done.source_format, str(done.source)) == ("gguf", str(whole))
    ids = random_ids()
    tied = format != "mistral"
    assert torch.allclose(logits(tmp_path / "out", ids), logits(whole, ids), atol=2e-5)
    assert not tied or fingerprint(tmp_path / "out") == fingerprint(whole)


@pytest.mark.parametrize("kept", ["false", "true"])
def test_an_adapter_on_a_file_names_it_and_merges(tmp_path, capsys, kept):
    library = byte_pairs()
    values = byte_pairs_metadata(library)
    model = tiny_hf(
        "qwen3", vocab_size=len(values["tokenizer.ggml.tokens"]), num_key_value_heads=2, head_dim=16
    )
    file = write_gguf(
        model, tmp_path / "base.gguf", tmp_path / "hf", kind=Type.Q8_0, metadata=values
    )
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": asked("a", "b")}] * 8)
    run = tmp_path / "run"
    words = ["finetune", str(file), "--data", str(rows), "--out", str(run), "--iters", "2"]
    words.append("dtype=float32")  # a dtype chosen by its speed would round the merged weights
    assert main([*words, f"finetune.keep_quantized={kept}"]) == 0, capsys.readouterr().err
    location = find_model(run)
    assert str(location).startswith(f"{file} + adapter ")
    assert read_facts(location.adapter).base == str(file)
    named = json.loads((location.adapter / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(file)
    assert main(["merge", str(file), str(run), str(tmp_path / "merged")]) == 0
    assert main(["verify", "merge", str(file), str(run)]) == 0, capsys.readouterr().out
    capsys.readouterr()
    ids = random_ids()
    merged = logits(tmp_path / "merged", ids, dtype="float32")
    assert torch.allclose(merged, logits(run, ids, dtype="float32"), atol=1e-5)
    assert open_model(tmp_path / "merged").tokenizer.encode("hello") == library.encode("hello").ids


def test_messages_about_files_beside_the_weights_name_the_file(tmp_path):
    values = byte_pairs_metadata(byte_pairs())
    source = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    rows = len(values["tokenizer.ggml.tokens"])
    opened = {
        kind: write_gguf(
            tiny_hf("llama-tied", vocab_size=size),
            tmp_path / f"{kind}.gguf",
            tmp_path / "hf",
            metadata=values | source,
        )
        for kind, size in (("fits", rows), ("short", rows - 7))
    }
    assert open_model(opened["fits"]).template.origin == str(opened["fits"])
    with pytest.raises(RequestError) as error:
        open_model(opened["short"])
    assert str(error.value).startswith(f"{opened['short']}: token ")


def test_the_verbs_name_the_file(whole, capsys):
    assert main(["inspect", str(whole)]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{whole}: ")
    assert main(["generate", str(whole), "--prompt", "a"]) == 2
    assert "tokenizer: got" in capsys.readouterr().err

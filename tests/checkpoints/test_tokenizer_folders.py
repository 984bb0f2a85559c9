"""Tokenizers without a model, and the vocabulary that a tokenizer is checked against."""

import json

import pytest

from tests.chat.chat_texts import say
from tests.checkpoints.adapters.folders import write_adapter, write_base
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.evaluation.eval_model import EvalModel
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.vocabulary import add_tokens
from transom.tokenizers.training import byte_tokenizer


@pytest.fixture
def alone(tmp_path):
    """A folder with a tokenizer and no model."""
    byte_tokenizer(("<s>", "</s>", "<|im_start|>", "<|im_end|>")).save(tmp_path / "alone")
    return tmp_path / "alone"


def test_a_tokenizer_alone_opens(alone):
    expected = byte_tokenizer().encode("abc")
    assert load_tokenizer(alone).encode("abc") == expected
    assert load_tokenizer(alone / "tokenizer.json").encode("abc") == expected


def test_no_model_is_made_of_it(alone):
    with pytest.raises(RequestError, match=r"no config\.json"):
        load(alone)
    with pytest.raises(RequestError, match="a file; expected a model"):
        load(alone / "tokenizer.json")
    with pytest.raises(RequestError, match=r"no config\.json.* or one with tokenizer\.json"):
        load_tokenizer(alone.parent)


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_data_is_checked_with_it(alone, name, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [say("user", "q"), say("assistant", "a")]}) + "\n")
    model = str(alone / name) if name else str(alone)
    assert main(["data", "check", str(rows), "--model", model, "--json"]) == 0
    out, err = capsys.readouterr()
    assert (
        json.loads(out.splitlines()[-1])["seq_len"] == 4096 and "a tokenizer without a model" in err
    )
    assert main(["data", "show", str(rows), "--model", model, "--seq-len", "64"]) == 0
    assert main(["data", "check", str(rows), "--model", model, "--seq-len", "1"]) == 2


def test_the_file_of_a_tokenizer_is_checked_against_the_model_beside_it(tmp_path):
    save(random_model(tiny_args(vocab_size=200)), tmp_path, tokenizer=byte_tokenizer())
    with pytest.raises(RequestError, match="id 200; expected ids below 200"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_the_default_vocabulary_of_a_class_counts_as_well(tmp_path):
    """A part of a multimodal config leaves out what its class has."""
    byte_tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}}))
    from transom.checkpoints.files.location import ModelLocation
    from transom.checkpoints.read_args import vocabulary_size

    assert vocabulary_size(ModelLocation(tmp_path)) == 262208


def test_an_adapter_with_new_tokens_is_evaluated_without_a_warning(tmp_path, capsys):
    base = write_base(tmp_path / "base", dtype="float32")
    model, tokenizer = load(base), load_tokenizer(base)
    tokenizer = add_tokens(model, tokenizer, ["<|new|>"])
    apply_lora(model, LoraArgs(rank=2, alpha=2.0, modules_to_save=("tok_embeddings", "output")))
    save_adapter(model, tmp_path / "adapter", base=str(base))
    tokenizer.save(tmp_path / "adapter")
    capsys.readouterr()
    subject = EvalModel.open(tmp_path / "adapter", device="cpu")
    assert subject.tokenizer.vocab_size == subject.model.args.vocab_size
    assert "no embedding" not in capsys.readouterr().err


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("hf", "model.safetensors"),
        ("hf", "config.json"),
        ("hf", "model.safetensors.index.json"),
        ("meta", "params.json"),
        ("meta", "consolidated.00.pth"),
        ("mistral", "consolidated.safetensors"),
    ],
)
def test_a_pointer_of_git_lfs_in_place_of_a_model(tmp_path, format, name):
    if name.endswith("index.json"):
        save(random_model(tiny_args(rope_layout="halves")), tmp_path, "hf", max_shard_size="9KB")
    else:
        save(random_model(tiny_args(rope_layout="halves")), tmp_path, format)
    assert (tmp_path / name).exists()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(RequestError, match=rf"{name}: .*git-lfs"):
        load(tmp_path)


def test_a_pointer_of_git_lfs_among_weights_of_another_format(tmp_path):
    save(random_model(tiny_args(rope_layout="halves")), tmp_path, "hf")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(RequestError, match=r"pytorch_model\.bin: .*git-lfs"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"]
)
def test_a_pointer_of_git_lfs_in_place_of_an_adapter(tmp_path, name):
    base = write_base(tmp_path / "base", dtype="float32")
    at = write_adapter(tmp_path / "adapter", base, facts=False)
    if name.endswith(".bin"):
        (at / "adapter_model.safetensors").unlink()
    (at / name).write_text(POINTER)
    with pytest.raises(RequestError, match=rf"{name}: .*git-lfs"):
        load(at)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "tekken.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ],
)
def test_a_pointer_of_git_lfs_in_place_of_a_tokenizer(alone, name):
    if name in ("tokenizer.model", "tekken.json"):
        (alone / "tokenizer.json").unlink()
    (alone / name).write_text(POINTER)
    with pytest.raises(RequestError, match=rf"{name}: .*git-lfs"):
        load_tokenizer(alone)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_template(alone, name):
    from transom.chat.template import ChatTemplate

    (alone / name).write_text(POINTER)
    with pytest.raises(RequestError, match=rf"{name}: .*git-lfs"):
        ChatTemplate.load(alone, load_tokenizer(alone))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.json", "text.txt"])
def test_a_pointer_of_git_lfs_in_place_of_data(tmp_path, name):
    from transom.data.text.sources import SourceArgs, read_documents

    (tmp_path / name).write_text(POINTER)
    with pytest.raises(RequestError, match=rf"{name}: .*git-lfs"):
        list(read_documents(SourceArgs(str(tmp_path / name))))


def test_a_pointer_of_git_lfs_in_place_of_an_image(tmp_path):
    from transom.models.images import open_image

    (tmp_path / "cat.png").write_text(POINTER)
    with pytest.raises(RequestError, match=r"cat\.png: .*git-lfs"):
        open_image(tmp_path / "cat.png")


@pytest.mark.parametrize(
    ("format", "name", "key"),
    [
        ("native", "config.json", "rope_theta"),
        ("hf", "config.json", "rms_norm_eps"),
        ("meta", "params.json", "norm_eps"),
        ("mistral", "params.json", "rope_theta"),
    ],
)
@pytest.mark.parametrize("word", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_a_config_with_no_finite_number(tmp_path, format, name, key, word):
    save(random_model(tiny_args(rope_layout="halves")), tmp_path, format)
    config = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps({**config, key: "here"}).replace('"here"', word))
    with pytest.raises(
        RequestError, match=rf"{name}: {key}: got -?(inf|nan); expected a finite number"
    ):
        load(tmp_path)


def test_an_adapter_with_no_finite_number(tmp_path):
    at = write_adapter(
        tmp_path / "adapter", write_base(tmp_path / "base", dtype="float32"), facts=False
    )
    config = json.loads((at / "adapter_config.json").read_text())
    (at / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": float("inf")}))
    with pytest.raises(RequestError, match="lora_alpha: got inf"):
        load(at)

"""`transom convert` as a person or a script meets it."""

import json

import pytest
import torch

from tests.helpers import random_model, run_python, tiny_args
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.tokenizers.training import byte_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    at = tmp_path_factory.mktemp("source") / "hf"
    save(
        random_model(tiny_args(vocab_size=byte_tokenizer().vocab_size)),
        at,
        format="hf",
        tokenizer=byte_tokenizer(),
    )
    (at / "chat_template.jinja").write_text("{{ messages }}")
    return at


@pytest.fixture
def call(capsys):
    def call(*words):
        code = main(["convert", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("format", ["hf", "native", "meta", "mistral"])
def test_a_folder_becomes_another_with_all_that_goes_along(source, call, tmp_path, format):
    code, out, err = call(source, tmp_path / "out", "--format", format, "--json")
    document, model = json.loads(out.splitlines()[-1]), load(source)
    assert code == 0 and f"({format})" in err
    assert document["source_format"] == "hf" and document["format"] == format
    assert document["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} <= set(
        document["companions"]
    )
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert load_tokenizer(tmp_path / "out").encode("abc") == load_tokenizer(source).encode("abc")
    tokens = torch.arange(9)[None]
    from transom.layers.inputs import TransformerInput

    again = load(tmp_path / "out")(TransformerInput(tokens)).logits
    torch.testing.assert_close(again, model(TransformerInput(tokens)).logits, atol=1e-5, rtol=0)


def test_dtype_and_shards(source, call, tmp_path):
    code, _, _ = call(source, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "20KB")
    assert code == 0 and len(list((tmp_path / "out").glob("model-*"))) > 1
    assert load(tmp_path / "out").norm.weight.dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == byte_tokenizer().eos_id, "tools that look there find it"


def test_an_occupied_folder_is_refused_unless_told(source, call, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = call(source, tmp_path)
    assert code == 2 and "not empty; expected a new or empty folder, or --overwrite" in err
    assert call(source, tmp_path, "--overwrite")[0] == 0
    assert (tmp_path / "notes.txt").exists() and load(tmp_path)
    code, _, err = call(source, tmp_path / "notes.txt")
    assert code == 2 and "a file; expected a new or empty folder" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/no/such/folder", "OUT"], "got '/no/such/folder', no such folder"),
        (["SRC", "SRC", "--overwrite"], "that is not read"),
        (["SRC", "OUT", "--format", "onnx"], "--format: got 'onnx'; expected"),
        (["SRC", "OUT", "--dtype", "int8"], "dtype: got 'int8'"),
        (["SRC", "OUT", "--max-shard-size", "many"], "max_shard_size: got 'many'"),
        (["SRC", "OUT", "--format", "meta", "--max-shard-size", "1GB"], "format meta is one file"),
        (["SRC", "OUT", "--revision", "v1"], "revision: got 'v1'; valid only with a hub id"),
        (["SRC"], "OUT"),
    ],
)
def test_wrong_requests_are_one_sentence_and_write_nothing(source, call, tmp_path, words, said):
    words = [{"SRC": source, "OUT": tmp_path / "out"}.get(word, word) for word in words]
    code, out, err = call(*words)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_a_format_cannot_hold_is_refused_by_name(call, tmp_path):
    save(random_model(tiny_args(qkv_bias=True)), tmp_path / "in")
    code, _, err = call(tmp_path / "in", tmp_path / "out", "--format", "mistral")
    assert code == 2 and "format: got 'mistral'; expected hf or native" in err
    assert not (tmp_path / "out").exists()


def test_help_does_not_wait_for_torch():
    code = "import transom.cli.convert, sys; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"

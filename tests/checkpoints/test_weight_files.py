"""Folders with more than one set of weights, and with the weights of a base model alone."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.checkpoints.consolidated import PARAMS, cut, meta_state, twin, write_meta
from tests.checkpoints.families import random_ids, tiny_hf
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.convert import convert
from transom.checkpoints.families.same_model import same_model
from transom.checkpoints.files.consolidated import read_pickled
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.config.layer_args import BASE_HEAD
from transom.layers.inputs import TransformerInput
from transom.tokenizers.training import byte_tokenizer


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A Hugging Face folder with one file of weights."""
    at = tmp_path_factory.mktemp("single")
    tiny_hf("llama-linear").save_pretrained(at)
    return at


@pytest.fixture
def folder(single, tmp_path):
    return shutil.copytree(single, tmp_path / "hf")


def add_shards(folder, seed=1):
    """Put the shards of another model and their index into the folder."""
    tiny_hf("llama-linear", seed).save_pretrained(folder / "old", max_shard_size="20KB")
    for path in (folder / "old").glob("model*"):
        path.rename(folder / path.name)
    shutil.rmtree(folder / "old")
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def logits_are_those_of_transformers(folder, rtol=0.0):
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids()
    ours = load(folder)(TransformerInput(ids), inference=True).logits
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=rtol, atol=2e-5)


def test_a_single_file_is_read_before_an_index(folder, capsys):
    shards = add_shards(folder)
    logits_are_those_of_transformers(folder)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "ignored" in line)
    assert "weights are read from model.safetensors; ignored: " in line and shards[0] in line


def test_an_index_without_its_shards_beside_a_single_file(folder, capsys):
    for name in add_shards(folder):
        (folder / name).unlink()
    logits_are_those_of_transformers(folder)
    assert "model.safetensors; ignored: model.safetensors.index.json" in capsys.readouterr().err


def test_shards_are_read_where_there_is_no_single_file(folder, capsys):
    add_shards(folder)
    (folder / "model.safetensors").unlink()
    logits_are_those_of_transformers(folder)
    assert "ignored" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", ["pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors"]
)
def test_other_sets_of_weights_are_named(folder, capsys, other):
    (folder / other).parent.mkdir(exist_ok=True)
    (folder / other).write_bytes(b"")
    logits_are_those_of_transformers(folder)
    assert f"weights are read from model.safetensors; ignored: {other}" in capsys.readouterr().err


def test_weights_only_in_original_are_pointed_at(folder):
    (folder / "original").mkdir()
    (folder / "model.safetensors").rename(folder / "original" / "consolidated.00.pth")
    with pytest.raises(RequestError, match=r"original/consolidated\.00\.pth is there"):
        load(folder)


@pytest.mark.parametrize("index", [False, True])
def test_the_config_may_name_its_weights(folder, capsys, index):
    add_shards(folder)
    if index:
        (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    else:
        shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    name = "other.safetensors.index.json" if index else "other.safetensors"
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    logits_are_those_of_transformers(folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "../other.safetensors"})
    )
    with pytest.raises(RequestError, match=r"config\.json: transformers_weights: got '\.\./other"):
        load(folder)


def test_adapter_files_side_by_side(tmp_path, capsys):
    model = random_model(tiny_args())
    at = tmp_path / "adapter"
    at.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    (at / "adapter_config.json").write_text(json.dumps(config))
    keys = [
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{which}.weight" for which in "AB"
    ]
    parts = {keys[0]: torch.ones(2, 32), keys[1]: torch.ones(32, 2)}
    save_file(parts, at / "adapter_model.safetensors")
    torch.save({}, at / "adapter_model.bin")
    load_adapter(model, at)
    said = "the adapter is read from adapter_model.safetensors; ignored: adapter_model.bin"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "family", ["llama-linear", "qwen3_moe", "gemma2", "deepseek_v3", "llama-tied"]
)
def test_a_base_model_without_its_head(family, tmp_path, capsys):
    tiny_hf(family).save_pretrained(tmp_path / "whole")
    theirs = AutoModel.from_pretrained(tmp_path / "whole").eval()
    theirs.save_pretrained(tmp_path / "base")
    ids = random_ids()
    ours = load(tmp_path / "base")
    out = ours(TransformerInput(ids), inference=True)
    torch.testing.assert_close(out.hidden_BTD, theirs(ids).last_hidden_state, rtol=0, atol=5e-5)
    said = capsys.readouterr().err
    if theirs.config.tie_word_embeddings:
        whole = load(tmp_path / "whole")(TransformerInput(ids), inference=True)
        assert torch.equal(out.logits, whole.logits) and "without lm_head" not in said
    else:
        assert out.logits is None and "a base model without lm_head.weight" in said


@pytest.mark.parametrize("family", ["llama-linear", "qwen3_moe", "llama4_text", "deepseek_v3"])
def test_a_base_model_is_written_as_one(family, tmp_path, capsys):
    tiny_hf(family).model.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again", "hf")
    ids = random_ids()
    theirs = AutoModel.from_pretrained(tmp_path / "again").eval()
    ours = load(tmp_path / "base")(TransformerInput(ids), inference=True).hidden_BTD
    assert (
        type(theirs).__name__
        == json.loads((tmp_path / "base" / "config.json").read_text())["architectures"][0]
    )
    torch.testing.assert_close(ours, theirs(ids).last_hidden_state.detach(), rtol=0, atol=5e-5)
    assert same_model(read_args(tmp_path / "again"), read_args(tmp_path / "base"))
    assert "keys not read" not in capsys.readouterr().err


def test_a_base_model_embeds_and_does_not_generate(tmp_path, capsys):
    model = tiny_hf("llama-linear")
    model.resize_token_embeddings(300)
    model.model.save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    assert main(["embed", str(tmp_path), "--text", "a b", "--device", "cpu"]) == 0
    assert main(["generate", str(tmp_path), "--prompt", "a", "--device", "cpu"]) == 2
    assert "head: got 'embedding'" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [["LlamaForCausalLM"], None])
def test_a_head_that_the_config_does_not_rule_out_may_not_be_missing(folder, classes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": classes}))
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"missing lm_head\.weight"):
        load(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert load(folder).args.head == BASE_HEAD, (
        "a folder that pools tokens is that of an embedding model"
    )


def test_a_class_without_a_head_may_have_one_in_its_files(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    logits_are_those_of_transformers(folder)


def test_an_adapter_of_a_base_model(folder, tmp_path):
    """PEFT on `AutoModel` leaves out `model.` in front of the layers."""
    from peft import LoraConfig, get_peft_model

    base = AutoModel.from_pretrained(folder).eval()
    base.save_pretrained(tmp_path / "base")
    peft = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    peft.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    ids = random_ids()
    out = ours(TransformerInput(ids), inference=True).hidden_BTD
    torch.testing.assert_close(out, peft(ids).last_hidden_state.detach(), rtol=0, atol=5e-5)


def test_empty_extra_states_open(tmp_path):
    """Released Llama 4 files have them; a pickle writes an empty BytesIO with a call of `bytes`."""
    states = cut("llama3", meta_state("llama3", twin("llama3")), 1)
    at = write_meta(tmp_path, PARAMS["llama3"], states)
    torch.save(
        {**states[0], "layers.0.attention.wo._extra_state": io.BytesIO()},
        at / "consolidated.00.pth",
    )
    assert load(at).args == read_args(at)


class Bytes:
    """A pickle that asks for a lot of memory by calling `bytes`."""

    def __reduce__(self):
        return bytes, (1 << 20,)


@pytest.mark.parametrize("value", [Bytes(), bytearray(b"x"), {1, 2}])
def test_no_other_type_comes_in(tmp_path, value):
    torch.save({"a": torch.ones(1), "b": value}, tmp_path / "consolidated.00.pth")
    with pytest.raises(RequestError, match=r"consolidated\.00\.pth"):
        read_pickled(tmp_path / "consolidated.00.pth")


def test_native_folders_follow_the_same_order(tmp_path, capsys):
    save(random_model(tiny_args(), seed=1), tmp_path / "other", max_shard_size="9KB")
    save(random_model(tiny_args()), tmp_path / "model")
    for path in (tmp_path / "other").glob("model*"):
        shutil.copy(path, tmp_path / "model")
    weight = load(tmp_path / "model").layers[0].attention.wq.weight
    assert torch.equal(weight, random_model(tiny_args()).layers[0].attention.wq.weight)
    assert "ignored: model-00001-of-" in capsys.readouterr().err


def test_bfloat16_and_float16_in_one_folder_become_float32(folder):
    """Neither holds the numbers of the other: 1e6 is infinite in float16."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    halves = {
        name: state[name].to((torch.bfloat16, torch.float16)[i % 2]) for i, name in enumerate(names)
    }
    halves[names[0]].view(-1)[0] = 1e6
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    logits_are_those_of_transformers(folder, rtol=2e-5)  # a weight of 1e6 makes large logits

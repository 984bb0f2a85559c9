"""Models and adapters by hub id, over a hub made of folders: what is fetched, and that verbs answer
alike.
"""

import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi

from tests.checkpoints.consolidated import PARAMS, VOCAB, cut, meta_state, twin, write_meta
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.save import save
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.tokenizers.training import byte_tokenizer


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """A hub that is there: repositories are folders `hub/OWNER/NAME`; what is fetched lands in a
    cache, by name.
    """
    root, fetched = tmp_path / "hub", []

    def files(_, name, revision=None):
        return [
            str(path.relative_to(root / name))
            for path in (root / name).rglob("*")
            if path.is_file()
        ]

    def fetch(name, revision=None, allow_patterns=(), **_):
        folder = tmp_path / "cache" / f"{name}@{revision}"
        folder.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            shutil.copy(root / name / file, folder / file)
            fetched.append(f"{name}@{revision}/{file}")
        return str(folder)

    monkeypatch.setattr(HfApi, "list_repo_files", files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(base_model(), root / "owner" / "base", format="hf", tokenizer=byte_tokenizer())
    return root, fetched


def base_model():
    return random_model(tiny_args(vocab_size=byte_tokenizer().vocab_size))


def write_adapter(folder, base, **changes):
    """An adapter that changes what the base says, as PEFT's files."""
    model = apply_lora(base_model(), LoraArgs(rank=2, alpha=8.0), seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    save_adapter(model, folder, base=base)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def weights_in(fetched):
    return {name for name in fetched if name.endswith((".safetensors", ".pth", ".bin"))}


def test_settings_are_read_without_weights(repositories, call):
    _, fetched = repositories
    assert load_tokenizer("owner/base").vocab_size == byte_tokenizer().vocab_size
    code, out, err = call("inspect", "owner/base", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] == sum(
        weight.numel() for weight in base_model().parameters()
    )
    assert "owner/base@None/config.json" in fetched and not weights_in(fetched)
    load("owner/base")
    assert weights_in(fetched) == {"owner/base@None/model.safetensors"}


def test_a_trace_of_a_hub_id_fetches_its_weights(repositories, call):
    code, _, err = call("inspect", "owner/base", "--trace", "ab")
    assert code == 0, err


def test_weights_are_fetched_where_only_they_know_the_vocabulary(repositories, call):
    root, fetched = repositories
    (root / "owner" / "meta").mkdir()
    state = meta_state("llama2", twin("llama2"))
    write_meta(root / "owner" / "meta", PARAMS["llama2"], cut("llama2", state, 1))
    code, out, err = call("inspect", "owner/meta", "--json")
    assert code == 0, err
    assert (
        json.loads(out)["vocab_size"] == VOCAB and "owner/meta@None/consolidated.00.pth" in fetched
    )


@pytest.mark.parametrize("revision", [None, "v1"])
def test_an_adapter_comes_on_the_base_it_names(repositories, revision):
    root, fetched = repositories
    write_adapter(root / "owner" / "adapter", "owner/base", revision=revision)
    expected = load_adapter(load(root / "owner" / "base"), root / "owner" / "adapter")
    mine = load("owner/adapter")
    weight = "layers.0.attention.wq.lora.default.B"
    assert torch.equal(mine.get_parameter(weight), expected.get_parameter(weight))
    assert torch.equal(mine.output.weight, expected.output.weight)
    assert weights_in(fetched) == {
        "owner/adapter@None/adapter_model.safetensors",
        f"owner/base@{revision}/model.safetensors",
    }
    assert load_tokenizer("owner/adapter").vocab_size == byte_tokenizer().vocab_size


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [("generate", ["-p", "ab", "-m", 4], ""), ("chat", ["-m", 4], "ab\n")],
)
def test_verbs_answer_as_the_adapter_does_from_its_folder(repositories, call, verb, words, said):
    root, _ = repositories
    write_adapter(root / "owner" / "adapter", str(root / "owner" / "base"))
    code, there, err = call(verb, root / "owner" / "adapter", *words, stdin=said)
    assert code == 0, err
    assert call(verb, "owner/adapter", *words, stdin=said)[1] == there
    assert call(verb, "owner/base", *words, stdin=said)[1] != there


def test_an_adapter_of_a_hub_is_planned_without_any_weights(repositories, call):
    root, fetched = repositories
    write_adapter(root / "owner" / "adapter", "owner/base")
    code, out, err = call("inspect", "owner/adapter", "--json")
    assert code == 0, err
    assert json.loads(out)["adapter"]["rank"] == 2 and not weights_in(fetched)


def test_the_base_of_an_adapter_may_be_a_folder(repositories):
    root, _ = repositories
    write_adapter(root / "owner" / "adapter", str(root / "owner" / "base"), revision="v1")
    found = find_model("owner/adapter", revision="v2")
    assert found.model == root / "owner" / "base"
    assert found.adapter is not None and found.adapter.name == "adapter@v2"


def test_a_base_that_is_not_there_is_named_with_its_adapter(repositories):
    root, _ = repositories
    write_adapter(root / "owner" / "adapter", "/gone/base")
    expected = r"adapter_config\.json: base_model_name_or_path: got '/gone/base', no such"
    with pytest.raises(RequestError, match=expected):
        load("owner/adapter")


def test_a_whole_model_beside_an_adapter_counts(repositories):
    root, _ = repositories
    write_adapter(root / "owner" / "base", "owner/other")
    assert find_model("owner/base", settings_only=True).adapter is None
    assert find_model("owner/base").adapter is None
    (root / "owner" / "base" / "model.safetensors").unlink()
    write_adapter(root / "owner" / "other", "owner/none")
    shutil.copy(root / "owner" / "base" / "config.json", root / "owner" / "other")
    with pytest.raises(
        RequestError, match="owner/none"
    ):  # the config of a base beside an adapter is no model
        find_model("owner/other")

"""Hub ids: read from the cache of huggingface_hub, and one sentence where neither it nor the hub
has them.
"""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.files import hub
from transom.checkpoints.files.hub import is_hub_id, wanted_files
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.save import save
from transom.tokenizers.training import byte_tokenizer

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with owner/tiny, two revisions, as a download would have left it; the network is
    off.
    """
    root = tmp_path / "cache" / "models--owner--tiny"
    for commit, seed in ((COMMIT, 0), (OLDER, 1)):
        model = random_model(tiny_args(vocab_size=byte_tokenizer().vocab_size), seed=seed)
        save(model, root / "snapshots" / commit, format="hf", tokenizer=byte_tokenizer())
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    (root / "refs" / "v1").write_text(OLDER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return root


def test_a_cached_model_is_read_offline_and_said(cache, capsys):
    model = load("owner/tiny")
    assert model.tok_embeddings.weight.equal(
        load(cache / "snapshots" / COMMIT).tok_embeddings.weight
    )
    assert (
        "owner/tiny: the hub cannot be reached; the copy in its cache is used"
        in capsys.readouterr().err
    )
    assert load_tokenizer("owner/tiny").decode([70, 71])


def test_a_revision_is_another_model(cache):
    older = load("owner/tiny", revision="v1").tok_embeddings.weight
    assert not older.equal(load("owner/tiny").tok_embeddings.weight)
    assert find_model("owner/tiny", OLDER).model.name == OLDER


@pytest.mark.parametrize(("name", "revision"), [("owner/other", None), ("owner/tiny", "v9")])
def test_what_is_nowhere_is_one_sentence(cache, name, revision):
    with pytest.raises(RequestError) as error:
        load(name, revision=revision)
    text = str(error.value)
    assert (
        text.startswith(f"{name} at revision v9:" if revision else f"{name}:") and "\n" not in text
    )
    assert "not in the hub's cache, and the hub cannot be reached" in text


def test_a_folder_of_that_name_comes_first(cache, tmp_path):
    save(random_model(tiny_args()), tmp_path / "owner" / "tiny")
    assert find_model("owner/tiny").model == Path("owner/tiny")
    with pytest.raises(RequestError, match="revision: got 'v1'; valid only with a hub id"):
        load("owner/tiny", revision="v1")


def test_a_mistyped_path_is_not_looked_up(cache, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(
        HfApi, "list_repo_files", lambda *_, **__: pytest.fail("a path went to the hub")
    )
    with pytest.raises(RequestError, match="got 'runs/demo', no such folder"):
        load("runs/demo")


class Response:
    """As little of an HTTP response as the errors of huggingface_hub read."""

    def __init__(self):
        self.headers, self.request, self.status_code = {}, None, 404


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GatedRepoError, "terms must be accepted"),
        (RepositoryNotFoundError, "no such model on the hub"),
        (RevisionNotFoundError, "no such revision"),
    ],
)
def test_what_the_hub_refuses_is_said(cache, monkeypatch, kind, said):
    def refuse(*_, **__):
        raise kind("a long\nstory", response=Response())

    monkeypatch.setattr(HfApi, "list_repo_files", refuse)
    with pytest.raises(RequestError, match=said):
        load("owner/tiny")


def test_only_one_set_of_weights_is_fetched(cache, monkeypatch):
    asked = {}
    files = [
        *("README.md", "config.json", "params.json", "pytorch_model.bin", "chat_template.jinja"),
        *(
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ),
        *(
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "tokenizer.model.v3",
            "tokenizer.json",
        ),
    ]

    def fetch(name, revision=None, allow_patterns=None, **_):
        asked["files"] = allow_patterns
        return str(cache / "snapshots" / COMMIT)

    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert hub.download("owner/tiny").name == COMMIT
    assert set(asked["files"]) == {
        name for name in files if name.startswith(("config", "model", "params", "token", "chat"))
    }
    assert "consolidated.safetensors" in wanted_files(
        [name for name in files if not name.startswith("model")]
    )
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: ["config.json", "model.gguf"])
    with pytest.raises(RequestError, match=r"no weights that are read; expected safetensors"):
        hub.download("owner/tiny")


@pytest.mark.parametrize(
    ("name", "fits"),
    [("owner/tiny", True), ("meta-llama/Llama-3.2-1B", True), ("tiny", False), ("/a/b", False), ("a/b/c", False),
     ("../b", False), ("./b", False), ("a/..", False), ("a/b c", False), ("", False)],
)  # fmt: skip
def test_what_could_be_a_hub_id(name, fits):
    assert is_hub_id(name) == fits


def test_a_cache_of_settings_alone_says_so(cache):
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert load_tokenizer("owner/tiny").vocab_size == byte_tokenizer().vocab_size
    with pytest.raises(
        RequestError, match="has its settings without weights, and the hub cannot be reached"
    ):
        load("owner/tiny")


@pytest.mark.parametrize(
    ("weights", "left"),
    [
        (["model.safetensors"], {"adapter_config.json"}),
        (["consolidated.safetensors"], {"adapter_config.json", "config.json"}),
        (["adapter_model.safetensors", "adapter_model.bin"], {"adapter_model.bin"}),
        (["adapter_model.bin"], set()),
    ],
)
def test_the_config_that_goes_with_the_weights_is_fetched(weights, left):
    files = ["config.json", "params.json", "adapter_config.json", "tokenizer.json", *weights]
    assert set(wanted_files(files)) == set(files) - left
    assert set(wanted_files(files, settings_only=True)) == set(files) - left - set(weights)

"""A model written over another one, killed at every step of the replacement."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoints.adapters.folders import write_adapter, write_base
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.files.layout import is_adapter
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.save import save
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.tokenizers.training import byte_tokenizer

VOCAB = 300
FORMATS = {
    "hf": {"format": "hf"},
    "hf shards": {"format": "hf", "max_shard_size": "30KB"},
    "native": {"format": "native"},
    "native shards": {"format": "native", "max_shard_size": "30KB"},
    "meta": {"format": "meta"},
    "mistral": {"format": "mistral"},
}


def model_of(seed, theta):
    """Models of the same shapes: a config of one and weights of the other would open together."""
    return random_model(
        tiny_args(vocab_size=VOCAB, rope_theta=theta, rope_layout="interleaved"), seed=seed
    )


def tokenizer_of(kind):
    """Byte tokenizers whose control tokens have other names."""
    return byte_tokenizer(("<s>", "</s>") if kind == "old" else ("<one>", "<two>"))


def facts(model):
    """What a model is: what it computes with, and one row of its weights."""
    return model.args.rope_theta, tuple(model.layers[0].attention.wv.weight[0].tolist())


@pytest.fixture
def killed(monkeypatch, tmp_path):
    """Copies of `folder` as a kill before each move or removal of a file would leave it."""

    def watch(folder, work):
        states = []

        def snapshot():
            states.append(shutil.copytree(folder, tmp_path / f"killed{len(states)}"))

        def watched(name):
            original = getattr(Path, name)

            def call(self, *args, **options):
                snapshot()
                return original(self, *args, **options)

            monkeypatch.setattr(Path, name, call)

        for name in ("replace", "unlink", "rename"):
            watched(name)
        work()
        monkeypatch.undo()
        return states

    return watch


@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("old", FORMATS)
def test_no_mixture_opens(old, new, tmp_path, killed):
    at = tmp_path / "model"
    save(model_of(0, 1e4), at, tokenizer=tokenizer_of("old"), **FORMATS[old])
    (at / "chat_template.jinja").write_text("old")
    before = facts(load(at))
    model, tokenizer = model_of(1, 5e4), tokenizer_of("new")
    states = killed(at, lambda: save(model, at, tokenizer=tokenizer, **FORMATS[new]))
    assert len(states) > 4
    after = facts(load(at))
    assert after[0] != before[0] and after[1] != before[1]
    assert load_tokenizer(at).special_tokens == tokenizer.special_tokens
    assert not (at / "chat_template.jinja").exists(), "the template of another model stayed"
    for state in states:
        try:
            found = facts(load(state))
        except RequestError:
            found = None
        assert found in (None, before, after)
        try:
            tokens = load_tokenizer(state)
        except RequestError:
            continue
        kind = "old" if tokens.special_tokens == tokenizer_of("old").special_tokens else "new"
        assert (tokens.special_tokens, tokens.eos_id) == (
            tokenizer_of(kind).special_tokens,
            tokenizer_of(kind).eos_id,
        )


def test_what_is_not_part_of_the_new_model_stays(tmp_path):
    """A tokenizer that was written before the model, and files that are not ours."""
    tokenizer_of("old").save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(model_of(0, 1e4), tmp_path)
    assert load_tokenizer(tmp_path).special_tokens == tokenizer_of("old").special_tokens
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_settings_of_generation_of_the_old_model_go(tmp_path):
    old = model_of(0, 1e4)
    old.generation_settings = {"eos_token_id": 7, "temperature": 0.5}
    save(old, tmp_path)
    save(model_of(1, 1e4), tmp_path)
    assert load(tmp_path).generation_settings == {}


def test_no_mixture_of_adapters_opens(tmp_path, killed):
    base = write_base(tmp_path / "base", dtype="float32")
    at = write_adapter(tmp_path / "adapter", base, facts=False, alpha=8.0)
    model = load(base)
    apply_lora(model, LoraArgs(rank=4, alpha=99.0), "new")

    def of(folder):
        held = load_adapter(load(base), folder).layers[0].attention.wq.lora["default"]
        return held.alpha, float(held.A.sum())

    before = of(at)
    states = killed(at, lambda: save_adapter(model, at, "new", base=str(base)))
    after = of(at)
    assert before[0] != after[0] and before[1] != after[1]
    assert {of(state) for state in states if is_adapter(state)} <= {before, after}


def test_a_failed_write_leaves_the_old_model(tmp_path, monkeypatch):
    save(model_of(0, 1e4), tmp_path)
    before = facts(load(tmp_path))
    model = model_of(1, 5e4)
    monkeypatch.setattr(
        "transom.checkpoints.save.write_stream",
        lambda *_: (_ for _ in ()).throw(OSError(28, "full")),
    )
    with pytest.raises(Exception, match="full"):
        save(model, tmp_path)
    assert facts(load(tmp_path)) == before
    assert torch.equal(load(tmp_path).norm.weight, model_of(0, 1e4).norm.weight)

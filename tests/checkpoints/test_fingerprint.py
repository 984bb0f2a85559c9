"""The fingerprint of a base: the same in every format, another for every other weight, asked for by
adapters.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.families import tiny_hf
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints import fingerprint as module
from transom.checkpoints.convert import convert
from transom.checkpoints.fingerprint import (
    ADAPTER_FACTS,
    check_base,
    fingerprint,
    read_facts,
    write_facts,
)
from transom.checkpoints.save import save
from transom.quantize.args import QuantizeArgs


def test_every_format_has_the_same_and_every_dtype_its_own(tmp_path):
    model = random_model(tiny_args(rope_layout="halves"))
    for format in ("native", "hf", "meta", "mistral"):
        save(model, tmp_path / format, format=format)
    save(model, tmp_path / "half", format="hf", dtype="bfloat16")
    save(random_model(tiny_args(rope_layout="interleaved")), tmp_path / "other", format="native")
    marks = {
        name: fingerprint(tmp_path / name)
        for name in ("native", "hf", "meta", "mistral", "half", "other")
    }
    assert len({marks[name] for name in ("native", "hf", "meta", "mistral")}) == 1
    assert len(set(marks.values())) == 3


@pytest.mark.parametrize("family", ["mixtral", "phi3", "deepseek_v3", "gpt_oss", "llama-tied"])
def test_weights_that_are_stacked_split_or_latent_keep_theirs(tmp_path, family):
    tiny_hf(family).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again", "hf")
    assert (
        fingerprint(tmp_path / "hf")
        == fingerprint(tmp_path / "native")
        == fingerprint(tmp_path / "again")
    )


def test_one_bit_of_one_weight_changes_it(tmp_path):
    save(random_model(tiny_args()), tmp_path, format="native")
    before = fingerprint(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["layers.1.feed_forward.w_out.weight"].view(torch.int32)[-1, -1] ^= 1
    save_file(state, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_files_that_change_while_they_are_hashed_are_not_cached(tmp_path, monkeypatch):
    save(random_model(tiny_args()), tmp_path / "model", format="native")
    for file in (tmp_path / "model").iterdir():
        os.utime(file, (1, 1))
    monkeypatch.setattr(module, "_SETTLED", -(10**18))  # the age of the files does not count
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    hashed = module.fingerprint_of

    def changed(*given):
        os.utime(tmp_path / "model" / "config.json", (2, 2))
        return hashed(*given)

    monkeypatch.setattr(module, "fingerprint_of", changed)
    fingerprint(tmp_path / "model")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(module, "fingerprint_of", hashed)
    fingerprint(tmp_path / "model")
    assert len(list((tmp_path / "cache" / "fingerprints").iterdir())) == 1


def test_facts_are_read_strictly_as_they_were_written(tmp_path):
    assert read_facts(tmp_path) is None
    write_facts(tmp_path, "some/base", "ab12", {"kind": "nf4"}, "bfloat16")
    facts = read_facts(tmp_path)
    assert (facts.base, facts.base_fingerprint) == ("some/base", "ab12")
    assert (facts.quantize, facts.dtype) == (QuantizeArgs("nf4"), "bfloat16")
    for changes, words in (
        ({"bas": "x"}, "bas: got an unknown field"),
        ({"base_fingerprint": ""}, "base_fingerprint: got ''"),
        ({"quantize": {"kind": "nf5"}}, "quantize.kind: got 'nf5'"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
    ):
        write_facts(tmp_path, "some/base", "ab12")
        content = json.loads((tmp_path / ADAPTER_FACTS).read_text())
        (tmp_path / ADAPTER_FACTS).write_text(json.dumps({**content, **changes}))
        with pytest.raises(RequestError, match=words):
            read_facts(tmp_path)


def test_an_adapter_asks_for_its_own_base(tmp_path, capsys):
    for seed, name in enumerate(("base", "other")):
        save(random_model(tiny_args(), seed=seed), tmp_path / name, format="native")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert check_base(adapter, tmp_path / "base") == fingerprint(tmp_path / "base")
    assert "is not checked" in capsys.readouterr().err
    write_facts(adapter, tmp_path / "base", fingerprint(tmp_path / "base"))
    check_base(adapter, tmp_path / "base")
    assert capsys.readouterr().err == ""
    with pytest.raises(RequestError, match="expected the base that") as error:
        check_base(adapter, tmp_path / "other")
    assert all(str(tmp_path / name) in str(error.value) for name in ("base", "other", "adapter"))


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A base whose files are older than the clock's tick, a cache of its own, and how often weights
    were hashed.
    """
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    save(random_model(tiny_args()), tmp_path / "base", format="hf", max_shard_size="9KB")
    monkeypatch.setattr("transom.checkpoints.fingerprint._SETTLED", -(10**12))
    calls = []
    made = module.fingerprint_of
    monkeypatch.setattr(
        module, "fingerprint_of", lambda *given: calls.append(given) or made(*given)
    )
    return tmp_path / "base", calls


def test_weights_are_hashed_once_while_their_files_stay(settled):
    base, calls = settled
    first = fingerprint(base)
    assert fingerprint(base) == first and len(calls) == 1
    assert fingerprint(base, fresh=True) == first and len(calls) == 2


@pytest.mark.parametrize(
    "change", ["a shard", "a replaced file", "the config", "a new single file"]
)
def test_another_file_is_hashed_again(settled, change, tmp_path):
    base, calls = settled
    first = fingerprint(base)
    shard = sorted(base.glob("model-*.safetensors"))[0]
    stat = shard.stat()
    if change == "a shard":  # one number, in place, with the times of the content put back
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "a replaced file":
        other = tmp_path / "other"
        save(random_model(tiny_args(), seed=1), other, format="hf", max_shard_size="9KB")
        for path in other.iterdir():
            path.replace(base / path.name)
    elif change == "the config":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rope_theta": 77.0}))
    else:
        save(random_model(tiny_args(), seed=1), tmp_path / "other", format="hf")
        (tmp_path / "other" / "model.safetensors").replace(base / "model.safetensors")
    assert (fingerprint(base) != first) == (change != "the config")
    assert len(calls) == 2


def test_what_was_just_written_is_not_kept(settled, monkeypatch):
    base, calls = settled
    monkeypatch.setattr("transom.checkpoints.fingerprint._SETTLED", 10**12)
    assert fingerprint(base) == fingerprint(base) and len(calls) == 2


def test_a_damaged_cache_is_made_again(settled, tmp_path):
    base, calls = settled
    first = fingerprint(base)
    for path in (tmp_path / "cache" / "fingerprints").iterdir():
        path.write_text("{")
    assert fingerprint(base) == first and len(calls) == 2

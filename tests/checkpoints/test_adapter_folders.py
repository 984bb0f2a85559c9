"""Adapter folders and runs of them: which base and which step they stand for, and what is written
as one model.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.checkpoints.adapters.twins import far, logits_of, twin
from tests.checkpoints.families import random_ids
from tests.helpers import run_python
from transom.base.errors import RequestError
from transom.base.files import sha256_of
from transom.checkpoints.adapters.peft_config import base_of
from transom.checkpoints.convert import convert
from transom.checkpoints.files.checksums import CHECKSUMS
from transom.checkpoints.files.location import find_model, read_pointer
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import load

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def name_base(folder, base):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`base` and `adapter` as PEFT saves them, with the model that both are."""
    root = tmp_path_factory.mktemp("made")
    return root, twin("all linear", root)


@pytest.fixture
def run(made, tmp_path):
    """A run of two steps, the first of them the best, beside the base it names."""
    root, _ = made
    shutil.copytree(root / "base", tmp_path / "base")
    for step in ("step_000002", "step_000004"):
        shutil.copytree(root / "adapter", tmp_path / "run" / step)
        name_base(tmp_path / "run" / step, "../base")  # as seen from the run
    (tmp_path / "run" / "latest").write_text("step_000004\n")
    (tmp_path / "run" / "best").write_text("step_000002\n")
    return tmp_path / "run"


def test_a_run_stands_for_its_best_adapter_and_says_so(run, made, capsys):
    found = find_model(run)
    assert (
        found.adapter == run / "step_000002"
        and found.model.resolve() == (run.parent / "base").resolve()
    )
    assert capsys.readouterr().err == f"transom: {run}: using best step step_000002\n"
    assert far(logits_of(load(run)), made[1](random_ids(2, 12)).logits) < 2e-5
    assert "using best step" not in capsys.readouterr().err  # a notice is printed once
    assert far(logits_of(load(found)), logits_of(load(run))) == 0


def test_a_step_is_read_for_resuming(run):
    assert read_pointer(run, "latest") == run / "step_000004"
    (run / "step_000004" / CONFIG).unlink()
    with pytest.raises(
        RequestError, match="names 'step_000004', which is not a model or adapter folder"
    ):
        read_pointer(run, "latest")


def test_the_tokenizer_of_a_step_comes_before_the_bases(run):
    (run.parent / "base" / "tokenizer.json").touch()
    assert find_model(run).tokenizer.resolve() == run.parent / "base"
    (run / "step_000002" / "tekken.json").touch()
    assert find_model(run).tokenizer == run / "step_000002"


def test_a_base_is_meant_from_here_the_adapter_or_the_run(run, made, monkeypatch, capsys):
    step = run / "step_000002"
    for base, there in (
        ("../base", "the run"),
        ("../../base", "the step"),
        (str(made[0] / "base"), "anywhere"),
    ):
        name_base(step, base)
        expected = made[0] / "base" if there == "anywhere" else run.parent / "base"
        assert find_model(run).model.resolve() == expected.resolve(), there
    monkeypatch.chdir(made[0])
    name_base(step, "base")
    assert find_model(step).model == Path("base")
    capsys.readouterr()
    shutil.copytree(run.parent / "base", run / "base")
    assert base_of(step) == "base"
    said = f"base is taken to be {made[0] / 'base'}, not {run / 'base'}"
    assert said in capsys.readouterr().err


def test_a_base_that_is_an_adapter_is_refused(run, tmp_path):
    shutil.copytree(run / "step_000002", tmp_path / "adapter")
    for base in (run, run / "step_000004", "../adapter"):
        name_base(tmp_path / "adapter", str(base))
        with pytest.raises(
            RequestError, match=r"base_model_name_or_path: got .* which is an adapter"
        ):
            find_model(tmp_path / "adapter")
    with pytest.raises(RequestError, match=r"model: got .*run'; expected no adapter"):
        fingerprint(run)


def test_an_altered_adapter_is_refused(run):
    step = run / "step_000002"
    (step / CHECKSUMS).write_text(json.dumps({WEIGHTS: sha256_of(step / WEIGHTS)}))
    load(run)
    (step / WEIGHTS).write_bytes((run.parent / "base" / "model.safetensors").read_bytes())
    with pytest.raises(RequestError, match=r"adapter_model\.safetensors: altered or cut"):
        load(run)


def test_what_an_adapter_stands_for_is_found_without_torch(run):
    code = (
        "import sys\nfrom transom.cli.main import main\n"
        f"assert main(['inspect', {str(run)!r}]) == 0\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python(code).splitlines()[-1] == "False"


# -- written as one model
# ---------------------------------------------------------------------------------


def beside(folder):
    """Base and adapter of `twin` in a folder, the adapter naming its base."""
    name_base(folder / "adapter", "../base")
    return folder / "adapter"


@pytest.mark.parametrize("name", ["all linear", "fused DoRA", "whole modules", "experts"])
def test_a_converted_adapter_says_what_peft_says(name, tmp_path):
    expected = twin(name, tmp_path)(random_ids(2, 12)).logits
    done = convert(beside(tmp_path), tmp_path / "out", "hf")
    assert (
        str(done.source).endswith(f"+ adapter {tmp_path / 'adapter'}")
        and done.source_format == "hf"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert far(theirs(random_ids(2, 12)).logits, expected) < 2e-5
    assert far(logits_of(load(tmp_path / "out")), expected) < 2e-5


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", "float16"])
def test_the_sum_is_rounded_once(dtype, tmp_path):
    model = twin("all linear", tmp_path)
    leaf = model.base_model.model.model.layers[1].mlp.down_proj
    base = leaf.base_layer.weight.detach().bfloat16()
    exact = base.float() + leaf.get_delta_weight("default").detach()
    convert(tmp_path / "base", tmp_path / "half", "hf", dtype="bfloat16")
    name_base(tmp_path / "adapter", "../half")
    convert(tmp_path / "adapter", tmp_path / "out", "hf", dtype=dtype)
    made = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert made.dtype == getattr(torch, dtype or "bfloat16")
    # The product of B and A is summed in another order there; what is rounded once is off by half a
    # step and that.
    error = (made.double() - exact.double()).abs() / exact.double().abs().clamp_min(0.05)
    assert float(error.max()) < torch.finfo(made.dtype).eps / 2 + 1e-5


def test_neither_of_the_folders_is_written_into(run):
    for folder in (run / "step_000002", run.parent / "base"):
        with pytest.raises(RequestError, match="that is not read"):
            convert(run, folder)


def test_a_dtype_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(RequestError, match="dtype: got 'int8'; expected float32"):
        convert(tmp_path / "nowhere", tmp_path / "out", dtype="int8")


def write(folder, **files):
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_parts_of_two_tokenizers_are_never_mixed(run):
    base, step = run.parent / "base", run / "step_000002"
    write(
        base,
        vocab__json="base",
        merges__txt="base",
        LICENSE="base",
        generation_config__json='{"top_k": 1}',
    )
    write(base, tokenizer_config__json='{"chat_template": "base", "a": 1}', tokenizer__json="base")
    convert(run, run.parent / "plain")
    assert {
        (run.parent / "plain" / name).read_text()
        for name in ("vocab.json", "merges.txt", "LICENSE")
    } == {"base"}
    write(
        step,
        tokenizer__json="step",
        tokenizer_config__json='{"b": 2}',
        generation_config__json='{"top_k": 2}',
    )
    done = convert(run, run.parent / "out")
    out = run.parent / "out"
    assert set(done.companions) == {
        "LICENSE",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / "tokenizer.json").read_text() == "step" and (
        out / "LICENSE"
    ).read_text() == "base"
    assert json.loads((out / "generation_config.json").read_text()) == {"top_k": 2}
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings == {"b": 2, "chat_template": "base"}, (
        "the template that chat takes, beside the tokenizer it takes"
    )
    write(step, chat_template__jinja="step")
    convert(run, run.parent / "last")
    assert (run.parent / "last" / "chat_template.jinja").read_text() == "step"
    assert "chat_template" not in json.loads(
        (run.parent / "last" / "tokenizer_config.json").read_text()
    )

"""Merged folders: the weights PEFT would merge, the candidate that says the same, a report that
says how near.
"""

import json
import warnings
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.checkpoints.adapters.folders import write_adapter, write_base, write_run
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import load
from transom.evaluation.merging import merge_folders
from transom.lora.args import CombineArgs
from transom.lora.merge import merge_adapter
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import dequantize_model
from transom.quantize.methods import quantize_model

NF4 = {"kind": "nf4", "group": 32}
merge = partial(merge_folders, tokens=512)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("merging") / "base")


def weights(folder):
    return load_file(folder / "model.safetensors")


def candidate(report, name):
    return next(one for one in report["candidates"] if one["name"].startswith(name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_those_that_peft_merges_in_float32_cast_once(base, tmp_path, dtype):
    adapter = write_adapter(tmp_path / "adapter", base, targets=("all-linear", "output"))
    report = merge(None, [adapter], tmp_path / "out", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
        )
        expected = theirs.merge_and_unload().state_dict()
    made = weights(tmp_path / "out")
    assert made.keys() == expected.keys()
    for key, tensor in made.items():
        exact = expected[key]
        assert tensor.dtype == getattr(torch, dtype)
        # The order of a float32 sum is not ours to say: a number between two of bfloat16's may fall
        # either way.
        apart = (tensor.float() - exact.to(tensor.dtype).float()).abs() > 1e-6
        assert apart.float().mean() < 1e-3 and torch.allclose(
            tensor.float(), exact, rtol=2**-8, atol=1e-6
        )
    assert report["out"] == {
        "format": "hf",
        "dtype": dtype,
        "fingerprint": fingerprint(tmp_path / "out"),
    }
    assert report["base"]["fingerprint"] == fingerprint(base)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report


def test_a_merge_is_near_and_its_base_is_far(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    alone = {}
    for dtype in ("bfloat16", "float32"):
        report = merge(base, [adapter], tmp_path / dtype, dtype=dtype)
        (only,) = report["candidates"]
        alone[dtype] = only["kl"]
        assert report["why"] == "the only candidate" and report["data"]["tokens"] == 512
        assert report["controls"]["base alone"]["kl"] > 0.05 > 100 * only["kl"]
    assert alone["float32"] < 1e-9 < alone["bfloat16"]


def test_a_base_that_was_quantized_in_training_is_merged_as_the_adapter_saw_it(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, quantize=NF4)
    report = merge(None, [adapter], tmp_path / "out")
    seen, full = (
        candidate(report, name)["kl"]
        for name in ("base as in training (nf4)", "full-precision base")
    )
    assert seen < 1e-3 < full and report["kept"] == "base as in training (nf4)"
    # By hand: the dense weights that four bits stand for, with the adapter in them.
    model = dequantize_model(quantize_model(load(base), QuantizeArgs.from_dict(NF4))).float()
    merge_adapter(load_adapter(model, adapter))
    made = load(tmp_path / "out")
    for name, weight in made.named_parameters():
        assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16)), name


def test_a_base_that_was_rounded_in_training_is_a_candidate_too(tmp_path):
    base = write_base(tmp_path / "base", dtype="float32")
    half = write_adapter(tmp_path / "half", base, dtype="bfloat16")
    report = merge(None, [half], tmp_path / "out")
    assert (
        report["kept"] == "base as in training (bfloat16)" and report["out"]["dtype"] == "float32"
    )
    assert candidate(report, "full")["kl"] > 100 * candidate(report, "base as")["kl"]
    same = write_adapter(tmp_path / "same", base, dtype="float32")
    assert len(merge(None, [same], tmp_path / "other")["candidates"]) == 1


def test_several_adapters_are_weighed_and_each_alone_is_a_control(base, tmp_path):
    one = write_adapter(tmp_path / "one", base, seed=1, targets=("ffn",))
    two = write_adapter(tmp_path / "two", base, seed=2, targets=("wq", "w_out"))
    reports = {}
    for method in ("linear", "ties", "dare"):
        args = CombineArgs(method, (0.7, -0.3))
        reports[method] = merge(base, [one, two], tmp_path / method, args=args, dtype="float32")
        assert [part["weight"] for part in reports[method]["adapters"]] == [0.7, -0.3]
        assert set(reports[method]["controls"]) == {"base alone", f"{one} alone", f"{two} alone"}
        assert reports[method]["candidates"][0]["kl"] < 1e-9
    key = "model.layers.0.mlp.down_proj.weight"  # which both adapters change
    made, plain = {m: weights(tmp_path / m)[key] for m in reports}, weights(base)[key].float()
    deltas = [
        weights(merged)[key].float() - plain
        for adapter in (one, two)
        for merged in [tmp_path / f"{adapter.name} merged"]
        if merge(base, [adapter], merged, dtype="float32")
    ]
    assert torch.allclose(made["linear"] - plain, 0.7 * deltas[0] - 0.3 * deltas[1], atol=1e-6)
    assert not torch.allclose(made["ties"], made["linear"], atol=1e-3)
    assert reports["ties"]["reference"] == "the sum, not rounded"


def test_a_run_stands_for_its_best_step_on_the_base_it_names(base, tmp_path):
    run = write_run(tmp_path / "run", base)
    report = merge(None, [run], tmp_path / "out")
    assert report["adapters"][0]["folder"] == str(run / "step_000010")
    assert report["base"]["folder"] == str(base)


@pytest.mark.parametrize("format", ["native", "mistral"])
def test_other_formats_hold_the_same_model(base, tmp_path, format):
    adapter = write_adapter(tmp_path / "adapter", base)
    marks = [
        merge(base, [adapter], tmp_path / str(kind), format=kind)["out"]["fingerprint"]
        for kind in (format, None)
    ]
    assert marks[0] == marks[1]


def test_what_lies_beside_the_adapter_goes_along(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    merge(base, [adapter], tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [7, 8]
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_rounding_that_eats_a_small_adapter_is_said(base, tmp_path, capsys):
    small = write_adapter(tmp_path / "small", base, size=0.002)
    merge(base, [small], tmp_path / "out")
    assert "a wider dtype keeps more of a small adapter" in capsys.readouterr().err
    merge(base, [small], tmp_path / "wide", dtype="float32")
    assert "a wider dtype" not in capsys.readouterr().err


def test_labels_are_compared_and_vectors_are_not(tmp_path, capsys):
    for kind in ("classification", "embedding"):
        base = write_base(tmp_path / kind, "native", head={"kind": kind})
        adapter = write_adapter(tmp_path / f"{kind} adapter", base)
        report = merge(base, [adapter], tmp_path / f"{kind} out")
        assert ("kl" in report["candidates"][0]) == (kind == "classification")
    assert "the merge is not measured" in capsys.readouterr().err


def test_an_adapter_without_numbers_fails_and_leaves_nothing(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    state = load_file(adapter / "adapter_model.safetensors")
    next(iter(state.values())).fill_(float("nan"))
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(WorkError, match="NaN or infinite; nothing was written"):
        merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_requests_are_one_sentence_and_leave_nothing(base, tmp_path):
    other = write_base(tmp_path / "other", seed=5)
    mine, foreign = (
        write_adapter(tmp_path / "mine", base),
        write_adapter(tmp_path / "foreign", other),
    )
    four = write_adapter(tmp_path / "four", base, quantize=NF4)
    odd = write_adapter(tmp_path / "odd", base)
    facts = json.loads((odd / "transom.json").read_text())
    (odd / "transom.json").write_text(json.dumps({**facts, "dtype": "int8"}))
    out = tmp_path / "out"
    for act, words in (
        (lambda: merge(other, [mine], out), "base: got"),
        (lambda: merge(None, [mine, foreign], out), "adapters"),
        (lambda: merge(base, [mine, four], out), "nf4"),
        (lambda: merge(base, [odd], out), "dtype: got 'int8'"),
        (lambda: merge(None, [base], out), "adapter: got"),
        (lambda: merge(base, [base], out), "adapter: got"),
        (lambda: merge(mine, [mine], out), "base: got"),
        (lambda: merge(base, [mine], base), "out: got"),
        (lambda: merge(base, [mine], out, dtype="int8"), "dtype: got 'int8'"),
        (lambda: merge(base, [mine], out, data=str(tmp_path / "none.txt")), "none.txt"),
        (
            lambda: merge(base, [mine], out, args=CombineArgs(weights=(1.0, 2.0))),
            "weights: got",
        ),
    ):
        with pytest.raises(RequestError, match=words) as error:
            act()
        assert "\n" not in str(error.value) and not out.exists()

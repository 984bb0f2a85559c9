"""Exported programs run without Transom, and avoid what programs with static caches are known for.

The pains are those of reports about `torch.export` with the caches of transformers: sizes of the
example that become constants (pytorch #133653, #151582), caches that programs can't take or change
unseen (#152465, #155862), windows that grow (transformers #47900), and weights inside of every
program (pytorch #167623).
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.cli.test_generate_cli import write_model
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.convert import convert
from transom.checkpoints.exported import export_programs
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model
from transom.verify.checks import run

# Greedy decoding as in docs/guide/checkpoints.md.
CONSUMER = """
import json, sys
import torch
from safetensors.torch import load_file

folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
signature = json.load(open(f"{folder}/export.json"))
weights = load_file(f"{folder}/model.safetensors")
weights = {name: weights[name] for name in signature["weights"]}
cache = {
    name: torch.full(one["shape"], one["fill"], dtype=getattr(torch, one["dtype"]))
    for name, one in signature["cache"].items()
}
prefill = torch.export.load(f"{folder}/prefill.pt2").module()
decode = torch.export.load(f"{folder}/decode.pt2").module()
with torch.inference_mode():
    logits, cache = prefill(weights, torch.tensor(prompt), torch.tensor([len(prompt[0])]), cache)
    ids = [int(logits.argmax(-1))]
    while len(ids) < count:
        logits, cache = decode(weights, torch.tensor([ids[-1:]]), torch.tensor([1]), cache)
        ids.append(int(logits.argmax(-1)))
assert not any(name.startswith("transom") for name in sys.modules)
print(ids)
"""


@pytest.mark.slow
def test_a_process_without_transom_generates_the_same_tokens(tmp_path):
    model = write_model(tmp_path / "model", sliding_window=8, layer_pattern="SF")
    words = ("--format", "exported", "--context", "40")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), *words]) == 0
    prompt = random_tokens(1, 11).tolist()
    given = (str(tmp_path / "out"), json.dumps(prompt), "15")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", CONSUMER, *given],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == generate(model, prompt, 15)[0, 11:].tolist()


@pytest.fixture(scope="module")
def made():
    model = random_model(tiny_args(sliding_window=8, layer_pattern="SF", vocab_size=61))
    return model, export_programs(model, context=24, batch=1)


@torch.no_grad()
def test_sizes_of_the_example_are_no_constants_and_inputs_stay_as_they_are(made):
    model, programs = made
    prefill = programs.prefill.module()
    before = {name: x.clone() for name, x in programs.cache.items()}
    for count in (2, 5, 9, 24):  # 9 is longer than a window
        cache = model.make_cache(1, 24, slack=0)
        tokens, lengths = random_tokens(1, count), torch.tensor([count])
        logits, after = prefill(programs.weights, tokens, lengths, programs.cache)
        expected = model(TransformerInput(tokens, logits="last"), cache).logits[:, 0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(x, before[name]) for name, x in programs.cache.items())
        assert {n: x.shape for n, x in after.items()} == {n: x.shape for n, x in before.items()}
    windows = programs.cache["positions.0"], programs.cache["states.0.0"]
    assert [x.size(1) for x in windows] == [9, 9]  # a slot for padding beside the window


def test_programs_have_neither_weights_nor_paths(made, tmp_path):
    _, programs = made
    programs.write(tmp_path)
    for name in ("prefill.pt2", "decode.pt2"):
        content = (tmp_path / name).read_bytes()
        assert programs.weights["layers.0.attention.wq.weight"].numpy().tobytes() not in content
        assert b"site-packages" not in content and b"transom" not in content


@pytest.mark.slow
def test_verify_compares_every_sample_and_a_folder(tmp_path):
    write_model(tmp_path, moe_args={"num_experts": 4, "top_k": 2, "hidden_dim": 48})
    for options in ({}, {"model": str(tmp_path)}):
        findings = list(run("export", **options))
        assert findings and all(one.ok for one in findings), findings


def test_quantized_models_are_exported_dense(tmp_path):
    args = tiny_args(dim=64, hidden_dim=64, n_layers=1)
    model = quantize_model(random_model(args), QuantizeArgs("int8", 32))
    with pytest.raises(RequestError, match=r"weight: got 'codes'; expected dense weights"):
        export_programs(model)
    save(model, tmp_path / "model", format="hf")
    done = convert(tmp_path / "model", tmp_path / "out", "exported", context=8)
    assert done.bytes == 4 * done.parameters


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"layer_pattern": "FB"}, "got pattern B, which attends to later tokens"),
        ({"context_dim": 8}, "got attention to a context"),
        ({"head": {"kind": "embedding"}}, "got a head; expected a language model"),
    ],
)
def test_models_without_a_program_are_refused(fields, told):
    with pytest.raises(RequestError, match=told):
        export_programs(random_model(tiny_args(**fields)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--format", "exported", "--context", "2"), "context: got 2; expected 3 to max_seq_len"),
        (("--format", "exported", "--context", "999"), "context: got 999"),
        (("--format", "exported", "--batch", "0"), "batch: got 0"),
        (("--format", "exported", "--dtype", "q8_0"), "dtype: got 'q8_0'"),
        (("--format", "exported", "--max-shard-size", "5MB"), "max_shard_size: got '5MB'"),
        (("--context", "16"), "context: got 16; expected none"),
        (("--batch", "2"), "batch: got 2; expected none"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_writes_nothing(tmp_path, words, told, capsys):
    write_model(tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    monkeypatch.setattr("transom.checkpoints.convert.export_programs", lambda *_: made[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transom.checkpoints.exported.write_tensors", full)
    with pytest.raises(WorkError, match="could not be written"):
        convert(tmp_path / "model", tmp_path / "out", "exported", context=8)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1

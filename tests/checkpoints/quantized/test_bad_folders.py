"""Quantized folders with something wrong: one sentence that names it, and no model."""

import json
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints.quantized import folders
from tests.checkpoints.quantized.test_reading import AWQ, BITSANDBYTES
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.convert import convert
from transom.checkpoints.load import load
from transom.cli.main import main
from transom.quantize.leaves import quantized_leaves

MODULE = "model.layers.0.self_attn.q_proj."
CONFIGS = {
    "method": ({"quant_method": "aqlm"}, "quant_method: got 'aqlm'; expected gptq, awq, bitsandb"),
    "no method": ({"bits": 4}, "quant_method: got None"),
    "not a mapping": (4, "expected a mapping"),
    "bits": (folders.config_of(bits=3), "bits: got 3; expected 4 or 8"),
    "group": (folders.config_of(group=0), "group_size: got 0; expected -1 or a number"),
    "group as text": (folders.config_of(group="x"), "group_size: got 'x'"),
    "no group": ({"quant_method": "gptq", "bits": 4}, "group_size: missing"),
    "marlin": (folders.config_of(checkpoint_format="marlin"), "checkpoint_format: got 'marlin'"),
    "pack_dtype": (folders.config_of(pack_dtype="int16"), "pack_dtype: got 'int16'"),
    "rotation": (folders.config_of(rotation="hadamard"), "rotation: got 'hadamard'; expected none"),
    "dynamic": (folders.config_of(dynamic={"(": {}}), "expected a regular expression"),
    "dynamic bits": (folders.config_of(dynamic={"x": {"bits": 2}}), "dynamic: x: bits: got 2"),
    "awq gemv": ({**AWQ, "version": "gemv"}, "version: got 'gemv'; expected gemm"),
    "awq of GPTQModel": ({**AWQ, "format": "gemv_fast"}, "format: got 'gemv_fast'; expected gemm"),
    "8 bits": ({**BITSANDBYTES, "load_in_8bit": True}, "load_in_8bit: got True"),
    "fp8 block": ({**folders.FP8, "weight_block_size": [128]}, "weight_block_size: got .128."),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    made = {}
    for name, config, pack in (
        ("gptq", folders.config_of(), folders.gptq),
        ("bitsandbytes", BITSANDBYTES, folders.bitsandbytes),
        ("fp8", folders.FP8, folders.float8),
    ):
        folder = made[name] = tmp_path_factory.mktemp(name)
        folders.write(folder, config, pack)
    return made


def changed(source, out, config=None, tensors=()):
    """Copy a folder with other tensors of a module; None removes one."""
    document = json.loads((source / "config.json").read_text())
    if config is not None:
        document["quantization_config"] = config
    (out / "config.json").write_text(json.dumps(document))
    stored = load_file(source / "model.safetensors")
    for name, change in dict(tensors).items():
        stored[MODULE + name] = change(stored[MODULE + name]) if change else None
    kept = {key: tensor for key, tensor in stored.items() if tensor is not None}
    save_file(kept, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_says_something_else_is_refused(case, good, tmp_path):
    config, message = CONFIGS[case]
    changed(good["gptq"], tmp_path, config)
    with pytest.raises(RequestError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def spoiled(value, tensor):
    out = tensor.clone()
    out.flatten()[0] = value
    return out


TENSORS = {
    "NaN scale": ("gptq", {"scales": partial(spoiled, float("nan"))}, "scales: got NaN"),
    "infinite scale": (
        "gptq",
        {"scales": partial(spoiled, float("inf"))},
        "scales: got NaN or inf",
    ),
    "scales missing": ("gptq", {"scales": None}, "expected scales, too"),
    "g_idx missing": ("gptq", {"g_idx": None}, "expected g_idx, too"),
    "group out of range": ("gptq", {"g_idx": partial(spoiled, 7)}, "g_idx: got 7; expected groups"),
    "negative group": ("gptq", {"g_idx": partial(spoiled, -1)}, "g_idx: got -1; expected groups"),
    "group of another size": ("gptq", {"g_idx": partial(spoiled, 1)}, "groups of different sizes"),
    "shape of scales": ("gptq", {"scales": lambda x: x[:1].clone()}, "scales: shape: got"),
    "shape of zeros": ("gptq", {"qzeros": lambda x: x[:, 1:].clone()}, "qzeros: shape: got"),
    "dtype of codes": ("gptq", {"qweight": lambda x: x.long()}, "qweight: dtype: got torch.int64"),
    "codes without a shape": ("gptq", {"qweight": lambda x: x[0].clone()}, "expected two dim"),
    "negative absmax": (
        "bitsandbytes",
        {"weight.absmax": partial(spoiled, -1)},
        "absmax: got -1.0; expected finite, positive",
    ),
    "absmax missing": ("bitsandbytes", {"weight.absmax": None}, "expected absmax, too"),
    "codes missing": ("bitsandbytes", {"weight": lambda x: x[1:].clone()}, "numbers of weight"),
    "state": (
        "bitsandbytes",
        {"weight.quant_state.bitsandbytes__nf4": lambda x: x[1:].clone()},
        "not the state of a weight",
    ),
    "negative scale": ("fp8", {"weight_scale_inv": lambda x: -x}, "NaN or negative"),
    "a code that is NaN": ("fp8", {"weight": partial(spoiled, float("nan"))}, "weight: got nan"),
    "scales of other blocks": ("fp8", {"weight_scale_inv": lambda x: x[:1].clone()}, "shape: got"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(case, good, tmp_path):
    method, tensors, message = TENSORS[case]
    changed(good[method], tmp_path, tensors=tensors)
    with pytest.raises(RequestError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "q_proj" in str(caught.value)


def test_a_group_that_does_not_divide_is_refused(good, tmp_path):
    changed(good["gptq"], tmp_path, folders.config_of(group=24))
    with pytest.raises(RequestError, match="group_size: got 24; expected a divisor of the 64 inp"):
        load(tmp_path)


def test_a_truncated_file_is_refused(good, tmp_path, capsys):
    changed(good["gptq"], tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "not a complete safetensors file" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_folder(good, tmp_path, monkeypatch):
    old = tmp_path / "old"
    convert(good["gptq"], old, keep_quantized=True)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    written = []

    def full(file, tensor):
        written.append(tensor)
        if len(written) > 20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("transom.checkpoints.files.safetensors_files._write_tensor", full)
    with pytest.raises(WorkError, match="No space left on device"):
        convert(good["bitsandbytes"], old, keep_quantized=True)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert len(quantized_leaves(load(old))) == 14

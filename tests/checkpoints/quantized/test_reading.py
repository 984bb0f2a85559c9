"""Quantized folders of other programs, against weights that are unpacked one number at a time."""

from functools import partial

import pytest
import torch

from tests.checkpoints.quantized import folders
from tests.helpers import random_tokens
from transom.base.errors import RequestError
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.layers.inputs import TransformerInput
from transom.quantize.leaves import dequantize_model, quantized_leaves

GPTQ = {
    "v1": {},
    "v2": {"version": 2},
    "symmetric": {"symmetric": True},
    "act-order": {"shuffled": True},
    "act-order in 8 bits": {"bits": 8, "shuffled": True},
    "8 bits per output": {"bits": 8, "group": -1, "symmetric": True},
    "8 bits": {"bits": 8, "version": 2},
}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
AWQ_OF_GPTQMODEL = AWQ | {
    "method": "awq", "checkpoint_format": "gemm", "format": "gemm", "pack_dtype": "int32",
    "desc_act": False, "zero_point": False, "lm_head": False, "dynamic": {"-:lm_head": {}}, "meta": {},
}  # fmt: skip
CASES = {
    **{name: (folders.config_of(**k), partial(folders.gptq, **k)) for name, k in GPTQ.items()},
    "awq": (AWQ, folders.awq),
    "awq of GPTQModel": (AWQ_OF_GPTQMODEL, folders.awq),
    "nf4": (BITSANDBYTES, folders.bitsandbytes),
    "nf4, blocks longer than rows": (BITSANDBYTES, partial(folders.bitsandbytes, block=48)),
    "nf4 with double quantization": (BITSANDBYTES, partial(folders.bitsandbytes, nested=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_codes_stand_for_the_weights_of_other_programs(case, tmp_path, capsys):
    config, pack = CASES[case]
    expected = folders.write(tmp_path, config, pack)
    found, kept = folders.dense_weights(tmp_path, dtype="float32")
    assert len(quantized_leaves(kept)) == len(expected) == 14
    assert "keys not read" not in capsys.readouterr().err
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
    dense, _ = folders.dense_weights(tmp_path, dtype="float32", keep_quantized=False)
    assert all(torch.equal(dense[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize("case", ["act-order", "awq", "nf4 with double quantization"])
@pytest.mark.parametrize("rows", [1, 100])  # products in C++, and of PyTorch
def test_products_are_those_of_the_weights(case, rows, tmp_path):
    folders.write(tmp_path, *CASES[case])
    model = load(tmp_path, dtype="float32")
    tokens = TransformerInput(random_tokens(1, rows))
    found = model(tokens, inference=True).logits
    expected = dequantize_model(model)(tokens, inference=True).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", ["act-order", "act-order in 8 bits", "v1", "nf4"])
def test_what_was_read_is_written_as_it_was(case, tmp_path):
    config, pack = CASES[case]
    folders.write(tmp_path / "theirs", config, pack)
    save(load(tmp_path / "theirs"), tmp_path / "ours", "hf")
    assert fingerprint(tmp_path / "ours") == fingerprint(tmp_path / "theirs")


def test_modules_have_sizes_of_their_own(tmp_path):
    def pack(shape, index):
        return folders.gptq(shape, index, *((8, 8) if shape == (32, 64) else (4, 16)))

    changes = {r"+:.*\.down_proj": {"bits": 8, "group_size": 8}, "-:lm_head": {}}
    expected = folders.write(tmp_path, folders.config_of(dynamic=changes), pack)
    found, _ = folders.dense_weights(tmp_path, dtype="float32")
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_floats_of_8_bits_are_dequantized(tmp_path, capsys):
    expected = folders.write(tmp_path, folders.FP8, folders.float8)
    found, model = folders.dense_weights(tmp_path)
    assert model.dtype == torch.float16
    assert "fp8" in capsys.readouterr().err
    for key, weight in expected.items():
        assert torch.equal(found[key], weight.half()), key
    with pytest.raises(RequestError, match="keep_quantized: got True; expected a quantized"):
        load(tmp_path, keep_quantized=True)


def test_floats_of_8_bits_of_vllm_are_read_and_scales_of_caches_are_not(tmp_path, capsys):
    def pack(shape, index):
        codes = torch.randn(shape).to(torch.float8_e4m3fn)
        scales = {"weight_scale": torch.tensor(0.25), "input_scale": torch.tensor(2.0)}
        scales |= {"k_scale": torch.tensor(3.0)} if index == 1 else {}
        return {"weight": codes, **scales}, codes.float() / 4

    expected = folders.write(tmp_path, {"quant_method": "fp8", "activation_scheme": "static"}, pack)
    found, _ = folders.dense_weights(tmp_path)
    assert all(torch.equal(found[key], weight.half()) for key, weight in expected.items())
    assert capsys.readouterr().err.count("15 tensors left unread: scales of inputs") == 1


@pytest.mark.parametrize("value", [0, 1])
def test_biases_that_a_model_does_not_have_are_zeros(value, tmp_path, capsys):
    def pack(shape, index):
        tensors, weight = folders.gptq(shape, index)
        return tensors | {"bias": torch.full(shape[:1], value, dtype=torch.half)}, weight

    folders.write(tmp_path, folders.config_of(), pack)
    if value:
        with pytest.raises(RequestError, match=r"left over .*bias"):
            load(tmp_path)
    else:
        load(tmp_path)
        assert "14 tensors left unread: biases of zeros" in capsys.readouterr().err

"""A model in codes is written to a folder and comes back with the same codes."""

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import quantize_model

MOE = {"moe_args": {"num_experts": 3, "top_k": 2}, "hidden_dim": 64}
CASES = {
    "int4": {"kind": "int4", "group": 32},
    "int4 with zero points": {"kind": "int4", "group": 32, "zero_points": True},
    "int4 per output": {"kind": "int4", "group": 0, "zero_points": True},
    "int8": {"kind": "int8", "group": 32},
    "int8 with zero points": {"kind": "int8", "group": 0, "zero_points": True},
    "int4 of 64": {"kind": "int4", "group": 64},
    "nf4": {"kind": "nf4", "group": 32},
    "fp8": {"kind": "fp8", "group": 0},
    "fp8 of 32": {"kind": "fp8", "group": 32},
    "nf4 with scales in 8 bits": {"kind": "nf4", "group": 32, "double_quant": True},
}


def quantized(case, dtype=torch.float32, **fields):
    model = random_model(tiny_args(dim=64, hidden_dim=128, rope_layout="halves", **fields))
    return quantize_model(model.to(dtype), QuantizeArgs(skip=(), **CASES[case]))


@pytest.mark.parametrize("format", ["hf", "native"])
@pytest.mark.parametrize("case", CASES)
def test_codes_survive_a_folder(case, format, tmp_path):
    model = quantized(case)
    save(model, tmp_path, format)
    again, leaves = load(tmp_path), quantized_leaves(model)
    assert quantized_leaves(again).keys() == leaves.keys()
    for path, leaf in quantized_leaves(again).items():
        assert torch.equal(leaf.parts["codes"], leaves[path].parts["codes"]), path
        assert torch.equal(leaf.weight, leaves[path].weight), path
    for name, weight in again.named_parameters():
        if not name.startswith(tuple(leaves)):
            assert torch.equal(weight, model.get_parameter(name)), name


def test_floats_of_8_bits_are_dense_in_gguf_files(tmp_path):
    model = quantized("fp8")
    save(model, tmp_path / "model.gguf", "gguf")
    again = load(tmp_path / "model.gguf")
    for path, leaf in quantized_leaves(model).items():
        if not path.endswith(("wq", "wk")):  # their rows have another order
            assert torch.equal(again.get_submodule(path).weight, leaf.weight), path


def test_experts_are_packed_one_by_one(tmp_path):
    model = quantized("int4", **{k: v for k, v in MOE.items() if k != "hidden_dim"})
    save(model, tmp_path, "hf")
    for path, leaf in quantized_leaves(load(tmp_path)).items():
        assert torch.equal(leaf.weight, model.get_submodule(path).weight), path

"""Codes on their way between quantized folders, dense folders and GGUF files."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AwqConfig

from tests.checkpoints.quantized import folders
from tests.checkpoints.quantized.test_round_trip import quantized
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.base.files import read_json
from transom.checkpoints.convert import convert
from transom.checkpoints.files.location import find_model
from transom.checkpoints.gguf.weights import quantized_types
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import dequantize_model, quantized_leaves
from transom.quantize.methods import quantize_model

HALF = torch.float16
TYPES = {
    "int4": ("Q4_0", True),
    "int4 with zero points": ("Q4_1", False),
    "int8": ("Q8_0", True),
    "int4 of 64": ("Q4_0", True),
}


@pytest.mark.parametrize("format", ["hf", "native", "meta", "mistral"])
def test_a_dense_folder_has_the_weights_of_the_codes(format, tmp_path):
    model = quantized("int4 with zero points")
    save(model, tmp_path / "codes", "hf")
    convert(tmp_path / "codes", tmp_path / "dense", format)
    dense, expected = load(tmp_path / "dense"), dequantize_model(load(tmp_path / "codes"))
    assert not quantized_leaves(dense)
    if format in ("meta", "mistral"):  # other rotary rows
        save(expected, tmp_path / "again", format)
        expected = load(tmp_path / "again")
    for name, weight in expected.named_parameters():
        assert torch.equal(weight, dense.get_parameter(name)), name


@pytest.mark.parametrize("case", TYPES)
def test_codes_that_ggml_has_are_copied_into_gguf_files(case, tmp_path, capsys):
    kind, exact = TYPES[case]
    model = quantized(case, dtype=HALF)
    save(model, tmp_path / "codes", "hf")
    convert(tmp_path / "codes", tmp_path / "x.gguf")
    assert ("half precision" in capsys.readouterr().err) is not exact
    assert kind in quantized_types(find_model(tmp_path / "x.gguf").model)
    again = load(tmp_path / "x.gguf", dtype="float32", keep_quantized=True)
    expected = load(tmp_path / "codes", dtype="float32")
    save(expected, tmp_path / "halves")  # GGUF files of Llama have interleaved rotary rows
    convert(tmp_path / "x.gguf", tmp_path / "hf")
    dense, wanted = load(tmp_path / "hf"), dequantize_model(expected)
    assert len(quantized_leaves(again)) >= 14
    for name, weight in wanted.named_parameters():
        tolerance = 0 if exact else 2e-3 * float(weight.detach().abs().max())
        assert torch.allclose(dense.get_parameter(name), weight, rtol=0, atol=tolerance), name


def test_codes_that_ggml_does_not_have_are_dequantized(tmp_path, capsys):
    save(quantized("nf4"), tmp_path / "codes", "hf")
    convert(tmp_path / "codes", tmp_path / "x.gguf", dtype="q8_0")
    assert "weights dequantized: the file has no such codes" in capsys.readouterr().err
    load(tmp_path / "x.gguf")


def test_a_gguf_file_becomes_a_folder_of_gptq(tmp_path):
    model = random_model(tiny_args(hidden_dim=64, tie_embeddings=True))
    save(model, tmp_path / "x.gguf", "gguf", dtype="q4_0")
    convert(tmp_path / "x.gguf", tmp_path / "codes", keep_quantized=True)
    stored = load_file(tmp_path / "codes" / "model.safetensors")
    assert stored["model.embed_tokens.qweight"].shape == (8, 61)  # Q8_0, 4 codes in a word
    folder = load(tmp_path / "codes", dtype="float32")
    convert(tmp_path / "x.gguf", tmp_path / "dense")
    expected = load(tmp_path / "dense")
    assert len(quantized_leaves(folder)) == 15
    for name, weight in dequantize_model(folder).named_parameters():
        assert torch.equal(weight, expected.get_parameter(name)), name


def int4(folder, **how):
    """A folder whose layers are int4 in groups; `how` are other settings."""
    fields = {"dim": 64, "hidden_dim": 128, "vocab_size": 64, **how.pop("fields", {})}
    model = random_model(tiny_args(rope_layout="halves", **fields)).half()
    settings = {"kind": "int4", "group": 32, "skip": ("tok_embeddings", "output"), **how}
    save(quantize_model(model, QuantizeArgs(**settings)), folder, "hf")


@pytest.mark.parametrize("fields", [{}, {"moe_args": {"num_experts": 3, "top_k": 2}}])
@pytest.mark.parametrize("zero_points", [True, False])
def test_int4_in_groups_becomes_a_folder_of_awq(zero_points, fields, tmp_path):
    int4(tmp_path / "gptq", zero_points=zero_points, fields=fields)
    convert(tmp_path / "gptq", tmp_path / "awq", "awq")
    stated = read_json(tmp_path / "awq" / "config.json")["quantization_config"]
    dense = set(stated.pop("modules_to_not_convert"))
    assert "lm_head" in dense and (fields == {}) == (len(dense) == 1)
    assert stated == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True
    }  # fmt: skip
    assert AwqConfig.from_dict(stated).format == "gemm"
    before, after = load(tmp_path / "gptq"), load(tmp_path / "awq")
    again, leaves = quantized_leaves(after), quantized_leaves(before)
    assert again.keys() == leaves.keys()
    for path, leaf in again.items():
        assert leaf.parts.keys() == leaves[path].parts.keys()
        for name, part in leaf.parts.items():
            assert torch.equal(part, leaves[path].parts[name]), f"{path}.{name}"
    leaf = leaves["layers.0.attention.wv"]
    stored = load_file(tmp_path / "awq" / "model.safetensors")
    values = (leaf.weight.float() / leaf.parts["scales"].float().repeat_interleave(32, 1)).round()
    zeros = leaf.parts["zeros"] if zero_points else torch.zeros(32, 2, dtype=torch.int8)
    codes = values + zeros.repeat_interleave(32, 1) + 8
    for name, numbers in (("qweight", codes), ("qzeros", zeros + 8)):
        packed = folders.words(numbers.int(), 4, (0, 2, 4, 6, 1, 3, 5, 7)).T
        assert torch.equal(stored[f"model.layers.0.self_attn.v_proj.{name}"], packed), name


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"kind": "int8"}, "q_proj.weight is not int4 in groups"),
        ({"group": 0}, "groups have 64 and 128 inputs"),
        ({"kind": "nf4"}, "q_proj.weight is not int4 in groups"),
        ({"skip": ()}, "lm_head.weight is not int4 in groups, or not in a layer"),
        ({"fields": {"n_heads": 8, "n_kv_heads": 1, "head_dim": 4}}, "k_proj.weight is not int4"),
    ],
)
def test_awq_has_no_other_codes(how, reason, tmp_path):
    int4(tmp_path / "codes", **how)
    with pytest.raises(RequestError, match=f"format: got 'awq'; expected hf, as .*{reason}"):
        convert(tmp_path / "codes", tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_only_codes_can_be_kept(tmp_path):
    save(random_model(tiny_args()), tmp_path / "dense")
    save(quantized("int4"), tmp_path / "codes")
    for source, format in (("dense", "hf"), ("codes", "meta")):
        with pytest.raises(RequestError, match="keep_quantized: got True; expected a quantized"):
            convert(tmp_path / source, tmp_path / "out", format, keep_quantized=True)
    with pytest.raises(RequestError, match="format: got 'awq'; expected hf, as SRC has no codes"):
        convert(tmp_path / "dense", tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_codes_of_two_methods_are_those_of_the_larger_part(tmp_path, capsys):
    model, other = quantized("int4"), quantized("nf4")
    model.layers[0].attention.wq = other.layers[0].attention.wq
    save(model, tmp_path, "hf")
    assert "1 weight dequantized: the codes don't fit gptq" in capsys.readouterr().err
    again = load(tmp_path)
    assert len(quantized_leaves(again)) == 14
    weight = model.layers[0].attention.wq.weight
    assert torch.equal(again.layers[0].attention.wq.weight, weight)

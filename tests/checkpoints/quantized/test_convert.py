"""Codes on their way between quantized folders, dense folders and GGUF files."""

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.quantized.test_round_trip import quantized
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.convert import convert
from transom.checkpoints.files.location import find_model
from transom.checkpoints.gguf.weights import quantized_types
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.quantize.leaves import dequantize_model, quantized_leaves

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


def test_only_codes_can_be_kept(tmp_path):
    save(random_model(tiny_args()), tmp_path / "dense")
    save(quantized("int4"), tmp_path / "codes")
    for source, format in (("dense", "hf"), ("codes", "meta")):
        with pytest.raises(RequestError, match="keep_quantized: got True; expected a quantized"):
            convert(tmp_path / source, tmp_path / "out", format, keep_quantized=True)
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

"""Numbers of every tensor type, and the dtype in which a file opens."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.checkpoints.families import tiny_hf
from tests.checkpoints.gguf.files import packed, write_gguf
from transom.base.errors import collected_notices
from transom.base.runtime import pick_device, pick_dtype
from transom.checkpoints.files.location import find_model
from transom.checkpoints.gguf import reader
from transom.checkpoints.gguf.weights import open_gguf
from transom.checkpoints.load import load
from transom.quantize import ggml

KINDS = [Type[name] for name in (*ggml.DENSE, *ggml.TYPES)]


def test_the_table_of_types_is_that_of_the_package():
    table = {Type[name]: sizes for name, (_, *sizes) in reader._TYPES.items()}
    assert table == {kind: list(gguf.GGML_QUANT_SIZES[kind]) for kind in KINDS}
    assert {code: Type(code).name for code in reader._NAMES} == reader._NAMES


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_numbers_are_those_of_ggml_bit_for_bit(kind, tmp_path):
    wide = np.random.default_rng(0).standard_normal((9, 2, 512), np.float32)
    stored = packed(wide, kind)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = open_gguf(find_model(tmp_path / "one.gguf").model)["token_embd.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(stored, kind).astype(np.float32))
    assert read.shape == wide.shape and read.dtype == ggml.DENSE.get(kind.name, torch.float32)
    assert torch.equal(read.read().float(), expected)


@pytest.mark.parametrize("exact", [True, False])
def test_norms_have_the_precision_of_the_file_if_that_loses_nothing(exact, tmp_path):
    model = tiny_hf("llama-tied")
    model.to(torch.bfloat16) if exact else None
    file = write_gguf(model, tmp_path / "tiny.gguf", tmp_path / "hf", kind=Type.BF16)
    assert load(file).norm.weight.dtype == (torch.bfloat16 if exact else torch.float32)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_quantized_file_is_rounded_to_the_dtype_of_the_device_or_to_the_one_given(
    dtype, tmp_path
):
    file = write_gguf(tiny_hf("mixtral", sliding_window=None), tmp_path / "tiny.gguf", tmp_path / "hf", kind=Type.Q8_0)  # fmt: skip
    with collected_notices() as notices:
        model = load(file, dtype=dtype)
    expected = torch.float32 if dtype else pick_dtype("auto", pick_device("cpu"))
    wide = open_gguf(find_model(file).model)["blk.1.ffn_gate_exps.weight"].read()
    assert torch.equal(model.layers[1].feed_forward.experts.w_gate.weight, wide.to(expected))
    size = sum(one.numel() for one in model.parameters()) * expected.itemsize
    assert any("Q8_0 (" in one and f"{size / 1e6:,.1f} MB" in one for one in notices)

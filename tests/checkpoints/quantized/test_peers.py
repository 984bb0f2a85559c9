"""Quantized folders in transformers with bitsandbytes and GPTQModel, on machines that have them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.quantized import folders
from tests.checkpoints.quantized.test_round_trip import quantized
from tests.helpers import random_tokens
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.layers.inputs import TransformerInput
from transom.quantize.leaves import quantized_leaves

# Rows are whole blocks: dequantization of bitsandbytes 0.50 on the CPU is wrong where they are not.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def opened(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_opens_ours_and_we_open_theirs(kind, double, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_hf("llama-tied", **SIZES).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    float32 = {"dtype": torch.float32}
    theirs = opened(tmp_path / "dense", quantization_config=config, **float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, ids = load(tmp_path / "theirs"), random_ids(2, 40)
    assert len(quantized_leaves(ours)) == 14
    save(ours, tmp_path / "ours", "hf")
    found, expected = ours(TransformerInput(ids)).logits, theirs(ids).logits
    assert torch.allclose(found, expected, atol=3e-5, rtol=0)
    again = opened(tmp_path / "ours", **float32)(ids).logits
    assert torch.allclose(again, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("case", ["fp8", "fp8 of 32"])
def test_transformers_opens_floats_of_8_bits(case, tmp_path):
    model = quantized(case, vocab_size=64)
    save(model, tmp_path, "hf")
    ids = random_tokens(2, 40)
    theirs = opened(tmp_path, dtype=torch.float32)(ids).logits
    assert torch.allclose(theirs, model(TransformerInput(ids)).logits, atol=3e-5, rtol=0)


@pytest.mark.parametrize("case", ["int8", "int8 with zero points"])
def test_gptqmodel_has_the_same_weights(case, tmp_path):
    pytest.importorskip("gptqmodel")
    model = quantized(case, dtype=torch.float16, vocab_size=64)
    save(model, tmp_path, "hf")
    theirs = opened(tmp_path, dtype=torch.float16).model.layers[0]
    for letter in "qkvo":
        leaf = getattr(model.layers[0].attention, f"w{letter}")
        found = getattr(theirs.self_attn, f"{letter}_proj").dequantize_weight().T
        assert torch.equal(found, leaf.dequantize()), letter


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_unpacks_what_is_packed_by_hand_as_we_do(bits, version):
    """The twin of the other tests is right, with inputs in another order, too."""
    kinds = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    packing = pytest.importorskip("gptqmodel.utils.model")
    sizes = {"in_features": 128, "out_features": 64, "group_size": 32, "bits": bits}
    layer = kinds.TorchLinear(sym=False, desc_act=True, register_buffers=True, **sizes)
    tensors, weight = folders.gptq((64, 128), 3, bits, 32, version, shuffled=True)
    for name, tensor in tensors.items():
        getattr(layer, name).data = tensor.clone()
    if version == 1:
        packing.convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.post_init()
    assert torch.equal(layer.dequantize_weight().T, weight.half())

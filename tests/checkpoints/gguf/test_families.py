"""Every architecture of GGUF files against the transformers model with the same weights."""

import pytest
import torch

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from transom.checkpoints.load import load
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

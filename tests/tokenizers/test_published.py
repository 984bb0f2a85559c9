"""The vocabularies that Mistral publishes with its own library, where it is installed."""

import importlib.util
from pathlib import Path

import pytest
import sentencepiece

from tests.tokenizers.makers import CORPUS, NASTY, streamed
from transom.tokenizers.tokenizer import Tokenizer

FOUND = importlib.util.find_spec("mistral_common")
DATA = (
    Path(FOUND.submodule_search_locations[0], "data")
    if FOUND and FOUND.submodule_search_locations
    else Path()
)
# Size, control tokens, version: as mistral-common reports them.
FILES = {
    "tokenizer.model.v1": (32000, 2, "v1"),
    "mistral_instruct_tokenizer_240216.model.v2": (32768, 770, "v2"),
    "mistral_instruct_tokenizer_240323.model.v3": (32768, 750, "v3"),
    "mistral_instruct_tokenizer_241114.model.v7": (32768, 748, "v7"),
    "tekken_240911.json": (131072, 1000, "v3"),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files_give_the_ids_of_their_makers(name, tmp_path):
    if FOUND is None or not (DATA / name).is_file():
        pytest.skip(f"mistral-common with {name} is not installed")
    tokenizer = Tokenizer.load(DATA / name)
    assert (tokenizer.vocab_size, len(tokenizer.special_ids), tokenizer.version) == FILES[name]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    if tokenizer.format == "sentencepiece":
        peer = sentencepiece.SentencePieceProcessor(model_file=str(DATA / name))
        encode, decode = peer.encode, peer.decode
    else:
        tekken = pytest.importorskip(
            "mistral_common.tokens.tokenizers.tekken"
        ).Tekkenizer.from_file(DATA / name)
        encode, decode = (lambda text: tekken.encode(text, bos=False, eos=False)), tekken.decode
    for text in NASTY + CORPUS:
        ids = tokenizer.encode(text)
        assert ids == encode(text)
        assert tokenizer.decode(ids) == decode(ids) == "".join(streamed(tokenizer, ids))
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.hash, again.version) == (tokenizer.hash, tokenizer.version)

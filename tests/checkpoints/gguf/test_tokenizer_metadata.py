"""Tokenizers out of the metadata of GGUF files, against the tokenizers that it describes."""

import pytest
import sentencepiece

from tests.checkpoints.gguf.vocabularies import (
    CONTROL,
    PLAIN,
    PUBLISHED,
    byte_pairs,
    byte_pairs_metadata,
    sentence_piece_metadata,
)
from tests.tokenizers.makers import NASTY, sentencepiece_model
from transom.base.errors import RequestError
from transom.chat.files import stored_templates
from transom.chat.template import ChatTemplate
from transom.checkpoints.gguf.tokenizer import write_tokenizer_files
from transom.checkpoints.open_model import open_text
from transom.tokenizers.tokenizer import Tokenizer

TEXTS = [*NASTY, "It's 12345 o'clock, <think>  they'RE   CamelCase\n\n", "a<|end|>b <think> c"]
GGML = "tokenizer.ggml."
LIBRARY = byte_pairs()


@pytest.fixture
def opened(tmp_path):
    def open_it(metadata: dict) -> Tokenizer:
        folder = tmp_path / str(metadata[f"{GGML}model"])
        folder.mkdir(exist_ok=True)
        write_tokenizer_files(metadata, folder)
        return Tokenizer.load(folder)

    return open_it


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_pairs_have_the_ids_of_the_tokenizer_that_the_metadata_describes(pre, opened):
    library = byte_pairs(pre)
    tokenizer = opened(byte_pairs_metadata(library, pre))
    assert tokenizer.vocab_size == library.get_vocab_size()
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


SPACES = {"add_space_prefix": False}
MODELS = {
    "llama": ({}, {}),
    "gemma": ({"add_dummy_prefix": False, "pad_id": 3}, {"padding_token_id": 3, **SPACES}),
    "no bytes": ({"byte_fallback": False, "vocab_size": 120}, {}),
    "extra spaces": ({"remove_extra_whitespaces": True}, {"remove_extra_whitespaces": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_pieces_have_the_ids_of_the_model_that_the_metadata_describes(name, opened):
    options, stated = MODELS[name]
    content = sentencepiece_model(**options)
    peer = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = opened(sentence_piece_metadata(content, **stated))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.pad_id == stated.get("padding_token_id")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text)
        assert tokenizer.decode(ids) == peer.decode(ids)


def test_user_defined_pieces_of_spaces_are_written_with_real_spaces(opened):
    content = sentencepiece_model(user_defined_symbols=["▁▁▁", "<b>"], add_dummy_prefix=False)
    peer = sentencepiece.SentencePieceProcessor(model_proto=content)
    metadata = sentence_piece_metadata(content, add_space_prefix=False)
    tokens, types = metadata[f"{GGML}tokens"], metadata[f"{GGML}token_type"]
    for piece, spelling in (("▁▁▁", "   "), ("<b>", "<b>")):
        types[tokens.index(piece)] = 4
        tokens[tokens.index(piece)] = spelling
    tokenizer = opened(metadata)
    for text in (*TEXTS, "a   b      c <b>d</b>"):
        assert tokenizer.encode(text) == peer.encode(text)


def test_text_never_becomes_a_control_token(opened):
    tokenizer = opened(byte_pairs_metadata(LIBRARY, eot_token_id=LIBRARY.token_to_id("<think>")))
    assert tokenizer.special_tokens.keys() == {*CONTROL, "<think>"}
    spelled = "".join((*CONTROL, *PLAIN))
    assert not tokenizer.special_ids & {*tokenizer.encode(spelled)}
    assert LIBRARY.token_to_id("   ") in tokenizer.encode(spelled)
    assert tokenizer.encode("<|turn|>", allowed_special="all") == [2]
    metadata = sentence_piece_metadata(sentencepiece_model(), eot_token_id=300)
    tokenizer = opened(metadata)
    assert tokenizer.special_ids == {1, 2, 300}
    ends = f"{metadata[f'{GGML}tokens'][300]}</s><s>".replace("▁", " ")
    assert not tokenizer.special_ids & {*tokenizer.encode(ends)}


@pytest.mark.parametrize(
    ("pre", "stated", "ids"),
    [
        ("gpt-2", {}, []),
        ("llama-bpe", {}, [0]),  # as llama.cpp does where the file does not state it
        ("llama-bpe", {"add_bos_token": False, "add_eos_token": True}, [1]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [0, 1]),
    ],
)
def test_a_text_begins_and_ends_as_stated(pre, stated, ids, opened):
    tokenizer = opened(byte_pairs_metadata(LIBRARY, pre, **stated))
    assert [*tokenizer.begin, *tokenizer.end] == ids
    pieces = opened(sentence_piece_metadata(sentencepiece_model(), **stated))
    bos = [1] if stated.get("add_bos_token", True) else []
    assert [*pieces.begin, *pieces.end] == bos + ([2] if "add_eos_token" in stated else [])


def test_tokens_that_end_a_turn_are_stop_tokens(tmp_path):
    roles = {"eot_token_id": 2, "eom_token_id": 1, "padding_token_id": 2}
    write_tokenizer_files(byte_pairs_metadata(LIBRARY, **roles), tmp_path)
    text = open_text(tmp_path)
    assert text.stop_tokens == (1, 2)
    assert text.tokenizer.pad_id == 2


def test_padding_that_is_text_is_left_out_with_a_notice(opened, capsys):
    tokenizer = opened(byte_pairs_metadata(LIBRARY, padding_token_id=50))
    assert tokenizer.pad_id is None and 50 not in tokenizer.special_ids
    assert "tokenizer.ggml.padding_token_id: the token" in capsys.readouterr().err


@pytest.mark.parametrize("type", [1, 4])
def test_a_token_that_is_spelled_like_a_control_token_is_one(type, opened):
    metadata = byte_pairs_metadata(LIBRARY)
    metadata[f"{GGML}token_type"][2] = type
    tokenizer = opened(metadata)
    assert 2 in tokenizer.special_ids and 2 not in tokenizer.encode(CONTROL[2])


def test_an_empty_token_gets_a_name(opened):
    metadata = byte_pairs_metadata(LIBRARY)
    metadata[f"{GGML}tokens"].append("")
    metadata[f"{GGML}token_type"].append(1)
    assert opened(metadata).token_to_id("[EMPTY_422]") == 422


def test_chat_templates_are_found_by_name(tmp_path):
    metadata = byte_pairs_metadata(LIBRARY)
    metadata |= {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    write_tokenizer_files(metadata, tmp_path)
    assert stored_templates(tmp_path)[1] == {"default": "one", "tool_use": "two"}


def test_a_hostile_template_stays_in_the_sandbox(tmp_path):
    metadata = byte_pairs_metadata(LIBRARY)
    metadata["tokenizer.chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    write_tokenizer_files(metadata, tmp_path)
    template = ChatTemplate.find([tmp_path], Tokenizer.load(tmp_path))
    with pytest.raises(RequestError, match="__class__"):
        template.render([{"role": "user", "content": "hi"}])


def _changed(**changes):
    return lambda: byte_pairs_metadata(LIBRARY, **changes)


def _pieces(**changes):
    return lambda: sentence_piece_metadata(sentencepiece_model(), **changes)


TOKENS, COUNT = byte_pairs_metadata(LIBRARY)[f"{GGML}tokens"], LIBRARY.get_vocab_size()
REFUSED = {
    "model: got None; expected text": _changed(model=None),
    "model: got 'bert'; expected gpt2": _changed(model="bert"),
    "pre: got None; expected text": _changed(pre=None),
    "pre: got 'qwen3'; expected one of the": _changed(pre="qwen3"),
    "tokens: got None; expected a list": _changed(tokens=None),
    r"tokens\[3\]: got 7; expected text": _changed(tokens=[*"abc", 7]),
    "tokens: got 'a'; expected each token once": _changed(tokens=["a", "a"], token_type=[1, 1]),
    "token_type: got None; expected a list of": _changed(token_type=None),
    "token_type: got 1 values; expected": _changed(token_type=[1]),
    "token_type: got 9; expected": _changed(token_type=[9] * COUNT),
    "merges: got None; expected a list": _changed(merges=None),
    r"merges\[0\]: got 'a'; expected two": _changed(merges=["a"]),
    r"merges\[1\]: got 'h qq'; expected two": _changed(merges=["h e", "h qq"]),
    "eos_token_id: got 422; expected an id below": _changed(eos_token_id=COUNT),
    "bos_token_id: got 1.5; expected an integer": _changed(bos_token_id=1.5),
    "bos_token_id: got -1; expected an id": _changed(bos_token_id=-1),
    "add_bos_token: got 1; expected true": _changed(add_bos_token=1),
    "scores: got None; expected a list of 400": _pieces(scores=None),
    "scores: got 1 values": _pieces(scores=[0.0]),
    "scores: got nan; expected finite": _pieces(scores=[float("nan")] * 400),
    "token_type: got '1 byte tokens'; expected none": _pieces(token_type=[2, 3, 3, 6] + [1] * 396),
}


@pytest.mark.parametrize("message", REFUSED)
def test_metadata_that_cannot_be_right_is_refused(message, opened):
    with pytest.raises(RequestError, match=f"^{GGML}{message}"):
        opened(REFUSED[message]())

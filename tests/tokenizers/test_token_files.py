"""Tokens that only the files beside a tokenizer.json know: ids and flags are those of
transformers.
"""

import json

import pytest
from transformers import AutoTokenizer

from tests.tokenizers.makers import CORPUS, write
from transom.base.errors import RequestError
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import train_bpe

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
SIZE = 300
TEXTS = ("do <tool> it", "a <|im_start|>user<|im_end|> b", "<mask> x", "<think>a</think>")


def entry(content, **flags):
    none = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **none, **flags}


TURNS = {"300": entry("<|im_start|>", special=True), "301": entry("<|im_end|>", special=True)}
FOLDERS = {
    "decoder": {
        "tokenizer_config__json": {
            **CLASS,
            "added_tokens_decoder": {**TURNS, "302": entry("<tool>")},
        }
    },
    "out of order": {
        "tokenizer_config__json": {**CLASS, "added_tokens_decoder": dict(reversed(TURNS.items()))}
    },
    "stripping": {
        "tokenizer_config__json": {
            **CLASS,
            "mask_token": "<mask>",
            "added_tokens_decoder": {
                "300": entry("<mask>", special=True, lstrip=True, rstrip=True)
            },
        }
    },
    "other flags": {
        "tokenizer_config__json": {
            **CLASS,
            "added_tokens_decoder": {"0": entry(BOS, special=True, rstrip=True)},
        }
    },
    "old files": {
        "tokenizer_config__json": {**CLASS, "additional_special_tokens": ["<|im_start|>"]},
        "added_tokens__json": {"<|im_start|>": 300, "<|im_end|>": 301, "<tool>": 302},
        "special_tokens_map__json": {"sep_token": "<|im_end|>"},
    },
    "old file of a known token": {
        "tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS},
        "added_tokens__json": {EOS: 1},
    },
    "a list": {
        "tokenizer_config__json": {
            **CLASS,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        }
    },
    "a newer list": {"tokenizer_config__json": {**CLASS, "extra_special_tokens": ["<|im_end|>"]}},
    "names": {
        "tokenizer_config__json": {
            **CLASS,
            "extra_special_tokens": {"image_token": "<think>"},
            "video_token": "<tool>",
        }
    },
}


def load(folder, **files):
    data = json.loads(train_bpe(CORPUS, SIZE)._backend.to_json())
    return Tokenizer.load(write(folder, tokenizer__json=data, **files))


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_flags_are_those_of_transformers(name, tmp_path):
    tokenizer, peer = load(tmp_path, **FOLDERS[name]), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(peer)
    added = {token.content: id for id, token in peer.added_tokens_decoder.items() if token.special}
    assert tokenizer.special_tokens == added
    for text in TEXTS:
        ids = peer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, allowed_special="all") == ids
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))


@pytest.mark.parametrize("name", FOLDERS)
def test_saving_keeps_them(name, tmp_path):
    tokenizer = load(tmp_path / "in", **FOLDERS[name])
    tokenizer.save(tmp_path / "out")
    more = tokenizer.with_special(["<new>"])
    more.save(tmp_path / "more")
    again, larger = Tokenizer.load(tmp_path / "out"), Tokenizer.load(tmp_path / "more")
    assert again.hash == tokenizer.hash and larger.hash == more.hash
    assert larger.special_tokens == {**tokenizer.special_tokens, "<new>": tokenizer.vocab_size}


def test_an_old_list_of_special_tokens_is_believed(tmp_path):
    """transformers 5 takes them for plain text, so that every text could end a turn."""
    added = {"<|im_start|>": 300, "<|im_end|>": 301}
    old = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    files = {"added_tokens__json": added, "special_tokens_map__json": old}
    tokenizer = load(tmp_path, tokenizer_config__json=CLASS, **files)
    assert added.items() <= tokenizer.special_tokens.items()


def test_an_id_that_cannot_be_given_is_refused(tmp_path):
    config = {**CLASS, "added_tokens_decoder": {"310": entry("<tool>")}}
    with pytest.raises(RequestError, match="'<tool>': got 310; expected 300"):
        load(tmp_path, tokenizer_config__json=config)


def test_the_vocabulary_counts_where_it_has_a_token_under_another_id(tmp_path, capsys):
    config = {**CLASS, "added_tokens_decoder": {"7": entry(EOS, special=True)}}
    tokenizer, peer = (
        load(tmp_path, tokenizer_config__json=config),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert tokenizer.eos_id == peer.eos_token_id == 1
    assert "the 7 of a file beside it is not used" in capsys.readouterr().err


def test_named_ends_of_turns_are_stop_tokens(tmp_path):
    config = {**CLASS, "eot_token": "<|im_end|>", "added_tokens_decoder": TURNS}
    tokenizer = load(tmp_path, tokenizer_config__json=config)
    assert tokenizer.stop_ids == (1, 301)
    assert tokenizer.with_special(["<new>"]).stop_ids == (1, 301)

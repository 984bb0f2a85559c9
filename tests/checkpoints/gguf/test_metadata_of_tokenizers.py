"""The metadata of GGUF files that state a tokenizer, and the tokenizer made from them again."""

import json
from dataclasses import replace

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from tests.checkpoints.gguf.vocabularies import (
    CONTROL,
    LLAMA3,
    PUBLISHED,
    byte_pairs,
    byte_pairs_metadata,
    pieces_in_json,
    sentence_piece_metadata,
)
from tests.tokenizers.makers import (
    CORPUS,
    MISTRAL_CONTROL,
    NASTY,
    byte_ranks,
    rank_file,
    sentencepiece_model,
    tekken_file,
    write,
)
from transom.base.errors import RequestError
from transom.checkpoints.gguf.sentence_piece_file import SentencePieceFile
from transom.checkpoints.gguf.tokenizer import write_tokenizer_files
from transom.checkpoints.gguf.tokenizer_metadata import tokenizer_metadata
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import train_bpe, train_chars

GGML = "tokenizer.ggml."
LIBRARY = byte_pairs()


@pytest.fixture
def again(tmp_path):
    """Files made from metadata, opened."""

    def open_it(metadata: dict) -> Tokenizer:
        write_tokenizer_files(metadata, tmp_path)
        return Tokenizer.load(tmp_path)

    return open_it


def saved(folder, library: tokenizers.Tokenizer, **files):
    files.setdefault("tokenizer_config__json", {"bos_token": CONTROL[0], "eos_token": CONTROL[1]})
    return write(folder / "saved", tokenizer__json=library.to_str(), **files)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_pairs_are_stated_as_they_were(pre, tmp_path):
    library = byte_pairs(pre)
    expected = byte_pairs_metadata(library, pre, add_bos_token=False, add_eos_token=False)
    assert tokenizer_metadata(saved(tmp_path, library)) == expected


def test_a_pattern_is_recognized_in_its_other_spellings(tmp_path, capsys):
    library = byte_pairs("llama-bpe")
    library.normalizer = normalizers.Sequence([])  # it does nothing
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = tokenizers.Regex(LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n"))
    words = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    assert tokenizer_metadata(saved(tmp_path, library))[f"{GGML}pre"] == "llama-bpe"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"control_symbols": MISTRAL_CONTROL},
        {"user_defined_symbols": ["<turn>", "▁▁▁", "\n\n"], "add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 120, "remove_extra_whitespaces": True},
    ],
)
def test_pieces_have_the_same_ids_again(options, tmp_path, again):
    content = sentencepiece_model(**options)
    before = Tokenizer.load(write(tmp_path / "saved", tokenizer__model=content))
    metadata = tokenizer_metadata(tmp_path / "saved")
    scores = sentence_piece_metadata(content)[f"{GGML}scores"]
    assert metadata[f"{GGML}scores"] == scores
    after = again(metadata)
    assert after.special_tokens == before.special_tokens
    for text in (*NASTY, "a   b      c <turn>"):
        assert after.encode(text) == before.encode(text)
    if "user_defined_symbols" in options:
        assert "   " in metadata[f"{GGML}tokens"]  # llama.cpp finds it in the text itself


@pytest.mark.parametrize("prefix", ["Prepend", "Metaspace", "none"])
def test_pairs_by_rank_with_byte_fallback_become_scores(prefix, tmp_path, again):
    library = pieces_in_json(sentencepiece_model(), prefix)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    before = Tokenizer.load(saved(tmp_path, library, tokenizer_config__json=named))
    metadata = tokenizer_metadata(tmp_path / "saved")
    assert metadata[f"{GGML}add_space_prefix"] == (prefix != "none")
    after = again(metadata)
    assert after.unk_id == before.unk_id == 0
    for text in NASTY:
        # Metaspace puts no second space before a text that begins with one.
        if prefix != "Metaspace" or not text.startswith((" ", "▁")):
            assert after.encode(text) == before.encode(text)


def test_runs_of_spaces_that_share_a_score_keep_it(tmp_path, again):
    model = SentencePieceFile.of(sentencepiece_model())
    runs = [run for length in (4, 2, 3, 6) if (run := "▁" * length) not in model.spellings]
    count = len(runs)
    content = replace(
        model,
        spellings=[*model.spellings, *runs],
        scores=[*model.scores, *[-1e9] * count],
        types=[*model.types, *[1] * count],
        ids={"unk": 0, "bos": 1, "eos": 2},
    ).to_bytes()
    before = Tokenizer.load(saved(tmp_path, pieces_in_json(content, "none")))
    metadata = tokenizer_metadata(tmp_path / "saved")
    scores = dict(zip(metadata[f"{GGML}tokens"], metadata[f"{GGML}scores"], strict=True))
    assert count > 2 and len({scores[run] for run in runs}) == 1
    after = again(metadata)
    for text in (f"a{' ' * length}b" for length in range(14)):
        assert after.encode(text) == before.encode(text)


def test_names_and_edges_and_templates_and_ends_are_stated(tmp_path):
    config = {
        "bos_token": CONTROL[0], "eos_token": CONTROL[1], "pad_token": CONTROL[2],
        "chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}],
    }  # fmt: skip
    stops = {"eos_token_id": [2, 1, 5]}
    folder = saved(tmp_path, LIBRARY, tokenizer_config__json=config, generation_config__json=stops)
    metadata = tokenizer_metadata(folder)
    ids = {key.removeprefix(GGML): one for key, one in metadata.items() if key.endswith("_id")}
    assert ids == {
        "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2, "eot_token_id": 2,
        "eom_token_id": 5,
    }  # fmt: skip
    templates = {key: one for key, one in metadata.items() if "chat_template" in key}
    assert templates == {"tokenizer.chat_template": "a", "tokenizer.chat_template.rag": "b"}


def test_a_tokenizer_trained_here_makes_the_round_trip(tmp_path, again):
    tokenizer = train_bpe(CORPUS, 320)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    metadata = tokenizer_metadata(tmp_path / "saved")
    after = again(metadata)
    assert metadata[f"{GGML}pre"] == "smaug-bpe"
    assert (after.begin, after.eos_id) == (tokenizer.begin, tokenizer.eos_id)
    assert [*map(after.encode, NASTY)] == [*map(tokenizer.encode, NASTY)]


def test_rows_without_a_token_get_one_that_no_text_contains(tmp_path, again):
    count = LIBRARY.get_vocab_size()
    metadata = tokenizer_metadata(saved(tmp_path, LIBRARY), rows=count + 2)
    assert metadata[f"{GGML}tokens"][-2:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert again(metadata).vocab_size == count + 2


def test_what_gguf_does_not_state_is_reported(tmp_path, capsys):
    tokenizer_metadata(saved(tmp_path, pieces_in_json(sentencepiece_model(), "Metaspace")))
    assert "also before one that begins with a space" in capsys.readouterr().err
    library = byte_pairs("qwen2")
    library.normalizer = normalizers.NFC()
    library.add_special_tokens([tokenizers.AddedToken("<|x|>", rstrip=True)])
    stops = {"eos_token_id": [0, 1, 2, 3]}
    assert tokenizer_metadata(saved(tmp_path, library, generation_config__json=stops))
    notices = capsys.readouterr().err
    for part in ("NFC", "'<|x|>' swallows", "3 of the 4 tokens that end a text"):
        assert part in notices


def _library(change):
    library = byte_pairs()
    change(library)
    return {"tokenizer__json": library.to_str()}


def _cut_by(*steps):
    def change(library):
        library.pre_tokenizer = pre_tokenizers.Sequence([*steps])

    return lambda: _library(change)


def _unreached():
    library = json.loads(byte_pairs("llama-bpe").to_str())
    library["model"]["ignore_merges"] = True
    library["pre_tokenizer"] = json.loads(LIBRARY.to_str())["pre_tokenizer"]
    library["model"]["merges"].pop()
    return {"tokenizer__json": library}


def _scored(change):
    document = json.loads(pieces_in_json(sentencepiece_model(), "none").to_str())
    change(document)
    return {"tokenizer__json": document}


def _apart(document):
    """Make a token by a second merge that comes long after the first one."""
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    left, right = next(pair for pair in merges if len(pair[0]) > 1)
    vocabulary[left[1:] + right] = len(vocabulary)
    merges.append([left[:1], left[1:] + right])


def _chars():
    return {"tokenizer__json": train_chars(["abc"])._backend.to_json()}


LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False)
REFUSED = {
    "model of tokenizer.json: got 'WordLevel'": _chars,
    "pre_tokenizer of tokenizer.json: got 'Whitespace'": _cut_by(pre_tokenizers.Whitespace()),
    "pre_tokenizer of tokenizer.json: got 'ByteLevel'": _cut_by(
        pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "pre_tokenizer of tokenizer.json: got .'a'": _cut_by(
        pre_tokenizers.Split(tokenizers.Regex("a"), "isolated"), LETTERS
    ),
    "expected tokens that are results of merges": _unreached,
    "merges of tokenizer.json: got": lambda: _scored(lambda one: one["model"]["merges"].pop()),
    "merges of tokenizer.json: got '..*'; expected those": lambda: _scored(_apart),
    "normalizer of tokenizer.json: got 'NFKC'": lambda: _scored(
        lambda one: one.update(normalizer={"type": "NFKC"})
    ),
    "model type: got 'unigram'": lambda: {
        "tokenizer__model": sentencepiece_model(model_type="unigram")
    },
    "of the kind tiktoken": lambda: {
        "tokenizer__model": rank_file(byte_ranks()),
        "params__json": {"vocab_size": 380 + 256},
    },
    "of the kind tekken": lambda: {
        "tekken__json": tekken_file(
            byte_ranks(), named=None, control=20, version="v3", pattern=LLAMA3
        )
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_tokenizer_that_gguf_cannot_state_is_refused(message, tmp_path):
    with pytest.raises(RequestError, match=message):
        tokenizer_metadata(write(tmp_path, **REFUSED[message]()))

"""Tokenizers: round trips, streaming against whole decoding, specials in text, files that others
read.
"""

import _thread
import json
import math
import random
import re

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from transom.base.errors import RequestError
from transom.tokenizers.fast import FastBackend
from transom.tokenizers.llama import LLAMA3_WORDS
from transom.tokenizers.stream import StreamDecoder
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import (
    LONGEST_WORD,
    SPECIAL_TOKENS,
    byte_tokenizer,
    train_bpe,
    train_chars,
)

TEXTS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs.\r\n\n  def f(x):\n\treturn x\n",
    "naïve café e\u0301 a\u0308 — Ωμέγα Привет мир",
    "漢字かな交じり文 한국어 ภาษาไทย नमस्ते",
    "👍🏽 👩\u200d👩\u200d👧 🇩🇪 😀😀 end",
    " leading and  double  spaces ",
    "  ",
]


def metaspace_bytes() -> Tokenizer:
    """What Llama 2 files hold: BPE over ▁-words, bytes for the rest, a decoder that strips one
    space.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["", "▁", *"abcdefghilmnopqrstuvwxyz.", "▁a", "an", "▁an", "do"]
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("d", "o")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(FastBackend(backend, ["<s>", "</s>"]), bos="<s>", eos="</s>")


def metaspace_unigram() -> Tokenizer:
    """What T5-like files hold: a Unigram vocabulary with its specials inside, a Metaspace
    decoder.
    """
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<s>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "</s> <s>", *SPECIAL_TOKENS], trainer)
    return Tokenizer(FastBackend(backend, ["<s>", "</s>"]), bos="<s>", eos="</s>")


OWN = {
    "bpe": lambda: train_bpe(TEXTS, 300),
    "chars": lambda: train_chars([*TEXTS, *SPECIAL_TOKENS]),
    "bytes": byte_tokenizer,
}
FOREIGN = {"metaspace-bytes": metaspace_bytes, "metaspace-unigram": metaspace_unigram}
MADE = {name: make() for name, make in (OWN | FOREIGN).items()}
own = pytest.mark.parametrize("name", OWN)
every = pytest.mark.parametrize("name", MADE)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*(stream.push(id) for id in ids), stream.finish()]


@own
def test_decoding_gives_the_text_back(name):
    for text, ids in zip(TEXTS, MADE[name].encode_batch(TEXTS), strict=True):
        assert ids == MADE[name].encode(text)
        assert MADE[name].decode(ids) == text


@every
def test_streamed_pieces_join_to_the_whole_and_hold_no_part_of_a_character(name):
    tokenizer = MADE[name]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


@every
def test_streamed_nonsense_joins_to_the_whole(name):
    tokenizer = MADE[name]
    generator = random.Random(0)
    for _ in range(200):  # broken bytes and specials in all places
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(40)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@every
def test_a_stream_does_not_wait_for_the_end(name):
    tokenizer = MADE[name]
    pieces = streamed(tokenizer, tokenizer.encode("and do and do"))
    assert pieces[-1] == ""
    assert sum(map(bool, pieces)) > 3


def test_a_space_behind_an_id_without_text_is_kept():
    tokenizer = MADE["metaspace-bytes"]
    ids = [tokenizer.token_to_id(token) for token in ("s", "", "▁a")]
    assert streamed(tokenizer, ids) == ["s", "", " a", ""]


def test_a_stream_of_broken_bytes_is_not_held_forever():
    stream = StreamDecoder(byte_tokenizer())
    pieces = [stream.push(id) for id in [0x80] * 100]
    assert pieces == ["", *["\ufffd"] * 99]
    assert stream.push(0xE4) + stream.push(0xBD) + stream.push(0xA0) == "\ufffd你"


@every
def test_a_special_spelled_in_text_stays_text(name):
    tokenizer = MADE[name]
    for special in (tokenizer.bos_id, tokenizer.eos_id):
        text = f"and{tokenizer.id_to_token(special)} do{tokenizer.id_to_token(special)}"
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
            assert special not in ids
            assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@own
def test_transformers_reads_what_was_saved(name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = MADE[name]
    tokenizer.save(tmp_path, model_max_length=77)
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (peer.bos_token_id, peer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert peer.model_max_length == 77
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert peer(text, add_special_tokens=False).input_ids == ids
        assert peer(text).input_ids == tokenizer.encode(text, add_bos=True)
        assert peer.decode(ids) == tokenizer.decode(ids)


@every
def test_a_saved_folder_loads_as_the_same_tokenizer(name, tmp_path):
    tokenizer = MADE[name]
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        None,
    )
    assert loaded.encode("and do 漢", add_bos=True) == tokenizer.encode("and do 漢", add_bos=True)


def test_long_runs_are_cut_in_training_and_ordinary_words_are_not():
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    ours = train_bpe(TEXTS, 300)._backend._library
    assert ours.get_vocab() == backend.get_vocab()
    assert str(ours.pre_tokenizer) == str(backend.pre_tokenizer), "encoding is not cut"
    with pytest.raises(RequestError) as caught:
        train_bpe(["-" * 4096], 400)
    reached = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert reached - 258 < 2 * math.log2(LONGEST_WORD), "no pair is longer than a piece"


def test_training_ends_at_once_when_it_is_interrupted_or_its_texts_fail():
    def endless():
        yield "some text"
        _thread.interrupt_main()
        while True:
            yield "more text"

    with pytest.raises(KeyboardInterrupt):
        train_bpe(endless(), 300)

    def failing():
        yield "some text"
        raise RequestError("the file: not UTF-8")

    with pytest.raises(RequestError, match="not UTF-8"):
        train_bpe(failing(), 300)


def test_bpe_training_is_repeatable_and_numbers_specials_first():
    again = train_bpe(iter(TEXTS), 300)
    assert again.hash == MADE["bpe"].hash
    assert (again.bos_id, again.eos_id, again.vocab_size) == (0, 1, 300)


def test_bpe_of_a_text_too_small_names_the_size_reached():
    with pytest.raises(RequestError, match=r"vocab_size: got 5000; expected at most 260"):
        train_bpe(["ab ab"], 5000)


def test_an_unknown_character_is_named():
    tokenizer = train_chars(["abc"])
    with pytest.raises(RequestError, match="text: got 'd' at character 2; expected the 6 entries"):
        tokenizer.encode_batch(["abc", "abdé"])


def test_byte_ids_are_the_bytes():
    assert byte_tokenizer().encode("é\n", add_bos=True, add_eos=True) == [
        256,
        0xC3,
        0xA9,
        0x0A,
        257,
    ]


def test_a_bos_that_is_not_there_is_refused(tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.bos_id is None
    with pytest.raises(RequestError, match="add_bos: got True"):
        tokenizer.encode("a", add_bos=True)


def test_names_may_be_objects_and_an_absent_token_is_reported(tmp_path, capsys):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": SPECIAL_TOKENS[1]}})
    )
    names = {"bos_token": "<x>", "eos_token": SPECIAL_TOKENS[0], "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (257, 256, None)
    assert "pad_token '<pad>' is not in the vocabulary" in capsys.readouterr().err


def test_truncation_and_padding_of_a_file_are_off(tmp_path):
    byte_tokenizer().save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode_batch(["abcd", "a"]) == [[97, 98, 99, 100], [97]]


@pytest.mark.parametrize("id", [-1, 258])
def test_decoding_an_id_without_a_token_is_refused(id):
    with pytest.raises(RequestError, match=f"token id: got {id}; expected ids below 258"):
        byte_tokenizer().decode([97, id])


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(
        RequestError, match=r"text: got 'a\\ud800'; expected text that UTF-8 can write"
    ):
        byte_tokenizer().encode_batch(["b", "a\ud800"])


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RequestError, match=r"expected") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)

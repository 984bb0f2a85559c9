"""SentencePiece models against sentencepiece, mistral-common and transformers."""

from threading import Barrier

import pytest
import sentencepiece

from tests.tokenizers.makers import (
    MISTRAL_CONTROL,
    NASTY,
    nonsense,
    sentencepiece_model,
    streamed,
    write,
)
from transom.base.errors import RequestError
from transom.tokenizers.tokenizer import Tokenizer

KINDS = {
    "llama2": {},
    "mistral": {"control_symbols": MISTRAL_CONTROL},
    "gemma": {"add_dummy_prefix": False, "user_defined_symbols": ["<turn>", "\n\n"], "pad_id": 3},
    "t5": {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc",
           "remove_extra_whitespaces": True, "bos_id": -1, "vocab_size": 120},
}  # fmt: skip
MODELS = {name: sentencepiece_model(**options) for name, options in KINDS.items()}
every = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def folder(tmp_path):
    return lambda name, **files: write(tmp_path, tokenizer__model=MODELS[name], **files)


def peer(name):
    return sentencepiece.SentencePieceProcessor(model_proto=MODELS[name])


@every
def test_ids_and_text_are_those_of_sentencepiece(name, folder):
    tokenizer = Tokenizer.load(folder(name))
    assert tokenizer.format == "sentencepiece"
    assert tokenizer.vocab_size == peer(name).get_piece_size()
    for text, ids in zip(NASTY, tokenizer.encode_batch(NASTY), strict=True):
        assert ids == tokenizer.encode(text) == peer(name).encode(text)
        assert tokenizer.decode(ids) == peer(name).decode(ids)
        if name in ("llama2", "mistral", "gemma") and "▁" not in text:
            assert tokenizer.decode(ids) == text


@every
def test_nonsense_decodes_as_in_sentencepiece_whole_and_streamed(name, folder):
    tokenizer = Tokenizer.load(folder(name))
    for ids in nonsense(tokenizer, 60):
        plain = [id for id in ids if id not in tokenizer.special_ids]
        assert tokenizer.decode(ids) == peer(name).decode(plain)
        for skip in (True, False):
            pieces = streamed(tokenizer, ids, skip_special=skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@every
def test_streamed_text_holds_no_part_of_a_character_and_waits_for_none(name, folder):
    tokenizer = Tokenizer.load(folder(name))
    for text in NASTY:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "".join(pieces).count("\ufffd") == tokenizer.decode(ids).count("\ufffd")
        assert pieces[-1] == ""


def test_characters_of_bytes_are_shown_as_soon_as_they_are_whole(folder):
    tokenizer = Tokenizer.load(folder("llama2"))
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "👍\n你".encode()]
    assert streamed(tokenizer, ids) == ["", "", "", "👍", "\n", "", "", "你", ""]


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_ids_are_those_of_mistral_common(name, tmp_path):
    module = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
    write(tmp_path, tokenizer__model__v3=MODELS[name])
    tokenizer = Tokenizer.load(tmp_path)
    mistral = module.SentencePieceTokenizer(tmp_path / "tokenizer.model.v3")
    assert tokenizer.version == mistral.version == "v3"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (mistral.bos_id, mistral.eos_id)
    assert tokenizer.special_ids == mistral.special_ids
    for text in NASTY:
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)
        assert ids == mistral.encode(text, bos=True, eos=True)
        assert tokenizer.decode(ids) == mistral.decode(ids)
    turn = [tokenizer.special_tokens["[INST]"], *mistral.encode("do and do", bos=False, eos=False)] if (
        name == "mistral"
    ) else None  # fmt: skip
    if turn:
        assert tokenizer.encode("[INST]do and do", allowed_special=["[INST]"]) == turn


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_around_special_tokens_are_those_of_transformers(legacy, folder):
    """Text behind a special token begins with a space or not: `legacy` decides."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    model = peer("llama2")
    pieces = [model.id_to_piece(id) for id in range(model.get_piece_size())]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    scores = {
        piece: model.get_score(id) for piece, id in vocabulary.items() if not model.is_byte(id)
    }
    merges = generate_merges(vocabulary, scores, skip_tokens=["<unk>", "<s>", "</s>"])
    llama = LlamaTokenizer(vocabulary, merges, legacy=legacy, add_bos_token=True)
    tokenizer = Tokenizer.load(folder("llama2", tokenizer_config__json={"legacy": legacy}))
    assert tokenizer.adds_bos and not tokenizer.adds_eos
    for text in ["hello<s>do and</s>do", "<s>hello", "do </s>and", "</s></s>", "a<s>"]:
        assert tokenizer.encode(text, allowed_special="all") == llama.encode(
            text, add_special_tokens=False
        )
    for text in NASTY[:9]:
        # There a leading space stands in for the model's own, and runs of spaces are merged in
        # another order.
        if not text.startswith(" ") and "  " not in text:
            assert tokenizer.encode(text, add_bos=True) == llama.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == llama.decode(tokenizer.encode(text))


@every
def test_control_tokens_spelled_in_text_stay_text(name, folder):
    tokenizer = Tokenizer.load(folder(name))
    for spelling in tokenizer.special_tokens:
        ids = tokenizer.encode(f"do{spelling}and {spelling}")
        assert tokenizer.special_ids.isdisjoint(ids)


def test_a_user_defined_piece_that_the_config_calls_special_stays_text(folder):
    """SentencePiece itself finds such pieces in every text; Gemma's turns are of this kind."""
    added = {"5": {"content": "<turn>", "special": True}}
    assert peer("gemma").piece_to_id("<turn>") == 4
    with pytest.raises(RequestError, match=r"id of '<turn>': got 5; expected 4"):
        Tokenizer.load(folder("gemma", tokenizer_config__json={"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(
        folder("gemma", tokenizer_config__json={"added_tokens_decoder": {"4": added["5"]}})
    )
    text = "a<turn>b<turn><turn>"
    assert 4 in peer("gemma").encode(text)
    assert 4 not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<turn>", allowed_special=["<turn>"]) == [4]


def test_tokens_added_beside_the_model_are_read(folder):
    size = peer("llama2").get_piece_size()
    tokenizer = Tokenizer.load(
        folder(
            "llama2",
            added_tokens__json={"<|im_end|>": size, "<tool>": size + 1},
            special_tokens_map__json={"eos_token": "<|im_end|>"},
        )
    )
    assert tokenizer.eos_id == size and tokenizer.vocab_size == size + 2
    assert size not in tokenizer.encode("a<|im_end|>") and size + 1 in tokenizer.encode("a<tool>")
    for ids in (tokenizer.encode("do<tool>and"), *tokenizer.encode_batch(["do<tool>and"])):
        assert ids.count(size + 1) == 1
    assert tokenizer.encode("<|im_end|>", allowed_special="all") == [size]
    assert tokenizer.decode([size + 1, size]) == "<tool>"
    assert tokenizer.decode([size], skip_special=False) == "<|im_end|>"


def test_batches_with_plain_added_tokens_are_encoded_in_threads(folder, monkeypatch):
    size = peer("llama2").get_piece_size()
    tokenizer = Tokenizer.load(folder("llama2", added_tokens__json={"<tool>": size}))
    texts = ["do<tool>and", "and<tool>do"]
    alone = [tokenizer.encode(text) for text in texts]
    both, encode = Barrier(2, timeout=10), tokenizer._backend.encode

    def together(text, first=True):
        both.wait()  # one thread alone never gets past it
        return encode(text, first)

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(tokenizer._backend, "encode", together)
    assert tokenizer.encode_batch(texts) == alone


def test_a_control_token_may_have_a_new_name(folder):
    """Those who fine-tune give names to control tokens that Mistral has left free."""
    id = peer("mistral").piece_to_id("[TOOL_CALLS]")
    added = {str(id): {"content": "<|im_start|>", "special": True}}
    tokenizer = Tokenizer.load(
        folder("mistral", tokenizer_config__json={"added_tokens_decoder": added})
    )
    assert (
        tokenizer.special_tokens["<|im_start|>"] == id
        and "[TOOL_CALLS]" not in tokenizer.special_tokens
    )
    assert tokenizer.encode("<|im_start|>", allowed_special="all") == [id]
    assert id not in tokenizer.encode("<|im_start|>[TOOL_CALLS]")
    assert tokenizer.decode([id], skip_special=False) == "<|im_start|>"


@every
def test_saving_writes_the_files_back(name, folder, tmp_path):
    where = folder(
        name,
        tokenizer_config__json='{"chat_template":  "x"}',
        chat_template__jinja="{{ bos_token }}",
    )
    tokenizer = Tokenizer.load(where)
    tokenizer.save(tmp_path / "out")
    for file in where.iterdir():
        if file.is_file():
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    again = Tokenizer.load(tmp_path / "out")
    assert again.hash == tokenizer.hash and again.encode("do and") == tokenizer.encode("do and")
    assert (
        len(
            {
                Tokenizer.load(write(tmp_path / n, tokenizer__model=m)).hash
                for n, m in MODELS.items()
            }
        )
        == 4
    )


def test_the_version_of_mistrals_format_comes_from_the_file(tmp_path):
    names = {"tokenizer__model": "v3", "tokenizer__model__v2": "v2", "tokenizer__model__v7m1": "v7"}
    for number, (name, version) in enumerate(names.items()):
        where = write(tmp_path / str(number), **{name: MODELS["mistral"]})
        assert Tokenizer.load(where).version == version
    newest = sentencepiece_model(control_symbols=[*MISTRAL_CONTROL, "[SYSTEM_PROMPT]"])
    assert Tokenizer.load(write(tmp_path / "7", tokenizer__model=newest)).version == "v7"
    assert Tokenizer.load(write(tmp_path / "l", tokenizer__model=MODELS["llama2"])).version is None


@pytest.mark.parametrize(
    "content", [b"", b"garbage", MODELS["llama2"][:3000]], ids=["empty", "other", "cut"]
)
def test_a_file_that_is_no_model_is_refused(content, tmp_path):
    with pytest.raises(RequestError, match=r"tokenizer\.model.*expected a SentencePiece model"):
        Tokenizer.load(write(tmp_path, tokenizer__model=content))

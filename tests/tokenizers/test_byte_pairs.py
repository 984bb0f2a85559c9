"""Llama 3, Llama 4 and tekken files against tiktoken, transformers and mistral-common."""

import base64
import json

import pytest
import tiktoken

from tests.tokenizers.makers import (
    MISTRAL_CONTROL,
    NASTY,
    byte_ranks,
    nonsense,
    rank_file,
    streamed,
    tekken_file,
    write,
)
from transom.base.errors import RequestError
from transom.tokenizers.llama import (
    LLAMA3,
    LLAMA3_WORDS,
    LLAMA4,
    LLAMA4_WORDS,
    llama_backend,
    read_ranks,
)
from transom.tokenizers.tokenizer import Tokenizer

RANKS = byte_ranks()
FAMILIES = {"llama3": LLAMA3, "llama4": LLAMA4}
TEKKEN = {
    "named": {
        "named": ["<unk>", "<s>", "</s>", *MISTRAL_CONTROL, "<pad>"],
        "control": 20,
        "version": "v11",
    },
    "unnamed": {"named": None, "control": 30, "version": "v3"},
}
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
family = pytest.mark.parametrize("name", FAMILIES)
tekken = pytest.mark.parametrize("name", TEKKEN)
every = pytest.mark.parametrize("name", [*FAMILIES, *TEKKEN])


@pytest.fixture
def folder(tmp_path):
    def make(name):
        if name in TEKKEN:
            return write(
                tmp_path, tekken__json=tekken_file(RANKS, pattern=TEKKEN_WORDS, **TEKKEN[name])
            )
        size = len(RANKS) + FAMILIES[name].control_count
        return write(tmp_path, tokenizer__model=rank_file(RANKS), params__json={"vocab_size": size})

    return make


@family
def test_ids_and_text_are_those_of_tiktoken(name, folder):
    special = {token: len(RANKS) + place for place, token in enumerate(FAMILIES[name].control)}
    pattern = {"llama3": LLAMA3_WORDS, "llama4": LLAMA4_WORDS}[name]
    peer = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=RANKS, special_tokens=special)
    tokenizer = Tokenizer.load(folder(name))
    assert tokenizer.format == "tiktoken" and tokenizer.adds_bos
    assert tokenizer.vocab_size == peer.n_vocab
    few = {"<|begin_of_text|>", "<|reserved_special_token_5|>"}
    for text, ids in zip(NASTY, tokenizer.encode_batch(NASTY), strict=True):
        assert ids == tokenizer.encode(text) == peer.encode(text, disallowed_special=())
        assert tokenizer.encode(text, allowed_special="all") == peer.encode(
            text, allowed_special="all"
        )
        some = peer.encode(text, allowed_special=few, disallowed_special=())
        assert tokenizer.encode(text, allowed_special=few) == some
        assert tokenizer.decode(ids) == text == peer.decode(ids)
        assert tokenizer.decode(some, skip_special=False) == text
    for ids in nonsense(tokenizer, 60):
        assert tokenizer.decode(ids, skip_special=False) == peer.decode(ids)


def test_ids_are_those_of_transformers(folder):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    where = folder("llama3")
    peer = TikTokenConverter(vocab_file=str(where / "tokenizer.model")).converted()
    tokenizer = Tokenizer.load(where)
    for text in NASTY:
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False).ids


# Published: llama-models, and config.json and generation_config.json of both families.
@pytest.mark.parametrize(
    ("token", "id"),
    [
        ("<|begin_of_text|>", 128000),
        ("<|end_of_text|>", 128001),
        ("<|finetune_right_pad_id|>", 128004),
        ("<|start_header_id|>", 128006),
        ("<|end_header_id|>", 128007),
        ("<|eom_id|>", 128008),
        ("<|eot_id|>", 128009),
        ("<|python_tag|>", 128010),
        ("<|reserved_special_token_2|>", 128012),
        ("<|reserved_special_token_245|>", 128255),
        ("<|begin_of_text|>", 200000),
        ("<|header_start|>", 200005),
        ("<|header_end|>", 200006),
        ("<|eom|>", 200007),
        ("<|eot|>", 200008),
        ("<|finetune_right_pad|>", 200018),
        ("<|text_post_train_reserved_special_token_68|>", 200079),
        ("<|image_start|>", 200080),
        ("<|tile_x_separator|>", 200084),
        ("<|image|>", 200090),
        ("<|patch|>", 200092),
        ("<|vision_reserved_special_token_1047|>", 201133),
        ("<|reasoning_thinking_end|>", 201143),
        ("<|reserved_special_token_0|>", 201144),
        ("<|reserved_special_token_903|>", 202047),
    ],
)
def test_control_tokens_have_the_published_ids(token, id):
    which = LLAMA3 if id < 200_000 else LLAMA4
    assert which.ranks + which.control.index(token) == id
    assert len(set(which.control)) == len(which.control) == which.control_count


@family
def test_stop_tokens_are_those_of_meta(name, folder):
    tokenizer = Tokenizer.load(folder(name))
    turns = {"llama3": ["<|eom_id|>", "<|eot_id|>"], "llama4": ["<|eom|>", "<|eot|>"]}[name]
    assert tokenizer.stop_ids == tuple(map(tokenizer.token_to_id, ["<|end_of_text|>", *turns]))


@family
def test_long_texts_are_cut_where_meta_cuts_them(name, folder):
    """Meta's rule, written again character by character."""

    def pieces(text, longest=25_000):
        for start in range(0, len(text), 400_000):
            part, run = "", 0
            for character in text[start : start + 400_000]:
                same = bool(part) and part[-1].isspace() == character.isspace()
                run = run + 1 if same else 1
                if run > longest:
                    yield part
                    part, run = "", 1
                part += character
            yield part

    tokenizer = Tokenizer.load(folder(name))
    pair = next(token.decode() for token in RANKS if len(token) == 2 and token.isalpha())
    word = next(token.decode() for token in RANKS if len(token) == 3 and token.startswith(b" "))
    for text in [
        "a" * 25_001,
        "x" + pair * 30_000,  # every cut parts a pair
        " b" + " " * 60_000 + "x" + pair * 25_000,
        word * 150_000,  # 400,000 characters end within a word
        " " * 1_100_000,
    ]:
        ids = [id for piece in pieces(text) for id in tokenizer.encode(piece)]
        assert tokenizer.encode(text) == ids


def test_the_family_is_told_by_the_size_of_the_vocabulary(tmp_path):
    write(tmp_path, tokenizer__model=rank_file(RANKS), params__json={"vocab_size": -1})
    message = r"got None; expected 636 \(llama3\), 2428 \(llama4\) with 380 ranks"
    with pytest.raises(RequestError, match=message):
        Tokenizer.load(tmp_path)
    write(tmp_path, params__json={"model": {"vocab_size": 636}})
    assert "<|eot_id|>" in Tokenizer.load(tmp_path).special_tokens
    write(tmp_path, params__json={"vocab_size": 2428})
    assert "<|eot|>" in Tokenizer.load(tmp_path).special_tokens


@pytest.mark.parametrize("vocab_size", [None, 128_320])
def test_a_published_file_is_known_beside_any_model(vocab_size):
    """Models round their vocabulary up, and params.json may say -1."""
    ranks = list(RANKS)[:256] + [b"%06d" % number for number in range(127_744)]
    content = rank_file({token: rank for rank, token in enumerate(ranks)})
    backend, which = llama_backend(content, "tokenizer.model", vocab_size)
    assert which is LLAMA3 and backend.token_to_id("<|eot_id|>") == 128_009


@tekken
def test_ids_and_text_are_those_of_mistral_common(name, folder):
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    where = folder(name)
    peer = module.Tekkenizer.from_file(where / "tekken.json")
    tokenizer = Tokenizer.load(where)
    assert (tokenizer.format, tokenizer.version) == ("tekken", TEKKEN[name]["version"])
    assert tokenizer.vocab_size == peer.n_words == 373 + TEKKEN[name]["control"]
    assert tokenizer.special_ids == peer.special_ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (
        peer.bos_id, peer.eos_id, peer.pad_id, peer.unk_id
    )  # fmt: skip
    for spelling, id in tokenizer.special_tokens.items():
        assert peer.get_special_token(spelling) == id
    for text, ids in zip(NASTY, tokenizer.encode_batch(NASTY), strict=True):
        assert ids == peer.encode(text, bos=False, eos=False)
        assert tokenizer.encode(text, add_bos=True, add_eos=True) == peer.encode(
            text, bos=True, eos=True
        )
        assert tokenizer.decode([1, *ids, 2]) == peer.decode([1, *ids, 2]) == text
        kept = peer.decode([1, *ids, 2], special_token_policy=module.SpecialTokenPolicy.KEEP)
        assert tokenizer.decode([1, *ids, 2], skip_special=False) == kept


@tekken
def test_ids_of_tekken_are_ranks_behind_the_control_tokens(name, folder):
    tokenizer = Tokenizer.load(folder(name))
    control = TEKKEN[name]["control"]
    assert tokenizer.encode("\x00~") == [control, control + 0x7E]
    filled = len(TEKKEN[name]["named"] or range(20))
    assert tokenizer.id_to_token(filled) == f"<SPECIAL_{filled}>"
    assert tokenizer.encode("[INST]do", allowed_special=["[INST]"])[0] == 3


def test_a_very_long_run_does_not_end_the_process(folder):
    tokenizer = Tokenizer.load(folder("named"))
    assert tokenizer.decode(tokenizer.encode(" " * 1_100_000 + "a")) == " " * 1_100_000 + "a"


@every
def test_streaming_equals_the_whole(name, folder):
    tokenizer = Tokenizer.load(folder(name))
    for text in NASTY:
        pieces = streamed(tokenizer, tokenizer.encode(text, add_bos=True, add_eos=True))
        assert "".join(pieces) == text
        assert pieces[-1] == "" and "".join(pieces).count("\ufffd") == text.count("\ufffd")
    for ids in nonsense(tokenizer, 60):
        for skip in (True, False):
            pieces = streamed(tokenizer, ids, skip_special=skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@every
def test_saving_writes_the_files_back(name, folder, tmp_path):
    where = folder(name)
    tokenizer = Tokenizer.load(where)
    out = tmp_path / "out"
    tokenizer.save(out)
    file = "tekken.json" if name in TEKKEN else "tokenizer.model"
    assert [path.name for path in out.iterdir()] == [file]
    assert (out / file).read_bytes() == (where / file).read_bytes()
    if name in FAMILIES:
        write(out, params__json=(where / "params.json").read_text())
    assert Tokenizer.load(out).hash == tokenizer.hash


def test_kinds_and_vocabularies_have_different_hashes(tmp_path):
    size = len(RANKS) + 256
    one = write(
        tmp_path / "1", tokenizer__model=rank_file(RANKS), params__json={"vocab_size": size}
    )
    two = write(
        tmp_path / "2", tokenizer__model=rank_file(RANKS), params__json={"vocab_size": size + 1792}
    )
    fewer = byte_ranks(350)
    three = write(
        tmp_path / "3", tokenizer__model=rank_file(fewer), params__json={"vocab_size": 606}
    )
    assert len({Tokenizer.load(folder).hash for folder in (one, two, three)}) == 3


A = base64.b64encode(b"a").decode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{A} 0\n{A} 1\n", "line 2: rank: got .; expected new bytes of rank 1"),
        (f"{A} 0\nYg== 2\n", "line 2: rank: got .; expected new bytes of rank 1"),
        (f"{A} 0\n{A}\n", "line 2: got .*expected `base64 rank`"),
        (f"{A} 0\n!!!! 1\n", "line 2: bytes: got .*expected base64"),
    ],
)
def test_a_bad_line_of_ranks_is_named(content, message):
    with pytest.raises(RequestError, match=message):
        read_ranks(content.encode(), "tokenizer.model")


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path):
    ranks = {token: rank for rank, token in enumerate(list(RANKS)[1:])}
    write(
        tmp_path, tokenizer__model=rank_file(ranks), params__json={"vocab_size": len(ranks) + 256}
    )
    with pytest.raises(RequestError, match="no rank for byte 0x00"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("config", "pattern", "(", r"pattern: got '\('"),
        ("config", "pattern", r"\w+| +", r"pattern: got .*covers all of the text"),
        ("config", "pattern", None, "pattern: got None"),
        ("config", "default_vocab_size", 10**6, "default_vocab_size: got 1000000; expected 276"),
        ("config", "default_num_special_tokens", 3, "default_num_special_tokens: got 3"),
        ("config", "version", 3, "version: got 3"),
        ("vocab", 300, {"rank": 1, "token_bytes": A}, "entry 300: rank: got 1"),
        ("vocab", 0, {"rank": 0, "token_bytes": A}, "entry 0: bytes: got .*the byte 0x00"),
        ("vocab", 5, {"rank": 5, "token_bytes": "!"}, "entry 5: bytes: got '!'; expected base64"),
        ("special_tokens", 1, {"rank": 7, "token_str": "x"}, "ranks of special_tokens: got"),
        ("special_tokens", 1, {"rank": 1, "token_str": "<unk>"}, "special_tokens: got '<unk>'"),
    ],
)
def test_a_wrong_tekken_file_is_refused_in_one_sentence(place, key, value, message, tmp_path):
    data = json.loads(tekken_file(RANKS, pattern=TEKKEN_WORDS, **TEKKEN["named"]))
    data[place][key] = value
    with pytest.raises(RequestError, match=message) as caught:
        Tokenizer.load(write(tmp_path, tekken__json=data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_names_of_control_tokens_may_be_missing_in_old_files_only(tmp_path):
    options = TEKKEN["unnamed"] | {"version": "v11"}
    with pytest.raises(
        RequestError, match="special_tokens: got None; expected a list of them in version v11"
    ):
        Tokenizer.load(
            write(tmp_path, tekken__json=tekken_file(RANKS, pattern=TEKKEN_WORDS, **options))
        )

"""Which tokenizer of a folder is taken, what its files say of BOS and EOS, and special tokens in
text.
"""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tests.tokenizers.makers import (
    CORPUS,
    NASTY,
    byte_ranks,
    rank_file,
    sentencepiece_model,
    tekken_file,
    write,
)
from transom.base.errors import RequestError, reset_notices
from transom.inference.embedding import encode_texts
from transom.tokenizers.llama import LLAMA3_WORDS
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import train_bpe

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def fast_json(processor=None) -> bytes:
    """A tokenizer.json of byte pairs whose post-processor is `processor`, or none."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(CORPUS, 300)._backend.to_json())
    ids = [(BOS, 0), (EOS, 1)]
    single = {"bos": f"{BOS} $A", "eos": f"$A {EOS}", "both": f"{BOS} $A {EOS}"}.get(processor)
    if single:
        template = processors.TemplateProcessing(single=single, special_tokens=ids)
        backend.post_processor = processors.Sequence([processors.ByteLevel(), template])
    else:
        backend.post_processor = processors.ByteLevel()
    return backend.to_str().encode()


def metaspace_json(scheme: str) -> bytes:
    """What Llama 2 and Mistral have as tokenizer.json; `scheme` is Metaspace's, or `legacy`."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdehilmnoprstuwx.,", "▁a", "an", "▁an", "do", "▁do"]
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("d", "o"), ("▁", "do")]
    model = models.BPE(
        {piece: id for id, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True
    )
    backend = tokenizers.Tokenizer(model)
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<r>", rstrip=True)])
    backend.add_special_tokens([AddedToken("<w>", single_word=True), AddedToken("<mask>s")])
    backend.add_tokens(["<think>"])
    return backend.to_str().encode()


FRAMES = {
    "embeddings": "$A <end>",  # Qwen3-Embedding: another token than the EOS of the chats
    "GLM": "<mask> <start> $A",
    "BERT": "<start> $A <end>",
    "none": "$A",
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize(
    "names", [{}, {"bos_token": "<start>"}, {"eos_token": "<end>"}, {"eos_token": EOS}]
)
def test_what_stands_around_a_text_is_that_of_transformers(name, names, tmp_path):
    from transformers import AutoTokenizer

    backend = tokenizers.Tokenizer.from_str(train_bpe(CORPUS, 300)._backend.to_json())
    words = ["<start>", "<end>", "<mask>"]
    backend.add_special_tokens(words)
    ids = [(word, backend.token_to_id(word)) for word in words]
    backend.post_processor = processors.TemplateProcessing(single=FRAMES[name], special_tokens=ids)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    write(tmp_path, tokenizer__json=backend.to_str(), tokenizer_config__json=config)
    tokenizer, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = ["do and do", "a " * 20]
    cut = peer(texts, truncation=True, max_length=9).input_ids
    assert encode_texts(tokenizer, texts, 9) == cut  # what stands behind a text stays
    assert [*tokenizer.encode_prompt("do"), *tokenizer.end] == peer("do").input_ids
    spelled = tokenizer.decode(tokenizer.begin, skip_special=False) + "do"
    assert tokenizer.encode_prompt(spelled, allowed_special="all") == tokenizer.encode_prompt("do")


FLAGS = [None, True, False]


@pytest.mark.parametrize("processor", [None, "bos", "eos", "both"])
@pytest.mark.parametrize("add_bos", FLAGS)
@pytest.mark.parametrize("add_eos", FLAGS)
def test_bos_and_eos_are_added_as_transformers_does(processor, add_bos, add_eos, tmp_path, capsys):
    from transformers import AutoTokenizer

    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    config |= {name: value for name, value in flags.items() if value is not None}
    write(tmp_path, tokenizer__json=fast_json(processor), tokenizer_config__json=config)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ours = tokenizer.encode("do", add_bos=tokenizer.adds_bos, add_eos=tokenizer.adds_eos)
    assert ours == peer("do").input_ids
    contradicted = sum(
        wanted is not None and wanted != does
        for wanted, does in ((add_bos, tokenizer.adds_bos), (add_eos, tokenizer.adds_eos))
    )
    assert capsys.readouterr().err.count("the latter counts") == contradicted


@pytest.mark.parametrize(("add_bos", "bos"), [(None, True), (True, True), (False, False)])
@pytest.mark.parametrize(("add_eos", "eos"), [(None, False), (True, True), (False, False)])
def test_the_config_of_a_sentencepiece_model_says_what_is_added(
    add_bos, bos, add_eos, eos, tmp_path
):
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    tokenizer = Tokenizer.load(
        write(tmp_path, tokenizer__model=sentencepiece_model(), tokenizer_config__json=flags)
    )
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (bos, eos)


def test_a_bos_that_the_vocabulary_has_but_nobody_adds_is_not_added(tmp_path):
    """Qwen and gpt-oss name or hold one, and never see it in front."""
    write(tmp_path, tokenizer__json=fast_json(None), tokenizer_config__json={"bos_token": None})
    assert Tokenizer.load(tmp_path).bos_id is None and not Tokenizer.load(tmp_path).adds_bos
    write(tmp_path, tokenizer_config__json={"bos_token": BOS})
    assert Tokenizer.load(tmp_path).bos_id == 0 and not Tokenizer.load(tmp_path).adds_bos


def test_null_in_the_config_beats_the_name_in_the_map_and_in_the_model(tmp_path):
    write(
        tmp_path,
        tokenizer__model=sentencepiece_model(),
        special_tokens_map__json={"eos_token": "</s>"},
    )
    assert Tokenizer.load(tmp_path).adds_bos
    write(tmp_path, tokenizer_config__json={"bos_token": None, "eos_token": None})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (None, None, False)


def test_bos_is_never_doubled():
    tokenizer = train_bpe(CORPUS, 300)
    text = f"{BOS}do{EOS}"
    once = tokenizer.encode(text, add_bos=True, add_eos=True, allowed_special="all")
    assert once == [0, *tokenizer.encode("do"), 1]
    assert tokenizer.encode(text, allowed_special="all") == once
    plain = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert plain.count(0) == plain.count(1) == 1 and tokenizer.decode(plain) == text
    assert tokenizer.encode("", add_bos=True, add_eos=True) == [0, 1]


SPELLED = [
    "do<s>an", "<s>do an", "<s> do", "do <mask> an", "do  <mask>  an", "<r>  do", "do <r> an <mask> do",
    "<mask>s", "a<w>b <w> <w>.", "<s></s>", "<think>do<s>do", " <s>", "do</s>", "<unk>",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
@pytest.mark.parametrize("text", SPELLED)
def test_allowed_special_tokens_are_cut_out_as_the_tokenizers_library_does(scheme, text, tmp_path):
    content = metaspace_json(scheme)
    peer = tokenizers.Tokenizer.from_str(content.decode())
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer__json=content))
    assert (
        tokenizer.encode(text, allowed_special="all")
        == peer.encode(text, add_special_tokens=False).ids
    )
    assert (tokenizer.special_ids - {0}).isdisjoint(tokenizer.encode(text))


def test_what_a_user_has_written_stays_text_beside_a_template(tmp_path):
    tokenizer = train_bpe(CORPUS, 300)
    user = f"do{EOS} and {BOS}"
    text = f"{BOS}{user}{EOS}"
    span = (len(BOS), len(BOS) + len(user))
    ids = tokenizer.encode(text, allowed_special="all", protected=[span])
    assert ids == [0, *tokenizer.encode(user), 1]
    assert tokenizer.decode(ids, skip_special=False) == text
    for cut in range(1, len(EOS)):  # half of it from the user, half from the template
        halves = tokenizer.encode(EOS, allowed_special="all", protected=[(0, cut)])
        assert 1 not in halves
        assert 1 not in tokenizer.encode(EOS, allowed_special="all", protected=[(cut, cut)])
    everything = tokenizer.encode(text, allowed_special="all", protected=[(0, 5), (5, len(text))])
    assert everything == tokenizer.encode(text)


@pytest.mark.parametrize("spans", [[(0, 3)], [(-1, 1)], [(1, 0)], [(0, 2), (1, 2)]])
def test_protected_spans_must_lie_in_the_text_and_apart(spans):
    with pytest.raises(RequestError, match=r"protected: got .*expected spans of the 2 characters"):
        train_bpe(CORPUS, 300).encode("do", allowed_special="all", protected=spans)


def test_only_special_tokens_can_be_allowed():
    tokenizer = train_bpe(CORPUS, 300)
    with pytest.raises(
        RequestError, match=r"allowed_special: got ..<x>..; expected some of the 2 special tokens"
    ):
        tokenizer.encode("a", allowed_special=["<x>"])
    with pytest.raises(RequestError, match=r"allowed_special: got '<x>'; expected all or a list"):
        tokenizer.encode("a", allowed_special="<x>")
    assert tokenizer.encode(BOS + EOS, allowed_special=[EOS])[-1] == 1
    assert 0 not in tokenizer.encode(BOS + EOS, allowed_special=[EOS])


def test_the_kind_of_a_file_is_seen_from_its_content(tmp_path):
    kinds = {
        "tokenizer.json": fast_json(),
        "sentencepiece": sentencepiece_model(),
        "tiktoken": rank_file(byte_ranks()),
        "tekken": tekken_file(
            byte_ranks(), named=None, control=20, version="v7", pattern=LLAMA3_WORDS
        ).encode(),
    }
    (tmp_path / "params.json").write_text(json.dumps({"vocab_size": 380 + 256}))
    for kind, content in kinds.items():
        (tmp_path / "anything").write_bytes(content)
        tokenizer = Tokenizer.load(tmp_path / "anything")
        assert tokenizer.format == kind
        for text in NASTY[:8]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        out = tmp_path / kind.replace(".", "_")
        tokenizer.save(out)  # under a name that is looked for
        write(out, params__json={"vocab_size": 380 + 256})
        assert Tokenizer.load(out).hash == tokenizer.hash


def test_of_several_files_one_is_taken_and_said(tmp_path, capsys):
    tekken = tekken_file(byte_ranks(), named=None, control=20, version="v3", pattern=LLAMA3_WORDS)
    model = sentencepiece_model()
    taken = []
    files = {
        "tokenizer__model": model,
        "tokenizer__model__v3": model,
        "tokenizer__model__v11": model,
    }
    for name, content in (files | {"tekken__json": tekken, "tokenizer__json": fast_json()}).items():
        tokenizer = Tokenizer.load(write(tmp_path, **{name: content}))
        taken.append(
            (tokenizer.format, tokenizer.version, capsys.readouterr().err.count("taken from"))
        )
    assert taken == [
        ("sentencepiece", None, 0),
        ("sentencepiece", "v3", 1),
        ("sentencepiece", "v11", 1),
        ("tekken", "v3", 1),
        ("tokenizer.json", None, 1),
    ]
    reset_notices()
    Tokenizer.load(tmp_path)
    said = capsys.readouterr().err
    assert (
        "taken from tokenizer.json; name the file to take tekken.json, tokenizer.model.v11" in said
    )
    assert Tokenizer.load(tmp_path / "tekken.json").format == "tekken"
    assert capsys.readouterr().err == ""


def test_a_saved_folder_keeps_what_the_config_says_beside_the_names(tmp_path):
    config = (
        '{"bos_token": "<|begin_of_text|>",   "chat_template": "{{ x }}", "model_max_length": 5}'
    )
    files = {
        "tokenizer__json": fast_json("bos"),
        "tokenizer_config__json": config,
        "chat_template__jinja": "{{ y }}",
    }
    where = write(tmp_path / "in", **files)
    tokenizer = Tokenizer.load(where)
    tokenizer.save(tmp_path / "out")
    for file in where.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert Tokenizer.load(tmp_path / "out").hash == tokenizer.hash
    tokenizer.save(tmp_path / "long", model_max_length=9)
    saved = json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())
    assert saved == json.loads(config) | {"model_max_length": 9}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config__json", "[]", "tokenizer_config.json: got 'list'"),
        ("tokenizer_config__json", "{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config__json", b"\xff", "tokenizer_config.json: not JSON"),
        ("tokenizer_config__json", {"add_bos_token": "yes"}, "add_bos_token: got 'yes'"),
        ("tokenizer_config__json", {"added_tokens_decoder": {"x": 1}}, "_decoder: x: got 1"),
        ("tokenizer_config__json", {"added_tokens_decoder": [1]}, r"_decoder: got \[1\]"),
        ("added_tokens__json", {"<x>": "y"}, "added_tokens.json: <x>: got 'y'"),
        ("added_tokens__json", {"<x>": 3}, "id of '<x>': got 3; expected an id of"),
        ("tekken__json", "{}", "tekken.json: expected the JSON of a fast tokenizer"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(name, content, message, tmp_path):
    write(tmp_path, tokenizer__model=sentencepiece_model())
    with pytest.raises(RequestError, match=message) as caught:
        Tokenizer.load(write(tmp_path, **{name: content}))
    assert "\n" not in str(caught.value)

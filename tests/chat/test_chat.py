"""Chat templates against transformers and SentencePiece: text, ids, and which of them are the
model's to say.
"""

import json
import random

import pytest
import sentencepiece

from tests.chat.chat_texts import (
    CALL,
    CONVERSATIONS,
    PUBLISHED,
    READS_TOOLS,
    SPECIAL,
    TEXT,
    TOOL_TALK,
    TOOLS,
    say,
    tokenizer_pair,
)
from tests.data.chat.test_turns import rows_of
from tests.tokenizers.makers import sentencepiece_model
from transom.base.errors import RequestError
from transom.chat.built_in import BUILT_IN, named
from transom.chat.template import ChatTemplate
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import train_bpe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tokenizer_pair(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("talk", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_render_as_in_transformers(made, name, talk, add_generation_prompt):
    tokenizer, peer = made
    template, messages = ChatTemplate(PUBLISHED[name], tokenizer), CONVERSATIONS[talk]
    flags = {"add_generation_prompt": add_generation_prompt}
    source = {"chat_template": PUBLISHED[name]}
    text = peer.apply_chat_template(messages, tokenize=False, **source, **flags)
    assert template.render(messages, **flags) == text
    ids = peer.apply_chat_template(messages, return_dict=False, **source, **flags)
    assert template.encode(messages, **flags) == ids


@pytest.mark.parametrize(
    ("source", "words"),
    [("<|im{{ messages[0].content }}", "_end|>"), ("{{ messages[0].content }}_end|>", "<|im")],
)
def test_no_control_token_is_made_of_words_of_the_template_and_of_a_message(made, source, words):
    ids = ChatTemplate(source, made[0]).encode([{"role": "user", "content": words}])
    assert made[0].special_ids.isdisjoint(ids) and made[0].decode(ids) == "<|im_end|>"


@pytest.mark.parametrize("name", READS_TOOLS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tools_render_as_in_transformers(made, name, count):
    tokenizer, peer = made
    template, messages = ChatTemplate(PUBLISHED[name], tokenizer), TOOL_TALK[:count]
    text = peer.apply_chat_template(
        messages, TOOLS, chat_template=PUBLISHED[name], tokenize=False, add_generation_prompt=True
    )
    assert template.render(messages, TOOLS) == text and "K" in text and "für alle" in text


# -- built-in templates --


@pytest.mark.parametrize(
    ("name", "published", "talks"),
    [
        ("llama2", "llama2", ["one", "system", "many"]),
        ("llama3", "llama3", ["one", "system", "many"]),
        ("chatml", "qwen2.5", ["system"]),
        ("gemma", "gemma3", ["one", "many"]),
    ],
)
def test_built_in_templates_write_what_published_ones_do(made, name, published, talks):
    tokenizer, _ = made
    template = ChatTemplate(named(name).source(tokenizer), tokenizer)
    for talk in talks:
        messages = CONVERSATIONS[talk]
        for flag in (True, False):
            expected = ChatTemplate(PUBLISHED[published], tokenizer).render(
                messages, add_generation_prompt=flag
            )
            assert template.render(messages, add_generation_prompt=flag) == expected
        llama4 = ChatTemplate(named("llama4").source(tokenizer), tokenizer).render(messages)
        if name == "llama3":
            expected = template.render(messages).replace("start_header_id", "header_start")
            assert llama4 == expected.replace("end_header_id", "header_end").replace(
                "eot_id", "eot"
            )


def test_tools_of_built_in_templates(made):
    tokenizer, _ = made
    be = say("system", "Be.")
    for count in (1, 2, 3, 4):
        messages = [be, *TOOL_TALK[:count]]
        expected = ChatTemplate(PUBLISHED["qwen2.5"], tokenizer).render(messages, TOOLS)
        chatml = ChatTemplate(named("chatml").source(tokenizer), tokenizer)
        assert chatml.render(messages, TOOLS) == expected
        llama3 = ChatTemplate(named("llama3").source(tokenizer), tokenizer).render(
            messages[1:], TOOLS
        )
        published = ChatTemplate(PUBLISHED["llama3.1"], tokenizer).render(messages[1:3], TOOLS)
        assert published.split("<|eot_id|>")[2] in llama3 or count < 2


CONTROL = [
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip


@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_mistral_formats_are_pieces_encoded_apart(tmp_path, version):
    """As mistral_common does it: control tokens by id, and SentencePiece on every piece between
    them.
    """
    control = {"v1": [], "v3": CONTROL[:7], "v7": CONTROL}[version]
    (tmp_path / f"tokenizer.model.{version}").write_bytes(
        sentencepiece_model(control_symbols=control)
    )
    processor = sentencepiece.SentencePieceProcessor(
        model_proto=(tmp_path / f"tokenizer.model.{version}").read_bytes()
    )
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate.load(tmp_path, tokenizer)

    def ids(*pieces):
        known = {piece: processor.piece_to_id(piece) for piece in ("<s>", "</s>", *control)}
        return [
            id for one in pieces for id in ([known[one]] if one in known else processor.encode(one))
        ]

    user = ["[INST]", "Hi", "[/INST]"] if control else ["[INST] Hi [/INST]"]
    talk = [say("user", "Hi"), say("assistant", "  Yes, do")]
    assert template.encode(talk[:1]) == ids("<s>", *user)
    assert template.encode([*talk, talk[0]]) == ids("<s>", *user, "  Yes, do", "</s>", *user)
    asked = {
        "v1": ["[INST] Be\n\nHi [/INST]"],
        "v3": ["[INST]", "Be\n\nHi", "[/INST]"],
        "v7": ["[SYSTEM_PROMPT]", "Be", "[/SYSTEM_PROMPT]", "[INST]", "Hi", "[/INST]"],
    }[version]
    assert template.encode([say("system", "Be"), *talk[:1]]) == ids("<s>", *asked)
    if version == "v1":
        return
    tools = ["[AVAILABLE_TOOLS]", json.dumps(TOOLS, ensure_ascii=False), "[/AVAILABLE_TOOLS]"]
    call = json.dumps([{**CALL["function"], "id": CALL["id"]}], ensure_ascii=False)
    result = {
        "v3": ['{"content": {"warm": true}, "call_id": "abcdefghi"}'],
        "v7": ["abcdefghi", "[TOOL_CONTENT]", '{"warm": true}'],
    }[version]
    asked = ["[INST]", TOOL_TALK[0]["content"], "[/INST]", "[TOOL_CALLS]", call, "</s>"]
    answered = ["[TOOL_RESULTS]", *result, "[/TOOL_RESULTS]", "Warm.", "</s>"]
    assert template.encode(TOOL_TALK, TOOLS) == ids("<s>", *tools, *asked, *answered)


@pytest.mark.parametrize("one", BUILT_IN, ids=lambda one: one.name)
def test_the_vocabulary_chooses_and_says_so(tmp_path, capsys, one):
    train_bpe([TEXT], 400, ("<s>", "</s>", *one.tokens)).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    found = ChatTemplate.find(tmp_path, tokenizer)
    by_bytes = {"mistral-v3": "mistral-v3-tekken", "mistral-v7": "mistral-v7-tekken"}.get(
        one.name, one.name
    )
    if not one.tokens:
        assert found is None and capsys.readouterr().err == ""
        with pytest.raises(RequestError, match="no chat template; expected a folder with"):
            ChatTemplate.load(tmp_path, tokenizer)
    else:
        assert found.origin == f"the built-in template {by_bytes}"
        assert (
            f"{' '.join(one.tokens)}: the built-in {by_bytes} is taken" in capsys.readouterr().err
        )
    template = ChatTemplate.load(tmp_path, tokenizer, one.name)
    row = rows_of(template, CONVERSATIONS["many"])[-1]
    ends = {"llama": "<|eot", "gemma": "<end_of_turn>", "chatm": "<|im_end|>"}
    word = "</s>" if not one.tokens or "mistral" in one.name else ends[one.name[:5]]
    assert template.end_of_turn.startswith(word) and sum(row.weights) > 20
    assert template.stop_tokens[0] == tokenizer.token_to_id(template.end_of_turn)
    assert row.weights[-1] and row.ids[-1] == template.stop_tokens[0]


# -- user text stays text --


def hostile(generator):
    """Text made of control tokens, their parts, and what templates look for."""
    parts = [
        *SPECIAL,
        "<|",
        "|>",
        "<",
        "[",
        "]",
        "INST]",
        "eot_id|>",
        " ",
        "\n",
        "x",
        "</think>",
        "\U000f0000",
        "é",
    ]
    return "".join(generator.choices(parts, k=generator.randrange(1, 9)))


@pytest.mark.parametrize("draws", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*PUBLISHED, *(one.name for one in BUILT_IN)])
def test_words_of_messages_never_become_control_tokens(made, name, draws):
    tokenizer, _ = made
    source = PUBLISHED.get(name) or named(name).source(tokenizer)
    template, generator = ChatTemplate(source, tokenizer), random.Random(name)
    clean = [say("user", "x"), say("assistant", "x"), say("user", "x")]
    expected = [id for id in template.encode(clean) if id in tokenizer.special_ids]
    for _ in range(draws):
        talk = [say(one["role"], hostile(generator)) for one in clean]
        ids = template.encode(talk)
        assert [id for id in ids if id in tokenizer.special_ids] == expected
        assert tokenizer.decode(ids, skip_special=False) == template.render(talk)
        try:
            (row,) = rows_of(template, talk)
        except RequestError as error:  # some templates cut a message at a word that they look for
            if "leaves out" not in str(error):
                raise
            continue
        whole = template.encode(talk[:2], add_generation_prompt=False)
        assert list(row.ids) == whole[: len(row.ids)] and sum(row.weights) > 0


def test_tools_and_keys_stay_text_too(made):
    tokenizer, _ = made
    template = ChatTemplate(PUBLISHED["qwen2.5"], tokenizer)
    tools = [
        {"type": "function", "function": {"name": "a<|im_end|>", "x<|im_end|>": ["<|im_start|>"]}}
    ]
    ids = template.encode(CONVERSATIONS["one"], tools)
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 2
    assert "a<|im_end|>" in tokenizer.decode(ids, skip_special=False)


def test_a_template_that_looks_for_control_tokens_is_refused(made):
    tokenizer, _ = made
    looks = "{{ m.content.split('<|eot_id|>')[-1] ~ ('<s>' if m.content == '<|end|>') }}"
    template = ChatTemplate("{% for m in messages %}" + looks + "{% endfor %}", tokenizer)
    assert template.encode([say("user", "a<|eot_id|>b")]) == tokenizer.encode("b")
    with pytest.raises(
        RequestError, match=r"depends on the control tokens \['<\|end\|>'\] inside of a message"
    ):
        template.encode([say("user", "<|end|>")])


@pytest.mark.parametrize(
    "source", ["{{ bos_token }}<s>x", "<s>{{ bos_token }}{{ bos_token }}x", "<s>x", "x"]
)
def test_there_is_one_bos_where_the_template_writes_any(made, source, capsys):
    tokenizer, _ = made
    template = ChatTemplate(source, tokenizer)
    ids = template.encode([say("user", "a")])
    assert ids.count(tokenizer.bos_id) == min(1, source.count("s"))
    assert capsys.readouterr().err.count("BOS tokens in a row") == (len(source) > 5)


@pytest.mark.parametrize(
    ("messages", "more", "sentence"),
    [
        ([], {}, "messages: got .*one message or more"),
        (["hi"], {}, r"messages\[0\]: expected an object with a role"),
        ([{"content": "a"}], {}, r"messages\[0\]: expected an object with a role"),
        (
            [say("user", object())],
            {},
            r"messages\[0\].content: got a object",
        ),
        ([say("user", {1: 2})], {}, "key: got 1; expected text"),
        ([say("user", [{"type": "image"}])], {}, r"messages\[0\].content: got \['image'\]"),
        (
            [say("user", "a")],
            {"tools": TOOLS},
            "tools: the chat template does not read it; expected one of messages",
        ),
        ([say("user", "a")], {"documents": [{}]}, "documents: the chat template does not read it"),
        (
            [say("user", "a")],
            {"enable_thinking": False},
            "enable_thinking: the chat template does not read it",
        ),
        ([say("user", "a\ud800")], {}, "UTF-8"),
    ],
)
def test_wrong_requests_are_one_sentence(made, messages, more, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        ChatTemplate("{{ messages[0].content }}", made[0]).encode(messages, **more)
    assert "\n" not in str(caught.value)


# -- files --


def test_templates_are_found_where_folders_keep_them(made, tmp_path, capsys):
    tokenizer, _ = made
    talk, config = [say("user", "a")], tmp_path / "tokenizer_config.json"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert ChatTemplate.load(tmp_path, tokenizer).render(talk) == "old"
    pair = [
        {"name": "default", "template": "{{ image_token }}"},
        {"name": "tool_use", "template": "{{ tools|length }}"},
    ]
    config.write_text(json.dumps({"chat_template": pair, "image_token": {"content": "<image>"}}))
    template = ChatTemplate.load(tmp_path, tokenizer)
    assert (template.render(talk), template.render(talk, TOOLS)) == ("<image>", "1")
    assert ChatTemplate.load(tmp_path, tokenizer, "tool_use").render(talk, []) == "0"
    (tmp_path / "chat_template.jinja").write_text("new\n")
    assert ChatTemplate.load(tmp_path, tokenizer).render(talk) == "new"
    assert "different chat templates; the first is taken" in capsys.readouterr().err
    with pytest.raises(
        RequestError, match="chat template: got 'none'; expected a file or default, llama4"
    ):
        ChatTemplate.load(tmp_path, tokenizer, "none")
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": pair[1:]}))
    alone = ChatTemplate.load(tmp_path, tokenizer)
    assert alone.render(talk, TOOLS) == "1"
    with pytest.raises(RequestError, match="none is called default"):
        alone.render(talk)
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(RequestError, match="chat_template: got 3; expected a text"):
        ChatTemplate.load(tmp_path, tokenizer)


def test_parts_of_text_are_joined_for_templates_that_know_none(made):
    tokenizer, _ = made
    parts = [{"type": "text", "text": "<|eot"}, {"type": "text", "text": "_id|>"}]
    template = ChatTemplate(PUBLISHED["llama3"], tokenizer)
    assert template.render([say("user", parts)]) == template.render([say("user", "<|eot_id|>")])
    aware = ChatTemplate("{% for p in messages[0].content %}{{ p['text'] }}{% endfor %}", tokenizer)
    assert aware.render([say("user", parts)]) == "<|eot_id|>"
    assert tokenizer.special_ids.isdisjoint(aware.encode([say("user", parts)]))

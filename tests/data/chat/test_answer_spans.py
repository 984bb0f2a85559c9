"""Answers where the prompt is no prefix, texts that templates leave out, calls in the form that
templates want.
"""

# ruff: noqa: RUF001 - the bars of DeepSeek's control tokens are wide ones
from __future__ import annotations

from typing import Any

import pytest

from tests.chat.chat_texts import CALL, PUBLISHED, TOOL_TALK, TOOLS, say, tokenizer_pair
from tests.data.chat.test_turns import rows_of, said
from transom.base.errors import RequestError
from transom.chat.built_in import named
from transom.chat.template import ChatTemplate
from transom.data.chat.conversations import ChatExample
from transom.data.chat.rows import ChatEncoder
from transom.data.chat.turns import Turns
from transom.tokenizers.tokenizer import Tokenizer

R1 = "deepseek-r1"
GREETED = [say("assistant", "Welcome here."), say("user", "Hi"), say("assistant", "Yes.")]
SPACED = '{"city": "Köln"}'
COMPACT = '{"city":"Köln"}'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    return tokenizer_pair(tmp_path_factory.mktemp("tokenizer"))


def template_of(made: Any, name: str) -> ChatTemplate:
    return ChatTemplate(PUBLISHED.get(name) or named(name).source(made[0]), made[0])


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("smollm2", "Yes.<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\nYes.<|im_end|>"),
        (R1, "Yes.<｜end▁of▁sentence｜>"),
        ("phi3", "Yes.<|end|>"),
        ("chatml", "Yes.<|im_end|>"),
    ],
)
def test_a_conversation_may_begin_with_the_assistant(made: Any, name: str, last: str) -> None:
    (row,) = rows_of(template_of(made, name), GREETED)
    first, second = said(made[0], row)
    assert first == "Welcome here." + last[last.index("Yes.") + 4 :] and second == last
    assert [answer.like_prompt for answer in row.answers] == [False, name != R1]
    whole = made[1].apply_chat_template(
        GREETED, chat_template=template_of(made, name).sources["default"]
    )
    assert row.ids.tolist() == whole["input_ids"][: len(row.ids)]


def test_the_end_of_a_call_is_known_from_the_stop_tokens_of_the_model(made: Any) -> None:
    tokenizer = made[0].with_special(["<|call|>"])
    template = ChatTemplate(PUBLISHED["gpt-oss"], tokenizer)
    talk = [ChatExample("1", "chat", TOOL_TALK[:2])]
    stop = tokenizer.special_tokens["<|call|>"]
    for stop_tokens, without in (((), 1), ((stop,), 0)):
        encoded = ChatEncoder(tokenizer, template, 999, stop_tokens=stop_tokens).encode(talk)
        assert encoded.counts["without_end"] == without and encoded.items[0][0].ids[-1] == stop


def test_words_that_only_the_prompt_has_are_no_part_of_an_answer(
    made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSeek-R1 asks with `<think>` and writes answers without it, and what was thought not at
    all.
    """
    talk = [
        say("user", "a"),
        say("assistant", "<think>\nhm so\n</think>\n\n<table>"),
        say("user", "b"),
    ]
    talk += [say("assistant", "<x>")]
    turns = Turns(template_of(made, R1), made[0])
    (row,) = turns.rows(talk, None, [0, 1, 0, 1])
    assert said(made[0], row) == ["\n\n<table><｜end▁of▁sentence｜>", "<x><｜end▁of▁sentence｜>"]
    assert [answer.like_prompt for answer in row.answers] == [False, False]
    assert turns.left_out == 1
    assert "leaves out: a part of content of assistant" in capsys.readouterr().err


def test_a_head_of_an_answer_that_a_message_spells_is_not_taken_for_one(made: Any) -> None:
    head = "<｜Assistant｜>"
    talk = [say("user", f"x {head}y"), say("assistant", f"said {head} so")]
    (row,) = rows_of(template_of(made, R1), talk)
    assert said(made[0], row) == [f"said {head} so<｜end▁of▁sentence｜>"]


def test_a_block_of_an_earlier_answer_is_not_taken_for_a_later_one(made: Any) -> None:
    """Mistral's system text moves with the last question, so every answer is in a row of its own."""
    template = template_of(made, "mistral-v3-tekken")
    talk = [say(("user", "assistant")[at % 2], f"Words {at}.") for at in range(6)]
    rows = rows_of(template, [say("system", "Be brief."), *talk])
    assert [said(made[0], row) for row in rows] == [[f"Words {at}.</s>"] for at in (1, 3, 5)]
    assert all(answer.like_prompt for row in rows for answer in row.answers)


# -- what templates leave out
# ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "talk", "words"),
    [
        (
            R1,
            [say("user", "a"), say("assistant", "x", reasoning_content="hm")],
            "1.*reasoning_content of assistant: 'hm'",
        ),
        (
            "smollm2",
            [say("user", "a"), say("assistant", "x", thinking="hm")],
            "1.*reasoning_content of assistant: 'hm'",
        ),
        (
            R1,
            [say("user", "a"), say("assistant", "<think>hm</think>")],
            "1.*content of assistant: '<think>hm",
        ),
        ("smollm2", TOOL_TALK, "1.*tool_calls of assistant: 'weather'"),
        (
            "mistral-v3",
            [say("system", "Be"), say("user", "a"), say("assistant", "x")],
            "0.*content of system: 'Be'",
        ),
    ],
)
def test_words_that_are_in_no_row_are_refused(made: Any, name: str, talk: Any, words: str) -> None:
    with pytest.raises(
        RequestError, match=rf"messages\[{words}".replace(".*", r"\]: .* leaves out .*", 1)
    ):
        rows_of(template_of(made, name), talk)


def test_a_system_text_a_result_and_a_tool_are_refused_too(made: Any) -> None:
    body = (
        "{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}{{ m.role + "
        "m.content }}<|end|>"
    )
    template = ChatTemplate(
        body + "{% endif %}{% endfor %}{{ 'assistant' if add_generation_prompt }}{% if tools %}{% "
        "endif %}",
        made[0],
    )
    plain = [say("user", "q"), say("assistant", "a")]
    for talk, tools, what in (
        ([say("system", "Be brief"), *plain], None, r"messages\[0\]: .* content of .*: 'Be brief'"),
        (
            [*plain, say("tool", "warm"), say("assistant", "x")],
            None,
            r"messages\[2\]: .* content of .*: 'warm'",
        ),
        (plain, TOOLS, r"tools\[0\]: .* name of tools: 'weather'"),
    ):
        with pytest.raises(RequestError, match=what):
            rows_of(template, talk, tools)


def test_reasoning_of_earlier_turns_and_names_are_counted(
    made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = (
        say("user", "a", name="Ann"),
        say("assistant", "x", reasoning_content="hm so"),
        say("user", "b", name="Ann"),
        say("assistant", "<think>\nok then\n</think>\n\ny"),
        say("user", "c"),
        say("assistant", "z"),
    )
    made_rows = ChatEncoder(made[0], template_of(made, "qwen3"), 999).encode(
        [ChatExample("1", "chat", talk)]
    )
    assert (
        made_rows.counts["dropped_reasoning"] == 3
    )  # the first text in two later rows, the second in one
    assert made_rows.counts["left_out"] == 2 and made_rows.counts["split_rows"] == 2
    assert "leaves out: name of user" in capsys.readouterr().err
    assert "3 reasoning texts that the template drops" in str(made_rows)


@pytest.mark.parametrize("ascii", [True, False])
def test_texts_are_found_however_they_are_written(made: Any, ascii: bool) -> None:
    body = (
        "{% for m in messages %}{{ m.role }}{{ m.content|tojson(ensure_ascii=FLAG) }}<|end|>{% "
        "endfor %}"
    )
    body, ask = (
        body.replace("FLAG", str(ascii)),
        '{% if add_generation_prompt %}assistant"{% endif %}',
    )
    talk = [say("user", 'Größe "1"'), say("assistant", "世界 <|end|>")]
    turns = Turns(ChatTemplate(body + ask, made[0]), made[0])
    (row,) = turns.rows(talk, None, [0, 1])
    assert not turns.left_out and said(made[0], row)[0].endswith('"<|end|>')


def test_marks_that_change_what_a_template_writes_are_not_trusted(made: Any) -> None:
    body = (
        "{% for m in messages %}{{ m.role }}{{ 'long' if m.content|length > 3 else m.content "
        "}}<|end|>{% endfor %}"
    )
    template = ChatTemplate(body + "{{ 'assistant' if add_generation_prompt }}", made[0])
    (row,) = rows_of(template, [say("user", "abc"), say("assistant", "def")])
    assert said(made[0], row) == ["def<|end|>"]
    with pytest.raises(RequestError, match=r"messages\[0\]: .* content of .*: 'abcd'"):
        rows_of(template, [say("user", "abcd"), say("assistant", "def")])


# -- calls of tools
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["null", "missing", "empty"])
@pytest.mark.parametrize("arguments", [CALL["function"]["arguments"], SPACED])
@pytest.mark.parametrize("name", ["llama3.1", "qwen2.5", "mistral-v3", R1])
def test_calls_are_written_in_the_form_of_their_makers(
    made: Any, name: str, arguments: Any, content: str
) -> None:
    """Llama, Qwen and Mistral are given objects, DeepSeek JSON as text, and a content that is
    empty.
    """
    form: Any = SPACED if name == R1 else CALL["function"]["arguments"]
    said_nothing = {"null": {"content": None}, "missing": {}, "empty": {"content": ""}}[content]

    def talk(given: Any, nothing: Any) -> list[dict[str, Any]]:
        call = {**CALL, "function": {"name": "weather", "arguments": given}}
        return [
            TOOL_TALK[0],
            {"role": "assistant", **nothing, "tool_calls": [call]},
            *TOOL_TALK[2:],
        ]

    theirs = talk(form, {"content": ""} if name == R1 else said_nothing)
    expected = made[1].apply_chat_template(theirs, chat_template=PUBLISHED[name], tokenize=False)
    assert template_of(made, name).render(talk(arguments, said_nothing), None, False) == expected


def test_a_text_stays_as_it_is_where_the_template_writes_texts(made: Any) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": COMPACT}}
    talk = [TOOL_TALK[0], {"role": "assistant", "tool_calls": [call]}]
    both = "{% set a = c.function.arguments %}{{ a if a is string else a|tojson }}"
    calls = "{%% for c in m.tool_calls or [] %%}{{ c.function.name }}%s{%% endfor %%}"
    body = "{%% for m in messages %%}" + calls + "{%% endfor %%}"
    assert ChatTemplate(body % both, made[0]).render(talk) == f"weather{COMPACT}"
    assert (
        ChatTemplate(body % "{{ c.function.arguments }}", made[0]).render(talk)
        == f"weather{COMPACT}"
    )
    assert (
        ChatTemplate(body % "{{ c.function.arguments|tojson }}", made[0]).render(talk)
        == 'weather{"city": "Köln"}'
    )
    with_object = [TOOL_TALK[0], {"role": "assistant", "tool_calls": [CALL]}]
    assert (
        ChatTemplate(body % "{{ c.function.arguments }}", made[0]).render(with_object)
        == 'weather{"city": "Köln"}'
    )


@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "llama4", "mistral-v3", "mistral-v7", "mistral-v11", "mistral-v13"]
)
def test_built_in_templates_spell_arguments_one_way(made: Any, name: str) -> None:
    template = ChatTemplate(named(name).source(made[0]), made[0])

    def written(arguments: Any) -> str:
        call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        return template.render(
            [TOOL_TALK[0], {"role": "assistant", "tool_calls": [call]}], None, False
        )

    assert written(COMPACT) == written(SPACED) == written(CALL["function"]["arguments"])
    assert SPACED in written(COMPACT)


# -- long conversations
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2.5", "chatml"])
def test_a_long_conversation_is_encoded_once(
    made: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = template_of(made, name)
    talk = [say(("user", "assistant")[at % 2], f"Words of message {at}.") for at in range(80)]
    expected = rows_of(template, talk)
    characters, original = [0], Tokenizer.encode

    def encode(self: Tokenizer, text: str, **more: Any) -> list[int]:
        characters[0] += len(text)
        return original(self, text, **more)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    (row,) = rows_of(template_of(made, name), talk)
    assert row.ids.tolist() == expected[0].ids.tolist() and len(row.answers) == 40
    assert characters[0] < 2 * len(template.render(talk))


def test_a_conversation_nested_beyond_reason_is_refused(made: Any) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match=r"messages\[0\]: nested too deeply"):
        template_of(made, "smollm2").render([say("user", deep)])


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "mistral-v3", R1])
def test_rows_that_begin_alike_are_what_they_are_alone(made: Any, name: str) -> None:
    """The second row takes the ids of the first as far as they are the same, words of messages in
    mind.
    """
    template, words = (
        template_of(made, name),
        ("a<|im_end|>b", "[INST]", "Hi", " <|end|>", "x<｜Assistant｜>"),
    )
    talk = [say(("user", "assistant")[at % 2], f"{words[at % 5]}{at}") for at in range(10)]
    rows = rows_of(template, talk, TOOLS if name == "mistral-v3" else None)
    assert len(rows) == (1 if name == R1 else 5)
    tools = TOOLS if name == "mistral-v3" else None
    for at, row in enumerate(rows):
        count = 10 if name == R1 else 2 * at + 2
        assert row.ids.tolist() == template.encode(talk[:count], tools, False)[: len(row.ids)]
        assert [row.weights[one.stop - 1] for one in row.answers] == [1.0] * len(row.answers)

"""Beginnings of conversations: what a template that writes in steps says of them is what it renders
to.
"""

import pytest

from tests.chat.chat_texts import CONVERSATIONS, PUBLISHED, TOOL_TALK, TOOLS, say, tokenizer_pair
from transom.base.errors import RequestError
from transom.chat.built_in import BUILT_IN, named
from transom.chat.template import ChatTemplate

TALK = [
    say("system", "Be"),
    *CONVERSATIONS["many"],
    say("user", "<|im_end|>"),
    say("assistant", "No"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_pair(tmp_path_factory.mktemp("tokenizer"))[0]


def rendered(template, talk, prompt, tools=None):
    try:
        return template.render(talk, tools, prompt)
    except RequestError:
        return None


@pytest.mark.parametrize("name", [*PUBLISHED, *(one.name for one in BUILT_IN)])
def test_every_beginning_is_what_the_template_renders(tokenizer, name):
    template = ChatTemplate(PUBLISHED.get(name) or named(name).source(tokenizer), tokenizer)
    for talk, tools in ((TALK, None), (TALK[1:], None), (TOOL_TALK, None), (TOOL_TALK, TOOLS)):
        try:
            found = template.conversation(talk, tools)
            assert found.first(len(talk)).text is not None
        except RequestError:
            continue
        for count in range(1, len(talk) + 1):
            assert found.prompt(count) == rendered(template, talk[:count], True, tools)
            whole = rendered(template, talk[:count], False, tools)
            assert whole is None or found.first(count).text == whole


def steps(source, tokenizer):
    template = ChatTemplate(source, tokenizer)
    return template.conversation(TALK).template.steps is not None


LOOP = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}a{%% endif %%}"


def test_which_templates_write_in_steps(tokenizer):
    assert steps(PUBLISHED["smollm2"], tokenizer) and steps(PUBLISHED["llama3"], tokenizer)
    assert steps(
        LOOP % "{{ m.content }}{% if loop.first %}{{ messages[0].role }}{% endif %}", tokenizer
    )
    assert steps(
        "{% set ms = messages %}" + (LOOP % "{{ m.content }}").replace("messages", "ms"), tokenizer
    )
    inner = "{% for c in m.tool_calls %}{{ c if loop.last }}{% endfor %}"
    assert steps(LOOP % inner, tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        LOOP % "{{ m.content if loop.last }}",
        LOOP % "{{ m.content if messages|length > 2 }}",
        LOOP % "{{ messages[loop.index0 - 1].role }}",
        LOOP % "{{ messages[-1].role }}",
        LOOP % "{{ 'x' if add_generation_prompt }}",
        LOOP % "{% for c in m.content[loop.length:] %}{{ c }}{% endfor %}",
        "{% set ns = namespace(x=0) %}" + LOOP % "{% set ns.x = ns.x + 1 %}" + "{{ ns.x }}",
        "{% set j = joiner() %}" + LOOP % "{{ j() }}" + "{{ j() }}",
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        LOOP % "{{ m.content }}" + LOOP % "{{ m.role }}",
        "{% set ms = messages %}{% set ms = messages[1:] %}{% for m in ms %}{{ m.content }}{% "
        "endfor %}",
    ],
)
def test_what_depends_on_later_messages_is_no_step(tokenizer, source):
    assert not steps(source, tokenizer)
    template = ChatTemplate(source, tokenizer)
    found = template.conversation(TALK)
    assert [found.first(n).text for n in (1, 2, 3)] == [
        template.render(TALK[:n], None, False) for n in (1, 2, 3)
    ]


def test_beginnings_without_a_message_that_the_template_reads_are_rendered_anew(tokenizer):
    source = LOOP % "{{ messages[2].role if messages[2] }}{{ m.content }}"
    template = ChatTemplate(source, tokenizer)
    assert steps(source, tokenizer)
    found = template.conversation(TALK)
    assert [found.first(n).text for n in (1, 2, 3)] == [
        template.render(TALK[:n], None, False) for n in (1, 2, 3)
    ]


def test_a_loop_that_ends_early_is_rendered_anew(tokenizer):
    template = ChatTemplate(
        LOOP % "{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}", tokenizer
    )
    found = template.conversation(TALK)
    assert found.first(5).text == template.render(TALK[:5], None, False)
    assert found.prompt(1) == template.render(TALK[:1])

"""Beginnings of conversations: their texts and prompts are those that the template renders."""

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
            assert found.text is not None
        except RequestError:
            continue
        for at, (first, prompt) in enumerate(found.answers(range(len(talk)))):
            assert prompt == (rendered(template, talk[:at], True, tools) if at else "")
            whole = rendered(template, talk[: at + 1], False, tools)
            assert whole is None or first.text == whole

"""Mistral's chat formats of tekken files: pieces encoded apart, as mistral_common does where it is
installed.
"""

import json

import pytest

from tests.chat.chat_texts import CALL, CONVERSATIONS, TOOL_TALK, TOOLS, say
from tests.tokenizers.makers import byte_ranks, tekken_file, write
from transom.base.errors import RequestError
from transom.chat.template import ChatTemplate
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer

PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]",
]  # fmt: skip
THINK = ["[THINK]", "[/THINK]"]
# Arguments that come as text are written as they are; mistral_common would spell them anew.
CLOCK = '{"at": "Köln", "in": [1]}'
TWO = {**CALL, "id": "jklmnopqr", "function": {"name": "clock", "arguments": CLOCK}}
TALKS = {
    "question": [say("user", "Hi there")],
    "brief": [
        say("system", "Be brief."),
        say("user", "Hi"),
        say("assistant", "Yes, do  "),
        say("user", "Why?"),
    ],
    "call": [say("system", "Be."), *TOOL_TALK[:2]],
    "answered": TOOL_TALK,
    "asked again": [*TOOL_TALK, say("user", "And now?")],
    "two calls": [
        say("user", "Weather?"),
        {"role": "assistant", "content": "Both.", "tool_calls": [CALL, TWO]},
        say("tool", '{"warm": true}', tool_call_id="abcdefghi", name="weather"),
        say("tool", "noon", tool_call_id="jklmnopqr", name="clock"),
        say("assistant", "Warm at noon."),
    ],
}
NEEDS_CALLS = ("call", "answered", "asked again", "two calls")


def folder_with(path, version, control=CONTROL):
    ranks = byte_ranks()
    return write(
        path,
        tekken__json=tekken_file(
            ranks, named=control, control=len(control) + 4, version=version, pattern=PATTERN
        ),
    )


@pytest.fixture(scope="module", params=["v7", "v11", "v13"])
def made(request, tmp_path_factory):
    folder = folder_with(tmp_path_factory.mktemp("tekken"), request.param, CONTROL + THINK)
    tokenizer = Tokenizer.load(folder)
    return request.param, folder, tokenizer, ChatTemplate.load(folder, tokenizer)


def ids_of(tokenizer, pieces):
    known = tokenizer.special_tokens
    return [
        id for one in pieces for id in ([known[one]] if one in known else tokenizer.encode(one))
    ]


def test_calls_and_results(made):
    version, _, tokenizer, template = made
    first, second = (
        {"name": "weather", "arguments": {"city": "Köln"}},
        {"name": "clock", "arguments": json.loads(CLOCK)},
    )
    whole = [{**first, "id": "abcdefghi"}, {**second, "id": "jklmnopqr"}]
    calls = {
        "v7": ["[TOOL_CALLS]", json.dumps(whole, ensure_ascii=False)],
        "v11": [
            *("[TOOL_CALLS]", "weather", "[CALL_ID]", "abcdefghi", "[ARGS]", '{"city": "Köln"}'),
            *("[TOOL_CALLS]", "clock", "[CALL_ID]", "jklmnopqr", "[ARGS]", CLOCK),
        ],
        "v13": [
            "[TOOL_CALLS]",
            "weather",
            "[ARGS]",
            '{"city": "Köln"}',
            "[TOOL_CALLS]",
            "clock",
            "[ARGS]",
            CLOCK,
        ],
    }[version]
    ids = {"v13": ([], [])}.get(
        version, (["abcdefghi", "[TOOL_CONTENT]"], ["jklmnopqr", "[TOOL_CONTENT]"])
    )
    warm = ["[TOOL_RESULTS]", *ids[0], '{"warm": true}', "[/TOOL_RESULTS]"]
    noon = ["[TOOL_RESULTS]", *ids[1], "noon", "[/TOOL_RESULTS]"]
    asked = ["<s>", "[INST]", "Weather?", "[/INST]", "Both.", *calls, "</s>"]
    expected = ids_of(tokenizer, [*asked, *warm, *noon, "Warm at noon.", "</s>"])
    assert template.encode(TALKS["two calls"]) == expected


def test_tools_stand_before_the_last_question_and_from_v13_on_before_the_first(made):
    version, _, tokenizer, template = made
    turns = ["[INST]", "a", "[/INST]", "b", "</s>", "[INST]", "c", "[/INST]"]
    tools = ["[AVAILABLE_TOOLS]", json.dumps(TOOLS, ensure_ascii=False), "[/AVAILABLE_TOOLS]"]
    at = 0 if version == "v13" else 5
    expected = ["<s>", *turns[:at], *tools, *turns[at:]]
    talk = [say("user", "a"), say("assistant", "b"), say("user", "c")]
    assert template.encode(talk, TOOLS) == ids_of(tokenizer, expected)


def test_reasoning_is_written_where_the_vocabulary_has_its_tokens(tmp_path):
    talk = [say("user", "a"), say("assistant", "b ", reasoning_content="hm"), say("user", "c")]
    tokenizer = Tokenizer.load(folder_with(tmp_path / "with", "v13", CONTROL + THINK))
    ids = ChatTemplate.load(tmp_path / "with", tokenizer).encode(talk)
    turn = ["[THINK]", "hm", "[/THINK]", "b ", "</s>"]
    assert ids == ids_of(
        tokenizer, ["<s>", "[INST]", "a", "[/INST]", *turn, "[INST]", "c", "[/INST]"]
    )
    tokenizer = Tokenizer.load(folder_with(tmp_path / "without", "v13"))
    with pytest.raises(RequestError, match=r"no \[THINK\] to write reasoning in"):
        ChatTemplate.load(tmp_path / "without", tokenizer).encode(talk)


def test_a_format_without_ids_wants_results_in_the_order_of_calls(made):
    version, _, _, template = made
    talk = TALKS["two calls"]
    swapped = [*talk[:2], talk[3], talk[2], talk[4]]
    if version == "v13":
        for wrong in (swapped, [*talk[:4], talk[3]], [talk[0], talk[2]]):
            with pytest.raises(RequestError, match="each tool message answers the next call"):
                template.encode(wrong)
    else:
        assert template.encode(swapped) != template.encode(talk)


@pytest.mark.parametrize("version", ["v15", "v99", None])
def test_a_format_that_is_not_built_in_is_refused_by_name(tmp_path, version):
    if version is None:  # only the control tokens tell
        tokenizer = byte_tokenizer(("<s>", "</s>", *CONTROL[3:], *THINK, "[MODEL_SETTINGS]"))
    else:
        tokenizer = Tokenizer.load(folder_with(tmp_path, version))
    with pytest.raises(
        RequestError, match=f"chat format {version or 'v15'}: expected v1 to v7, v11 or v13"
    ):
        ChatTemplate.find(tmp_path, tokenizer)
    assert ChatTemplate.find(tmp_path, tokenizer, "mistral-v7-tekken") is not None


@pytest.mark.parametrize("talk", [*TALKS, *CONVERSATIONS])
def test_ids_of_mistral_common(made, talk):
    pytest.importorskip("mistral_common", reason="a peer, which make test-all installs")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    _, folder, _, template = made
    messages, tools = {**TALKS, **CONVERSATIONS}[talk], TOOLS if talk in NEEDS_CALLS else None
    peer = MistralTokenizer.from_file(str(folder / "tekken.json"), mode=ValidationMode.agnostic)
    request = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
    assert template.encode(messages, tools) == peer.encode_chat_completion(request).tokens

"""Writes mistral_chats.json: what mistral_common makes of conversations, in pieces, for every chat
format.

    pip install mistral_common && python tests/chat/make_mistral_chats.py

A piece is a control token or the text between two of them, which mistral_common encodes apart.
"""

import json
import logging
import tempfile
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

HERE = Path(__file__).parent
DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
CONTROL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]",
    "[/THINK]",
]  # fmt: skip


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, id):
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather: <hot> & cold, für alle",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
ASKED = say("user", "Weather in Köln?")
FIRST, SECOND = (
    call("weather", '{"city":"Köln"}', "abcdefghi"),
    call("clock", '{"at": [1,2.50],"b":null}', "jklmnopqr"),
)
CALLED = {"role": "assistant", "tool_calls": [FIRST]}


def answered(result, id="abcdefghi", name="weather"):
    return say("tool", result, tool_call_id=id, name=name)


TALKS = {
    "question": [say("user", "Hi there")],
    "turns": [say("user", "Hi"), say("assistant", "Yes, do  "), say("user", "Why?")],
    "system": [say("system", "Be brief."), say("user", "Hi"), say("assistant", "Yes."), say("user", "Why?")],
    "system later": [say("user", "Hi"), say("assistant", "Yes."), say("system", "Be brief."), say("user", "Why?")],
    "two systems": [say("system", "Be brief."), say("system", "Be kind."), say("user", "Hi")],
    "system first and later": [
        say("system", "Be brief."), say("user", "Hi"), say("assistant", "Yes."), say("system", "Be kind."),
        say("user", "Why?"),
    ],
    "system between questions": [say("user", "Hi"), say("system", "Be brief."), say("user", "Why?")],
    "two questions": [say("user", "Hi"), say("user", "Why?")],
    "two answers": [say("user", "Hi"), say("assistant", "Yes."), say("assistant", "No."), say("user", "Why?")],
    "call": [ASKED, CALLED],
    "call of an object": [
        ASKED, {"role": "assistant", "tool_calls": [call("weather", {"city": "Köln"}, "abcdefghi")]}
    ],
    "call of no json": [ASKED, {"role": "assistant", "tool_calls": [call("weather", "Köln?", "abcdefghi")]}],
    "result of json": [ASKED, CALLED, answered('{"warm":true,"at": 1.0,"ü":"\\u00fc"}')],
    "result of text": [ASKED, CALLED, answered('It is "warm" in Köln')],
    "result of a number": [ASKED, CALLED, answered("12")],
    "result of broken json": [ASKED, CALLED, answered('{"warm": tru')],
    "answered": [ASKED, CALLED, answered("warm"), say("assistant", "Warm.")],
    "asked again": [ASKED, CALLED, answered("warm"), say("assistant", "Warm."), say("user", "And now?")],
    "two calls": [
        ASKED, {"role": "assistant", "tool_calls": [FIRST, SECOND]}, answered("warm"),
        answered("noon", "jklmnopqr", "clock"), say("assistant", "Warm at noon."),
    ],
    "words and a call": [ASKED, {"role": "assistant", "content": "Let me look.", "tool_calls": [FIRST]}],
    "system and tools": [say("system", "Be brief."), ASKED, CALLED, answered("warm")],
    "question after a result": [ASKED, CALLED, answered("warm"), say("user", "And?")],
}  # fmt: skip


def tekken(folder, version):
    """A published vocabulary with the control tokens and the version of another format."""
    data = json.loads((DATA / "tekken_240911.json").read_text())
    count = data["config"]["default_num_special_tokens"]
    names = [*CONTROL, *(f"<SPECIAL_{at}>" for at in range(len(CONTROL), count))]
    data["config"]["version"] = version
    data["special_tokens"] = [
        {"rank": at, "token_str": one, "is_control": True} for at, one in enumerate(names)
    ]
    file = folder / f"tekken_{version}.json"
    file.write_text(json.dumps(data))
    return file


def pieces(tokenizer, ids):
    """Control tokens and the texts between them."""
    inner = tokenizer.instruct_tokenizer.tokenizer
    out, held = [], []
    for id in [*ids, None]:
        word = None if id is None else inner.id_to_piece(id)
        if id is None or word in CONTROL:
            out += [inner.decode(held)] if held else []
            out, held = [*out, *([] if word is None else [word])], []
        else:
            held.append(id)
    return out


def main():
    logging.disable(logging.WARNING)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        files = {version: DATA / name for version, name in SENTENCEPIECE.items()}
        files |= {f"{one}-tekken": tekken(Path(scratch), one) for one in ("v3", "v7", "v11", "v13")}
        for version, file in files.items():
            peer = MistralTokenizer.from_file(str(file), mode=ValidationMode.agnostic)
            found[version] = {}
            for name, messages in TALKS.items():
                tools = (
                    TOOLS
                    if any(one["role"] == "tool" or "tool_calls" in one for one in messages)
                    else None
                )
                try:
                    request = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
                    found[version][name] = pieces(peer, peer.encode_chat_completion(request).tokens)
                except Exception as error:
                    found[version][name] = None
                    logging.error(
                        "%s, %s: refused (%s: %s)", version, name, type(error).__name__, error
                    )
    data = {
        "mistral_common": mistral_common.__version__,
        "tools": TOOLS,
        "talks": TALKS,
        "pieces": found,
    }
    (HERE / "mistral_chats.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()

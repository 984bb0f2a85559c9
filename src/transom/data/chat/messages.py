"""Messages, tools and weights in the rows of data sets, checked and as plain data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transom.base.errors import expect
from transom.data.file_formats import parse_json

Message = dict[str, Any]
Messages = tuple[Message, ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = (
    *("role", "content", "name", "weight", "tool_calls", "tool_call_id"),
    *("reasoning_content", "thinking", "reasoning"),
)


def messages_of(value: Any, name: str) -> Messages:
    """Return the messages of a row without their null fields.

    Contents are text or lists of parts. The arguments of tool calls are objects, or JSON text.

    Args:
        value: A list of messages, or one as JSON text.
        name: The field that an error names.

    Raises:
        RequestError: A message has no known role, no content, or malformed tool calls.
    """
    value = from_json(value)
    expect(isinstance(value, list) and len(value) > 0, name, value, "a list of one message or more")
    return tuple(_message(one, f"{name}[{at}]") for at, one in enumerate(value))


def _message(value: Any, name: str) -> Message:
    expect(isinstance(value, dict), name, value, "an object with a role and a content")
    out = {key: one for key, one in value.items() if one is not None}
    role, content, calls = out.get("role"), out.get("content"), from_json(out.pop("tool_calls", []))
    expect(role in ROLES, f"{name}.role", role, f"one of {', '.join(ROLES)}")
    answers = role == "assistant"
    if "weight" in out:
        expected = f"none in a message of {role}, only in those of the assistant"
        expect(answers, f"{name}.weight", out["weight"], expected)
        out["weight"] = weight_of(out, f"{name}.weight")
    fits = isinstance(calls, list) and (answers or not calls)
    expect(fits, f"{name}.tool_calls", calls, "a list, in messages of the assistant")
    if calls:
        numbered = enumerate(calls)
        out["tool_calls"] = [_call(call, f"{name}.tool_calls[{at}]") for at, call in numbered]
    if content is None and calls:
        return out  # each template has its own way to write an empty content
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [
        one.get("text")
        for one in parts
        if isinstance(one, dict) and one.get("type", "text") == "text"
    ]
    fits = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    expect(fits, f"{name}.content", content, "text, or a list of parts of text")
    expected = "text or tool_calls in an answer"
    written = any(str(text).strip() for text in texts)
    expect(written or bool(calls) or not answers, f"{name}.content", content, expected)
    return out


def _call(call: Any, name: str) -> Any:
    """Return a tool call whose arguments are an object, or an object as JSON text (OpenAI)."""
    function = call.get("function") if isinstance(call, dict) else None
    fits = isinstance(function, dict) and isinstance(function.get("name"), str)
    expect(fits, name, call, "an object with a function, which has a name and arguments")
    assert isinstance(function, dict), "just checked"
    given = function.get("arguments")
    arguments = {} if given is None or given == "" else given
    expected = "an object, or one as JSON"
    expect(isinstance(from_json(arguments), dict), f"{name}.function.arguments", given, expected)
    return {**call, "function": {**function, "arguments": arguments}}


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """Return the tools of a row, or None if it has none."""
    tools = from_json(row.get("tools") or None)
    objects = isinstance(tools, list) and all(isinstance(one, dict) for one in tools)
    expect(tools is None or objects, "tools", row.get("tools"), "a list of objects, or one as JSON")
    return tuple(tools) if tools else None


def weight_of(row: Mapping[str, Any], name: str = "weight") -> float:
    """Return the loss weight of a row or a message, by default 1."""
    value = 1.0 if row.get("weight") is None else row["weight"]
    fits = type(value) in (int, float) and 0 <= value <= sys.float_info.max
    expect(fits, name, value, "a number of 0 or more")
    return float(value)


def from_json(value: Any) -> Any:
    """Return the list or object in a JSON text, as tables store them; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(ValueError):
            return parse_json(value)
    return value

"""Messages, tools and weights in the rows of data sets, checked and as plain data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transom.base.errors import require
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
    value = listed(value)
    expected = "expected a list of one message or more"
    require(isinstance(value, list) and len(value) > 0, name, value, expected)
    return tuple(_message(one, f"{name}[{at}]") for at, one in enumerate(value))


def _message(value: Any, name: str) -> Message:
    require(isinstance(value, dict), name, value, "expected an object with a role and a content")
    out = {key: one for key, one in value.items() if one is not None}
    role, content = out.get("role"), out.get("content")
    require(role in ROLES, f"{name}.role", role, f"expected one of {', '.join(ROLES)}")
    answers = role == "assistant"
    if "weight" in out:
        expected = f"expected none in a message of {role}, only in those of the assistant"
        require(answers, f"{name}.weight", out["weight"], expected)
        out["weight"] = weight_of(out, f"{name}.weight")
    if "tool_calls" in out:
        calls = listed(out["tool_calls"])
        fits = answers and isinstance(calls, list)
        require(fits, f"{name}.tool_calls", calls, "expected a list, in messages of the assistant")
        made = [_call(call, f"{name}.tool_calls[{at}]") for at, call in enumerate(calls)]
        out["tool_calls"] = made
        if not made:
            del out["tool_calls"]
    if content is None and "tool_calls" in out:
        return out  # each template has its own way to write an empty content
    parts = isinstance(content, list) and all(isinstance(one, dict) for one in content)
    require(isinstance(content, str) or parts, f"{name}.content", content, "expected text")
    empty = not (content.strip() if isinstance(content, str) else content)
    expected = "expected text or tool_calls in an answer"
    require(not (answers and empty) or "tool_calls" in out, f"{name}.content", content, expected)
    return out


def _call(call: Any, name: str) -> Any:
    """Return a tool call whose arguments are an object, or an object as JSON text (OpenAI)."""
    function = call.get("function") if isinstance(call, dict) else None
    fits = isinstance(function, dict) and isinstance(function.get("name"), str)
    require(fits, name, call, "expected an object with a function, which has a name and arguments")
    assert isinstance(function, dict), "just checked"
    given = function.get("arguments")
    arguments = {} if given is None or given == "" else given
    parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
    expected = "expected an object, or one as JSON"
    require(isinstance(parsed, dict), f"{name}.function.arguments", given, expected)
    return {**call, "function": {**function, "arguments": arguments}}


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """Return the tools of a row, or None if it has none."""
    tools = listed(row.get("tools") or None)
    objects = isinstance(tools, list) and all(isinstance(one, dict) for one in tools)
    expected = "expected a list of objects, or one as JSON"
    require(tools is None or objects, "tools", row.get("tools"), expected)
    return tuple(tools) if tools else None


def weight_of(row: Mapping[str, Any], name: str = "weight") -> float:
    """Return the loss weight of a row or a message, by default 1."""
    value = 1.0 if row.get("weight") is None else row["weight"]
    fits = type(value) in (int, float) and 0 <= value <= sys.float_info.max
    require(fits, name, value, "expected a number of 0 or more")
    return float(value)


def listed(value: Any) -> Any:
    """Return the list in a JSON text, as tables store messages, and any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    parsed = _parsed(value)
    return value if parsed is None else parsed


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, or None if it is not valid."""
    try:
        return parse_json(text)
    except ValueError:
        return None

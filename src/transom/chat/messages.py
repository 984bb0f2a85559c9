"""Messages and tools as plain data, in the form that a template expects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from transom.base.errors import RequestError, expect, explained

# The names that templates read reasoning under.
REASONING = ("reasoning_content", "thinking", "reasoning")
# A template that never names the text of a part of a message expects a string.
READS_PARTS = re.compile(r"""['"]text['"]|\.text\b""")
JSON_RESULTS = "{#- results of tools are JSON -#}"  # in templates of Mistral's formats v2 and v3
MISSING: Any = ...  # stands for a content that is not there


def plain(value: Any, name: str) -> Any:
    """Return a copy that consists of JSON's own types, the only ones that a template may read."""
    deep = f"{name}: nested too deeply; expected data that JSON can represent"
    with explained(deep, RecursionError):
        return _plain(value, name)


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        for key in value:
            expect(isinstance(key, str), f"{name}: key", key, "text")
        return {str(key): _plain(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, f"{name}[{at}]") for at, one in enumerate(value)]
    raise RequestError(
        f"{name}: got a {type(value).__name__}; expected data that JSON can represent"
    )


def message_data(message: Any, name: str) -> dict[str, Any]:
    """Return a message as plain data without null keys, its reasoning under all its names."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{name}: expected an object with a role and a content")
    out = {key: one for key, one in plain(message, name).items() if one is not None}
    reasoning = next((out[key] for key in REASONING if key in out), None)
    if reasoning is not None:
        # As in transformers: gpt-oss templates read `thinking`, all others the first name.
        out = {"thinking": reasoning, **out, "reasoning_content": reasoning}
    return out


def fit_content(message: dict[str, Any], source: str, name: str) -> None:
    """Change the content of a message, in place, into what the template of this source reads.

    A list of texts is joined unless the template reads parts. Results of tools become JSON where
    the template expects it.
    """
    content = message.get("content")
    results = message["role"] == "tool" and JSON_RESULTS in source
    if isinstance(content, list) and (results or not READS_PARTS.search(source)):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        kinds = [
            part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content
        ]
        only_texts = all(isinstance(text, str) for text in texts)
        expected = "parts of text only, since this template reads no others"
        expect(only_texts, f"{name}.content", kinds, expected)
        message["content"] = content = "".join(map(str, texts))
    if results:
        if isinstance(content, str):
            with suppress(ValueError, RecursionError):
                content = json.loads(content)
        message["content"] = json.dumps(content, ensure_ascii=False)


def without_parts(messages: list[Any]) -> Iterator[tuple[str, Any, list[Any]]]:
    """Yield the name and type of each part that is no text, and the messages without this part."""
    for at, message in enumerate(messages):
        parts = message["content"] if isinstance(message.get("content"), list) else []
        for number, part in enumerate(parts):
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                fewer = {**message, "content": [*parts[:number], *parts[number + 1 :]]}
                others = [*messages[:at], fewer, *messages[at + 1 :]]
                yield f"messages[{at}].content[{number}]", kind, others


def open_last(
    message: dict[str, Any], field: str, source: str, tag: str, name: str
) -> tuple[dict[str, Any], str]:
    """Return a message with a tag after the words of a field, and these words."""
    words = message.get(field)
    same = (
        [one for one in REASONING if message.get(one) == words] if field in REASONING else [field]
    )
    written = any(one in source for one in same)
    expect(written, name, field, "a field that the template writes")
    if not isinstance(words, list):
        expect(isinstance(words, str), f"{name}.{field}", words, "text to continue")
        return {**message, **dict.fromkeys(same, f"{words}{tag}")}, str(words)
    parts = [dict(part) if isinstance(part, dict) else part for part in words]
    texts = [part for part in parts if isinstance(part, dict) and "text" in part]
    expect(bool(texts), f"{name}.{field}", words, "parts with a text among them")
    text = str(texts[-1]["text"])
    texts[-1]["text"] = f"{text}{tag}"
    return {**message, field: parts}, text


# -- calls of tools --


class CallForm(NamedTuple):
    """The form in which a template reads calls of tools.

    Attributes:
        objects: It writes arguments that are given as an object as JSON, or value by value.
        texts: It writes arguments that are given as text as they are.
        content: What replaces a missing content.
    """

    objects: bool
    texts: bool
    content: Any

    def fit(self, message: dict[str, Any]) -> None:
        """Change a message that calls tools into this form, in place."""
        if "content" not in message and self.content is not MISSING:
            message["content"] = self.content
        calls = message["tool_calls"]
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                function["arguments"] = self._arguments(function["arguments"])

    def _arguments(self, given: Any) -> Any:
        if isinstance(given, str) and self.objects and not self.texts:
            with suppress(ValueError):
                parsed = json.loads(given or "{}")
                return parsed if isinstance(parsed, dict) else given
        if isinstance(given, dict) and self.texts and not self.objects:
            return json.dumps(given, ensure_ascii=False)
        return given

    @classmethod
    def of(cls, render: Callable[[list[dict[str, Any]]], str]) -> CallForm:
        """Find the form by rendering one call in every form.

        Templates differ: most write `arguments | tojson`, which turns a text into a quoted string;
        DeepSeek's join texts, which an object cannot be; some read `content` of a message that has
        none.
        """
        name, as_object = "qx7call", {"qx7key": "qx7value"}
        as_text = json.dumps(as_object)

        def rendered(arguments: Any, content: Any) -> str:
            function = {"name": name, "arguments": arguments}
            call = {"type": "function", "id": "abcdefghi", "function": function}
            answer = {"role": "assistant", "tool_calls": [call], "content": content}
            if content is MISSING:
                del answer["content"]
            try:
                return render([{"role": "user", "content": "Hello"}, answer])
            except RequestError:
                return ""

        for content in (MISSING, "", None):
            text = rendered(as_object, content)
            objects = name in text and "qx7value" in text and repr(as_object) not in text
            text = rendered(as_text, content)
            if objects or (name in text and as_text in text):
                return cls(objects, name in text and as_text in text, content)
        return cls(False, False, MISSING if rendered({}, MISSING) else "")

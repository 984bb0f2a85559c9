"""Messages and tools as the plain data that a template reads, in the form that this template
writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transom.base.errors import RequestError, require

REASONING = ("reasoning_content", "thinking", "reasoning")
# A template that never names the text of a part of a message expects a string.
READS_PARTS = re.compile(r"""['"]text['"]|\.text\b""")
MISSING = object()


def plain(value: Any, name: str) -> Any:
    """Return a copy that consists of JSON's own types, the only ones that a template may read."""
    try:
        return _plain(value, name)
    except RecursionError:
        raise RequestError(f"{name}: nested too deeply; expected what JSON can write") from None


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_key(key, name): _plain(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, f"{name}[{at}]") for at, one in enumerate(value)]
    raise RequestError(f"{name}: a {type(value).__name__}; expected what JSON can write")


def _key(key: object, name: str) -> str:
    require(isinstance(key, str), f"{name}: key", key, "expected text")
    return str(key)


def message_data(message: Any, name: str) -> dict[str, Any]:
    """Return one message as plain data, without null keys, its reasoning under all names that
    templates read.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{name}: expected an object with a role and a content")
    out = {key: one for key, one in plain(message, name).items() if one is not None}
    reasoning = next((out[key] for key in REASONING if key in out), None)
    if (
        reasoning is not None
    ):  # as transformers does: gpt-oss templates read `thinking`, all others the first
        out = {"thinking": reasoning, **out, "reasoning_content": reasoning}
    return out


def joined_texts(content: list[Any], name: str) -> str:
    """Join a list of texts to one text, for templates that do not read parts."""
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    kinds = [
        part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content
    ]
    require(
        all(isinstance(text, str) for text in texts),
        name,
        kinds,
        "this template reads parts of text only",
    )
    return "".join(map(str, texts))


def require_parts(
    given: Mapping[str, Any], same: Callable[[dict[str, Any]], bool], origin: str
) -> None:
    """Refuse a template that writes the `same` with and without an image, or another part that is
    no text.
    """
    for at, message in enumerate(given["messages"]):
        parts = message["content"] if isinstance(message.get("content"), list) else []
        for number, part in enumerate(parts):
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind == "text":
                continue
            fewer = {
                **message,
                "content": [one for place, one in enumerate(parts) if place != number],
            }
            others = [fewer if place == at else one for place, one in enumerate(given["messages"])]
            if same({**given, "messages": others}):
                raise RequestError(
                    f"messages[{at}].content[{number}]: {origin} leaves out a part of type "
                    f"{kind!r}; expected a template that writes it"
                )


# -- a last message to go on with
# --------------------------------------------------------------------


def wants_prompt(add_generation_prompt: bool | None, continue_final_message: bool | str) -> bool:
    """Return whether the head of an answer is written; by default where no message is to be
    continued.
    """
    both = bool(add_generation_prompt) and bool(continue_final_message)
    expected = "expected one of it and add_generation_prompt"
    require(not both, "continue_final_message", continue_final_message, expected)
    return not continue_final_message if add_generation_prompt is None else add_generation_prompt


@dataclass(frozen=True)
class Opened:
    """A conversation whose last message stays open: `tag` follows the words that the model
    continues.
    """

    given: dict[str, Any]
    tag: str
    words: str
    origin: str

    def cut(self, rendered: str) -> tuple[str, int]:
        """Return the text up to the tag and its length, without white space that the template
        strips.

        This is what transformers does, so that both continue from the same text.
        """
        at = rendered.rfind(self.tag.strip())
        if at < 0 or self.words.strip() not in rendered:
            raise RequestError(
                f"{self.origin}: does not write the last message as it is, so it cannot be "
                f"continued; expected a message that this template writes"
            )
        text = rendered[:at]
        if not rendered.startswith(self.tag, at):
            text = text.rstrip()
        return text, len(text)


def open_last(given: dict[str, Any], field: str, source: str, origin: str, tag: str) -> Opened:
    """Return the conversation with a tag after the words of its last message."""
    last = dict(given["messages"][-1])
    names = (
        [name for name in REASONING if last.get(name) == last.get(field)]
        if field in REASONING
        else [field]
    )
    name = f"messages[{len(given['messages']) - 1}].{field}"
    require(any(one in source for one in names), name, "continued", f"{origin} writes no {field}")
    words = last.get(field)
    if isinstance(words, list):
        parts = [dict(part) if isinstance(part, dict) else part for part in words]
        part = next(
            (part for part in reversed(parts) if isinstance(part, dict) and "text" in part), None
        )
        require(part is not None, name, "continued", "expected parts with a text among them")
        assert part is not None
        words, part["text"] = str(part["text"]), f"{part['text']}{tag}"
        last[field] = parts
    else:
        require(isinstance(words, str), name, words, "expected text to go on from")
        last |= dict.fromkeys(names, f"{words}{tag}")
    return Opened({**given, "messages": [*given["messages"][:-1], last]}, tag, str(words), origin)


# -- results of tools
# --------------------------------------------------------------------------------

JSON_RESULTS = "{#- results of tools are JSON -#}"  # in templates of Mistral's formats v2 and v3


def result_as_json(message: dict[str, Any], name: str) -> None:
    """Write the content of a tool's message as JSON, in place; text that is not JSON becomes a JSON
    string.
    """
    content = message.get("content")
    if isinstance(content, list):
        content = joined_texts(content, f"{name}.content")
    if isinstance(content, str):
        with suppress(ValueError, RecursionError):
            content = json.loads(content)
    message["content"] = json.dumps(content, ensure_ascii=False)


# -- calls of tools
# ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallForm:
    """The form in which a template reads calls of tools; `reads_none` is True if it writes no calls
    at all.
    """

    objects: bool = True  # arguments given as an object are written as JSON, or value by value
    texts: bool = False  # arguments given as text are written as they are
    content: Any = MISSING  # replaces a missing content
    reads_none: bool = False

    def fit(self, message: dict[str, Any]) -> None:
        """Change a message that calls tools into this form, in place."""
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or not calls:
            return
        if "content" not in message and self.content is not MISSING:
            message["content"] = self.content
        if self.reads_none:
            return
        for call in calls:
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                function["arguments"] = self._arguments(function["arguments"])

    def _arguments(self, given: Any) -> Any:
        if isinstance(given, str) and not self.texts and self.objects:
            try:
                parsed = json.loads(given or "{}")
            except ValueError:
                return given
            return parsed if isinstance(parsed, dict) else given
        if isinstance(given, dict) and not self.objects and self.texts:
            return json.dumps(given, ensure_ascii=False)
        return given


_NAME, _KEY, _VALUE = "qx7call", "qx7key", "qx7value"


def call_form(render: Callable[[list[dict[str, Any]]], str]) -> CallForm:
    """Find the form by rendering one call in every form.

    Templates differ: most write `arguments | tojson`, which turns a text into a quoted string;
    DeepSeek's join texts, which an object cannot be; some read `content` of a message that has
    none.
    """
    as_text = json.dumps({_KEY: _VALUE})

    def rendered(arguments: Any, content: Any) -> str:
        function = {"name": _NAME, "arguments": arguments}
        call = {"type": "function", "id": "abcdefghi", "function": function}
        answer = {"role": "assistant", "tool_calls": [call]}
        if content is not MISSING:
            answer["content"] = content
        try:
            return render([{"role": "user", "content": "Hello"}, answer])
        except RequestError:
            return ""

    for content in (MISSING, "", None):
        with_object, with_text = rendered({_KEY: _VALUE}, content), rendered(as_text, content)
        objects = (
            _NAME in with_object
            and _VALUE in with_object
            and repr({_KEY: _VALUE}) not in with_object
        )
        texts = _NAME in with_text and as_text in with_text
        if objects or texts:
            return CallForm(objects, texts, content)
    return CallForm(content=MISSING if rendered({}, MISSING) else "", reads_none=True)

"""The child process that renders chat templates. Templates come from strangers; see `sandbox.py`.

Settings, functions and filters are those of transformers (`utils/chat_template_utils.py`), so that
a template renders to the same text.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache, lru_cache
from time import monotonic
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from transom.base.worker import serve

MEMORY_BYTES = 1 << 29
MAX_CHARACTERS = 20_000_000  # of one rendered text
ENOUGH_CHARACTERS, ENOUGH_SECONDS = 2_000_000, 1.0  # for a reply with several texts


class Refused(TemplateError):
    """Raised by `raise_exception` in a template, which cannot render these messages."""


class Generation(Extension):
    """The block `{% generation %}...{% endgeneration %}` around words of the assistant."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a call of `ChatEnvironment.generated` with the body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.EnvironmentAttribute("generated"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the functions that chat templates call."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self.marks, self.now = ("", ""), datetime.now()  # set for every rendering
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": self.strftime_now}

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Raise `SecurityError` for a forbidden attribute, which Jinja would render as nothing."""
        raise SecurityError(f"it reads the attribute {attribute!r} of {type(obj).__name__!r}")

    def generated(self, caller: Macro) -> str:
        """Return the body of a `generation` block between the marks."""
        return f"{self.marks[0]}{caller()}{self.marks[1]}"

    def strftime_now(self, format: str) -> str:
        """Return the time of this rendering."""
        return self.now.strftime(format)


def _raise_exception(message: object) -> NoReturn:
    raise Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as text. Jinja's own filter escapes `<` and `&` for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@cache
def _environment() -> ChatEnvironment:
    return ChatEnvironment()


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[Template, list[str]]:
    """Return a compiled template, and the names that it reads."""
    environment = _environment()
    names = meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), sorted(names)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the names that a template reads, its text for some variables, or an error.

    With `beginnings`, return the texts of several beginnings of the messages, each given as a
    number of messages and whether a prompt for an answer follows them. The text of no messages is
    empty, and a text that can't be rendered is None. The last texts are left out if the others took
    long or are large.
    """
    try:
        template, names = _compiled(request["source"])
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: not a Jinja template ({error.message})"}
    except Exception as error:
        return {"error": f"not a Jinja template that can be compiled ({_line(error)})"}
    if "variables" not in request:
        return {"names": names}
    if (beginnings := request.pop("beginnings", None)) is None:
        return _reply(template, request)
    variables, texts, start, size = request["variables"], list[str | None](), monotonic(), 0
    for count, ask in beginnings:
        if texts and (size > ENOUGH_CHARACTERS or monotonic() > start + ENOUGH_SECONDS):
            break
        changed = {"messages": variables["messages"][:count], "add_generation_prompt": ask}
        reply = _reply(template, {**request, "variables": {**variables, **changed}})
        texts.append(reply.get("text") if count else "")
        size += len(texts[-1] or "")
    return {"texts": texts}


def _reply(template: Template, request: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a template for some variables, or an error."""
    try:
        return {"text": _render(template, **request)}
    except Refused as error:
        return {"error": f"refuses these messages: {_line(error)}"}
    except SecurityError as error:
        return {"error": f"a chat template may not do this: {_line(error)}"}
    except MemoryError:
        limit = f"{MEMORY_BYTES >> 20} MiB of memory or {MAX_CHARACTERS:,} characters"
        return {"error": f"stopped, since it needs more than {limit}"}
    except Exception as error:  # a template is a program, and may fail like any other
        return {"error": f"cannot render these messages ({type(error).__name__}: {_line(error)})"}


def _render(
    template: Template, source: str, variables: dict[str, Any], marks: tuple[str, str], now: str
) -> str:
    environment = _environment()
    environment.marks, environment.now = marks, datetime.fromisoformat(now)
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise MemoryError
    return "".join(pieces)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


if __name__ == "__main__":
    serve(answer, MEMORY_BYTES)

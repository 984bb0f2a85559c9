"""The child process that renders chat templates. Templates come from strangers; see `sandbox.py`.

Settings, functions and filters are those of transformers (`utils/chat_template_utils.py`), so that
a template renders to the same text.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, NamedTuple, NoReturn

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


class Refused(TemplateError):
    """Raised by `raise_exception` in a template, which cannot render these messages."""


class Generation(Extension):
    """The block `{% generation %}...{% endgeneration %}` around words of the assistant."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a call of `ChatEnvironment.generated` with the body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(_method("generated"), [], [], body).set_lineno(line)


def _method(name: str) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), [], [], None, None)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the functions that chat templates call."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self.marks, self.step, self.now = ("", ""), "", datetime.now()  # set for every rendering
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": self.strftime_now}

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Raise `SecurityError` for a forbidden attribute, which Jinja would render as nothing."""
        raise SecurityError(f"it reads the attribute {attribute!r} of {type(obj).__name__!r}")

    def generated(self, caller: Macro) -> str:
        """Return the body of a `generation` block between the marks."""
        return f"{self.marks[0]}{caller()}{self.marks[1]}"

    def stepped(self) -> str:
        """Return the mark at the beginning of each step and after the last one."""
        return self.step

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
def _compiled(source: str) -> tuple[Template, dict[str, Any]]:
    """Return a compiled template, and which names it reads and whether it writes in steps."""
    environment = _environment()
    names = sorted(meta.find_undeclared_variables(environment.parse(source)))
    parsed = environment.parse(source)
    steps = steps_of(parsed)
    if steps is not None:
        steps.loop.body.insert(0, nodes.Output([_method("stepped")]))
        parsed.body.insert(parsed.body.index(steps.loop) + 1, nodes.Output([_method("stepped")]))
    template = Template.from_code(
        environment, environment.compile(parsed), environment.make_globals(None)
    )
    return template, {"names": names, "steps": None if steps is None else steps.reads}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the names and steps of a template, its text for some variables, or an error."""
    try:
        template, facts = _compiled(request["source"])
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: not a Jinja template ({error.message})"}
    except Exception as error:
        return {"error": f"not a Jinja template that can be compiled ({_line(error)})"}
    if "variables" not in request:
        return facts
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
    template: Template,
    source: str,
    variables: dict[str, Any],
    marks: list[str],
    step: str,
    now: str,
) -> str:
    environment = _environment()
    environment.marks, environment.step = (marks[0], marks[1]), step
    environment.now = datetime.fromisoformat(now)
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


# -- templates that write one message after another --

BACKWARD = frozenset(
    {"index", "index0", "first", "depth", "depth0", "previtem", "cycle", "changed"}
)
STATEFUL = frozenset({"cycler", "joiner"})  # their values depend on earlier calls
ELSEWHERE = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)


class Steps(NamedTuple):
    """The loop over the messages, and how many first messages are read at any time."""

    loop: nodes.For
    reads: int


def steps_of(template: nodes.Template) -> Steps | None:
    """Return the loop of a template that provably writes message by message; None for any other.

    Such a template is one loop over the messages, followed by text that depends on nothing set in
    the loop. Inside the loop, nothing depends on later messages or on `add_generation_prompt`. The
    first k messages then render to the text that the full conversation has before step k, followed
    by the text after the loop.
    """
    names = list(template.find_all(nodes.Name))
    stored = [name.name for name in names if name.ctx != "load"]
    assigned = [one for one in template.body if isinstance(one, nodes.Assign)]
    aliases = {
        one.target.name: one.node
        for one in assigned
        if _is_name(one.node, {"messages"}) and isinstance(one.target, nodes.Name)
    }
    aliases = {name: value for name, value in aliases.items() if stored.count(name) == 1}
    lists = {"messages", *aliases}
    loops = [one for one in template.body if isinstance(one, nodes.For)]
    loops = [one for one in loops if _is_name(one.iter, lists)]
    elsewhere = any(template.find(kind) for kind in ELSEWHERE)
    if len(loops) != 1 or "messages" in stored or elsewhere:
        return None
    (loop,) = loops
    at = template.body.index(loop)
    after = _names(template.body[at + 1 :], nodes.Name)
    changed = _names([loop, *template.find_all(nodes.Macro)], nodes.NSRef)
    asks = "add_generation_prompt" in _names([*template.body[:at], loop], nodes.Name)
    filtered = loop.else_ or loop.test is not None or loop.recursive
    if filtered or asks or changed & after or STATEFUL & {name.name for name in names}:
        return None
    items = [one for one in template.find_all(nodes.Getitem) if _is_name(one.node, lists)]
    read = {one.node: number for one in items if (number := _number(one)) is not None}
    loads = {name for name in names if name.name in lists and name.ctx == "load"}
    others = loads - {loop.iter, *aliases.values(), *read}
    if others or any(_reads_ahead(part) for part in loop.body):
        return None
    return Steps(loop, max(read.values(), default=-1) + 1)


def _number(item: nodes.Getitem) -> int | None:
    """Return the constant that an item is read by, if it counts from the beginning."""
    number = item.arg.value if isinstance(item.arg, nodes.Const) else None
    return number if type(number) is int and number >= 0 else None


def _reads_ahead(node: nodes.Node, owner: nodes.Node | None = None) -> bool:
    """Return whether `loop` is read for more than earlier steps."""
    if isinstance(node, nodes.Name) and node.name == "loop":
        return not (isinstance(owner, nodes.Getattr) and owner.attr in BACKWARD)
    parts = [node.iter] if isinstance(node, nodes.For) else node.iter_child_nodes()
    return any(_reads_ahead(part, node) for part in parts)


def _names(parts: list[nodes.Node], kind: type[nodes.Name] | type[nodes.NSRef]) -> set[str]:
    found = [one for part in parts for one in part.find_all(kind)]
    return {one.name for one in found if isinstance(one, nodes.Name | nodes.NSRef)}


def _is_name(node: nodes.Node | None, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


if __name__ == "__main__":
    serve(answer, MEMORY_BYTES)

"""Chat templates come from strangers: Jinja without reach, and with an end to time and memory.

The functions and filters are those of `transformers`, so that a template renders to the same text.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from transom.base.errors import RequestError
from transom.chat.steps import steps_of

MAX_SECONDS = 10.0  # of one rendering; published templates take milliseconds
MAX_STEPS = 1_000_000  # rounds of loops, calls and operators of one rendering
MAX_CHARACTERS = 100_000_000  # that all steps of one rendering may write together
MAX_SOURCE = 1_000_000  # characters of a template; published ones have up to 20,000
MAX_NUMBER = 10_000  # as a width, a count or an indent, and bits of an integer
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
WIDE_FORMAT = re.compile(
    r"\d{4,}|\{[^{}]*\{"
)  # a width of thousands, or one that is itself a field
# Filters that no chat template needs and whose output can be many times their input.
NO_FILTERS = ("center", "wordwrap", "urlize", "xmlattr", "pprint", "striptags", "random", "sum")


class Exhausted(TemplateError):
    """A template went on for longer than any chat needs."""


class Refused(TemplateError):
    """The template itself said that it cannot render this (`raise_exception`)."""


class _Namespace(Namespace):
    """`namespace()` whose attributes cannot begin with an underscore, so that none of Python's are
    reached.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"{name!r} on a namespace begins with an underscore")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model is to say, marked where marks are
    wanted.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `ChatEnvironment.generated` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.EnvironmentAttribute("generated"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class _Counting(NodeTransformer):
    """A template in which loops, macros, `~` and new lists call the environment, where they are
    counted.
    """

    def _block(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_method("tick")))
        return node

    def _container(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if stored else _method("kept", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` as a call of `joined`."""
        self.generic_visit(node)
        return _method("joined", *node.nodes)

    visit_For = visit_Macro = visit_CallBlock = _block
    visit_List = visit_Dict = visit_Tuple = _container


def _method(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of one rendering: it counts what the template does, and stops it at the limits
    above.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, marks: tuple[str, str] = ("", ""), now: datetime | None = None) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.marks, self.now, self.step = marks, now or datetime.now(), ""
        self.deadline = time.monotonic() + MAX_SECONDS
        self.steps = self.characters = 0
        self._sizes: dict[
            int, tuple[Any, int]
        ] = {}  # of containers by id, which are kept alive with it
        self.filters = {name: self._counted(name, one) for name, one in self.filters.items()}
        for name in NO_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = self._counted("tojson", _tojson)
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": self.strftime_now}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Python of the template, with the counting put in, and marks of steps where it writes in
        steps.
        """
        steps = steps_of(source)
        if steps is not None:
            steps.loop.body.insert(0, nodes.Output([_method("stepped")]))
            source.body.insert(
                source.body.index(steps.loop) + 1, nodes.Output([_method("stepped")])
            )
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    # -- what a template may reach
    # -------------------------------------------------------------------

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Jinja would render an attribute out of reach as nothing; it is an error here."""
        raise SecurityError(f"it reaches for {attribute!r} of {type(obj).__name__!r}")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`"...".format`, unless the text asks for widths that fill the memory."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, write = value.__self__, wrapped
        if WIDE_FORMAT.search(text):
            raise Exhausted("it formats with a width of thousands of characters")

        def counted(*args: Any, **kwargs: Any) -> str:
            self.tick(len(text) + text.count("{") * self.size([*args, kwargs]))
            return write(*args, **kwargs)

        return counted

    # -- counting
    # ------------------------------------------------------------------------------------

    def tick(self, characters: int = 0) -> None:
        """Count one step that writes so many characters."""
        self.steps += 1
        self.characters += characters
        if self.steps > MAX_STEPS or time.monotonic() > self.deadline:
            raise Exhausted(f"it did not end within {MAX_SECONDS:g} seconds or {MAX_STEPS:,} steps")
        if self.characters > MAX_CHARACTERS:
            raise Exhausted(f"it writes more than {MAX_CHARACTERS:,} characters")

    def stepped(self) -> str:
        """Return the mark that begins the text of each message and follows that of the last one."""
        return self.step

    def generated(self, caller: Macro) -> str:
        """The body of a `generation` block between the marks."""
        return f"{self.marks[0]}{caller()}{self.marks[1]}"

    def strftime_now(self, format: str) -> str:
        """The time of this rendering."""
        if re.search(r"%[-_0^#]*\d", format):
            raise Exhausted("it formats the time with a width")
        return self.now.strftime(format)

    def joined(self, *parts: Any) -> str:
        """The text of `a ~ b ~ c`."""
        self.tick(sum(map(self.size, parts)))
        return "".join(map(str, parts))

    def size(self, value: Any) -> int:
        """About how many characters it takes to write a value, lists with all that is in them."""
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | dict):
            return 8
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        size = 2 + sum(2 + self.size(part) for part in parts)
        if size > MAX_CHARACTERS:
            raise Exhausted(f"it makes values of more than {MAX_CHARACTERS:,} characters")
        self._sizes[id(value)] = value, size
        return size

    def kept(self, value: Any) -> Any:
        """A new value, unless it is too large: a list of lists of one list is written, and
        compared, in full.
        """
        if isinstance(value, list | tuple | dict):
            self.size(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%`, their result measured before it is made."""
        if operator == "+" and type(left) is str and type(right) is str:
            self.tick(len(left) + len(right))
            return left + right
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * right
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if bits > MAX_NUMBER:
                raise Exhausted("it computes integers of thousands of digits")
        if operator == "%" and isinstance(left, str | bytes):
            self._formatted(str(left), right)
        elif operator == "*":
            self.tick(max(self.size(left) * _whole(right), self.size(right) * _whole(left)))
        else:
            self.tick(_size(left) + _size(right))
        return self.kept(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method, the text that it will write measured before."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = __self._measured(getattr(__obj, "__name__", ""), owner, args, kwargs)
        else:
            __self.tick()
        return __self.kept(super().call(__context, __obj, *args, **kwargs))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose growth is measured; Jinja's context or environment may stand before its
        value.
        """
        skipped = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            head, value, rest = args[:skipped], args[skipped], args[skipped + 1 :]
            if name == "join":
                value = list(value)
                separator = rest[0] if rest else kwargs.get("d", "")
                self.tick(sum(self.size(one) + self.size(separator) for one in value))
            elif name == "format":
                self._formatted(str(value), [*rest, kwargs])
            elif name == "tojson":
                width = rest[1] if len(rest) > 1 else kwargs.get("indent")
                self._measured(name, "", rest, kwargs)
                self.tick(self.size(value) * (1 + _whole(width)))
            else:
                self.size(value)
                rest = self._measured(name, value if isinstance(value, str) else "", rest, kwargs)
            return self.kept(function(*head, value, *rest, **kwargs))

        return counted

    def _formatted(self, text: str, values: Any) -> None:
        """Count what `text % values` will write."""
        if WIDE_FORMAT.search(text) or "*" in text:
            raise Exhausted("it formats with a width of thousands of characters")
        self.tick(len(text) + text.count("%") * self.size(values))

    def _measured(
        self, name: str, owner: str | bytes | int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The arguments of a method of text, after what it will write has been counted."""
        size, values = _size(owner), (*args, *kwargs.values())
        numbers = [abs(value) for value in values if isinstance(value, int)]
        if max(numbers, default=0) > MAX_NUMBER:
            raise Exhausted(f"it calls {name} with a number above {MAX_NUMBER:,}")
        longest = max((_size(value) for value in values), default=0)
        if name == "replace" and isinstance(owner, str) and args:
            self.tick(size + owner.count(str(args[0])) * longest)
        elif name == "join" and args:
            items = list(args[0])
            self.tick(sum(self.size(item) + size for item in items))
            return (items, *args[1:])
        elif name in ("indent", "expandtabs") and isinstance(owner, str):
            rows = 1 + owner.count("\n") + owner.count("\t")
            self.tick(size + rows * max(longest, *numbers, 8))
        elif name in ("translate", "maketrans"):
            raise SecurityError(f"it calls {name}")
        else:
            self.tick(size + sum(numbers) + longest)
        return args


class Compiled:
    """A template as Python code, and the names that it reads; what is no Jinja is a
    `RequestError`.
    """

    def __init__(self, source: str, origin: str) -> None:
        self.source, self.origin = source, origin
        self.generation = (
            GENERATION.search(source) is not None
        )  # whether it says what a model is to say
        if len(source) > MAX_SOURCE:
            raise RequestError(
                f"{origin}: {len(source)} characters; expected a template of {MAX_SOURCE:,}"
            )
        environment = ChatEnvironment()
        try:
            parsed = environment.parse(source)
            self.names = frozenset(meta.find_undeclared_variables(parsed))
            self.steps = steps_of(parsed)
            self._code = environment.compile(source)
        except TemplateSyntaxError as error:
            raise RequestError(
                f"{origin}: line {error.lineno}: not a Jinja template ({error.message})"
            ) from None
        except (RecursionError, MemoryError, SyntaxError, TemplateError) as error:
            raise RequestError(
                f"{origin}: not a Jinja template that can be compiled ({_words(error)})"
            ) from None

    def render(
        self,
        variables: dict[str, Any],
        marks: tuple[str, str] = ("", ""),
        now: datetime | None = None,
        step: str = "",
    ) -> str:
        """Return the text for `variables` at a time, with `marks` around `{% generation %}` and
        `step` at steps.
        """
        environment = ChatEnvironment(marks, now)
        environment.step = step
        template = Template.from_code(environment, self._code, environment.make_globals(None))
        pieces: list[str] = []
        try:
            for piece in template.generate(**variables):
                environment.tick(len(piece))
                pieces.append(piece)
        except Refused as error:
            raise RequestError(f"{self.origin} refuses these messages: {_words(error)}") from None
        except Exhausted as error:
            raise RequestError(f"{self.origin}: stopped, as {_words(error)}") from None
        except SecurityError as error:
            raise RequestError(
                f"{self.origin}: a chat template may not do this: {_words(error)}"
            ) from None
        except Exception as error:  # it is a program, and may fail like any other
            reason = f"{type(error).__name__}: {_words(error)}"
            raise RequestError(f"{self.origin}: cannot render these messages ({reason})") from None
        return "".join(pieces)


def _words(error: BaseException) -> str:
    """An error's text on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _whole(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _raise_exception(message: object) -> NoReturn:
    raise Refused(str(message))


class _Dict:
    """The parts of `dict` that a template may use: the call and `fromkeys`."""

    def __call__(self, *args: Iterable[Any], **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """Return a dict with one value for all keys."""
        return dict.fromkeys(keys, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as text; Jinja's own filter would write `<` and `&` as HTML needs them."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

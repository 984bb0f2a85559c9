"""Strict reading and writing of frozen dataclasses, shared by model arguments and run configs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transom.base.errors import RequestError, explained, nearest

T = TypeVar("T")

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
PATH = re.compile(r"[\w.\[\]-]*")  # the field that an error message begins with


class Plain(str):
    """Unquoted text of a YAML file or the command line.

    Its value depends on the declared type of the field that it is for.
    """

    __slots__ = ()


def describe(
    default: Any, help: str, unit: str = "", *, path: bool = False, **bounds: float
) -> Any:
    """Return a dataclass field with its help and bounds, for `--help` pages and `check_bounds`.

    Args:
        default: the value of a field that is not given, or a type that makes it.
        help: what the field means, and what its default means if that is not plain, in one line.
        unit: the unit of its value.
        path: whether it is a path, in which `read` replaces a leading `~` by the home folder.
        bounds: `at_least`, `above`, `at_most` or `below` of its value, or of each item of a tuple.
    """
    metadata = {"help": help, "unit": unit, "path": path, "bounds": bounds}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# The bounds of seeds: generators of torch take 64 bits, and some parts add to the seed.
SEED: dict[str, Any] = {"at_least": 0, "below": 2**62}
_BOUNDS: dict[str, tuple[Callable[[Any, float], bool], str]] = {
    "at_least": (operator.ge, "{} or more"),
    "above": (operator.gt, "more than {}"),
    "at_most": (operator.le, "at most {}"),
    "below": (operator.lt, "less than {}"),
}


def check_bounds(instance: Any) -> None:
    """Raise a `RequestError` for the first field that is not in the bounds of its `describe`.

    Dataclasses call it first in `__post_init__`. None is in all bounds, NaN in none.
    """
    for field in dataclasses.fields(instance):
        bounds, value = field.metadata.get("bounds", {}), getattr(instance, field.name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(
            _BOUNDS[name][0](one, limit) for one in values for name, limit in bounds.items()
        ):
            limits = {name: limit for name, limit in bounds.items() if limit != math.inf}
            number = "a number" if limits == bounds else "a finite number"
            kind = "an integer" if "int" in str(field.type) else number
            words = " and ".join(_BOUNDS[name][1].format(limit) for name, limit in limits.items())
            words = f"{kind} of {words}" if limits else kind
            absent = ", or null" if field.default is None else ""
            raise RequestError(f"{field.name}: got {_shown(value)}; expected {words}{absent}")


def regex(pattern: str, field: str) -> re.Pattern[str]:
    """Return a compiled regular expression; raise `RequestError` if `field` has none."""
    with explained(f"{field}: got {_shown(pattern)}; expected a regular expression", re.error):
        return re.compile(pattern)


_hints = functools.cache(typing.get_type_hints)


def field_types(cls: Any) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, in order, with annotations evaluated."""
    hints = _hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def read(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Return the `cls` that plain data describes.

    Args:
        cls: a dataclass. Its nested dataclasses are read too.
        data: values by field name, as YAML or JSON has them.
        where: the path of the field that holds `cls`, for messages.

    Raises:
        RequestError: a key is unknown (the message suggests the nearest), a field is missing, or a
            value has the wrong type.
    """
    if not isinstance(data, Mapping):
        name = where or cls.__name__
        raise RequestError(f"{name}: got {_shown(data)}; expected a mapping of its fields")
    known = field_types(cls)
    for key in data:
        if key not in known:
            hint = nearest(str(key), known) or f"; expected one of {', '.join(known)}"
            raise RequestError(f"{_join(where, str(key))}: got an unknown field{hint}")
    values = {key: _convert(known[key], value, _join(where, key)) for key, value in data.items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if not optional and field.name not in values:
            raise RequestError(f"{_join(where, field.name)}: got nothing; expected a value")
        if field.metadata.get("path") and str(values.get(field.name)).startswith("~"):
            values[field.name] = os.path.expanduser(values[field.name])  # noqa: PTH111 - a path or a hub id
    try:
        return cls(**values)
    # The class names its own field, not the path of the field that holds the class.
    except RequestError as error:
        name = re.match(r"\w*", str(error))
        inside = bool(where) and name is not None and name[0] in known
        raise RequestError(f"{where}.{error}" if inside else str(error)) from None


def type_at(cls: Any, keys: Sequence[str]) -> Any:
    """Return the declared type of the field `keys[0].keys[1]...` of a dataclass, or Any for an
    unknown field.
    """
    kind = cls
    for key in keys:
        nested = next((one for one in options_of(kind) if dataclasses.is_dataclass(one)), None)
        known = {} if nested is None else field_types(nested)
        if key not in known:
            return Any
        kind = known[key]
    return kind


def options_of(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or a tuple of the type itself."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def plain_value(value: Any) -> Any:
    """Return the value of data without a declared type, by YAML 1.2's core schema: number, boolean
    or text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if not isinstance(value, Plain):
        return value
    if value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return value.lower() == "true"
    if INTEGER.fullmatch(value):
        return _integer(value)
    return _float(value) if FLOAT.fullmatch(value) else str(value)


def write(value: Any) -> Any:
    """Return a dataclass as plain data that `read` accepts, with nested dataclasses as mappings.

    Fields at their defaults are included, so that a file keeps its meaning if a default changes.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: write(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, (list, tuple)):
        return [write(item) for item in value]
    if isinstance(value, Mapping):
        return {key: write(item) for key, item in value.items()}
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(kind: Any, value: Any, where: str) -> Any:
    options = options_of(kind)
    if type(None) in options:
        if value is None or (
            isinstance(value, Plain) and value.lower() == "none" and str not in options
        ):
            return None
        options = tuple(option for option in options if option is not type(None))
    if isinstance(value, Plain):  # a value is text only if it is nothing else
        options = tuple(sorted(options, key=lambda option: option is str))
    errors: list[str] = []
    for option in options:
        try:
            return _convert_one(option, value, where)
        except RequestError as error:
            errors.append(str(error))
    raise RequestError(_most_precise(errors))


def _most_precise(errors: Sequence[str]) -> str:
    """Return the error about the innermost field. Of several errors about it, join what they
    expect.
    """
    places = [PATH.match(error) for error in errors]
    depths = [0 if place is None else place[0].count(".") + place[0].count("[") for place in places]
    found = [error for error, depth in zip(errors, depths, strict=True) if depth == max(depths)]
    beginning, mark, _ = found[0].partition("; expected ")
    alike = [
        error.removeprefix(beginning + mark)
        for error in found
        if error.startswith(beginning + mark)
    ]
    return beginning + mark + " or ".join(dict.fromkeys(alike)) if mark else found[0]


def _convert_one(kind: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return _convert_literal(options, value, where)
    if origin is tuple:
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise RequestError(f"{where}: got {_shown(value)}; expected a list")
        inner = options[0] if len(options) == 2 and options[1] is Ellipsis else None
        if inner is None and len(options) != len(value):
            raise RequestError(
                f"{where}: got {_shown(value)}; expected a list of {len(options)} items"
            )
        kinds = [inner] * len(value) if inner is not None else list(options)
        return tuple(
            _convert(k, v, f"{where}[{i}]")
            for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else read(kind, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RequestError(f"{where}: got {_shown(value)}; expected a mapping")
        items = value.items()
        return {str(key): _convert(options[1], v, _join(where, str(key))) for key, v in items}
    return _convert_scalar(kind, value, where)


def _convert_literal(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        switch = isinstance(option, bool) != isinstance(value, bool)  # 1 is not true
        if str(option) == value if isinstance(value, Plain) else option == value and not switch:
            return option
    hint = nearest(str(value), [str(option) for option in options])
    raise RequestError(
        f"{where}: got {_shown(value)}; expected one of {', '.join(map(str, options))}{hint}"
    )


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return plain_value(value)
    with contextlib.suppress(ValueError):
        if kind is float and isinstance(value, str):
            return _float(value)
        if kind is int and isinstance(value, Plain):
            return _integer(value)
    if kind is bool and isinstance(value, Plain) and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise RequestError(f"{where}: got {_shown(value)}; expected {_words(kind)}")


def _integer(text: str) -> int:
    """Read decimal digits, also with leading zeros or an exponent, and 0x and 0o numbers."""
    if re.fullmatch(r"[-+]?0[xXoO].+", text):
        return int(text, 0)
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _float(text: str) -> float:
    """Read a number as Python or YAML writes it; YAML's infinity begins with a dot."""
    return float(
        text.replace(".", "", 1) if re.fullmatch(r"[-+]?\.(inf|nan)", text.lower()) else text
    )


def _shown(value: Any) -> str:
    """Return `value` as Python writes it, unquoted text as the number or boolean that it may be."""
    return repr(plain_value(value))


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        kind, str(kind)
    )

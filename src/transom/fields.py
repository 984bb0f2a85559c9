"""Strict reading and writing of frozen dataclasses, shared by model arguments and run configs."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from transom.errors import RequestError, nearest

T = TypeVar("T")


def describe(default: Any, help: str, unit: str = "") -> Any:
    """A dataclass field that carries its one-line help and its unit for `--help` pages."""
    metadata = {"help": help, "unit": unit}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def field_types(cls: Any) -> dict[str, Any]:
    """Resolved field types of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def read(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build `cls` from plain data; an unknown key or a wrong type is a `RequestError` naming it."""
    if not isinstance(data, Mapping):
        name = where or cls.__name__
        raise RequestError(f"{name} = {data!r}: accepted is a mapping of its fields")
    known = field_types(cls)
    for key in data:
        if key not in known:
            hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
            raise RequestError(f"{_join(where, str(key))}: no such field of {cls.__name__}{hint}")
    return cls(**{key: _convert(known[key], value, _join(where, key)) for key, value in data.items()})


def write(value: Any) -> Any:
    """Plain data of a dataclass, nested parts as mappings; defaults too, so that they may change later."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: write(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [write(item) for item in value]
    if isinstance(value, Mapping):
        return {key: write(item) for key, item in value.items()}
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(options, value, where)
    if origin is typing.Literal:
        if value not in options:
            hint = nearest(str(value), [str(option) for option in options])
            raise RequestError(f"{where} = {value!r}: accepted is one of {', '.join(map(str, options))}{hint}")
        return value
    if origin is tuple:
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise RequestError(f"{where} = {value!r}: accepted is a list")
        inner = options[0] if len(options) == 2 and options[1] is Ellipsis else None
        if inner is None and len(options) != len(value):
            raise RequestError(f"{where} = {value!r}: accepted is a list of {len(options)} items")
        kinds = [inner] * len(value) if inner is not None else list(options)
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else read(kind, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RequestError(f"{where} = {value!r}: accepted is a mapping")
        return dict(value)
    return _convert_scalar(kind, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    first_error: RequestError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except RequestError as error:
            first_error = first_error or error
    raise first_error or RequestError(f"{where} = {value!r}: not accepted")


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, str):
        try:  # YAML 1.1 reads 3e-4 (no dot) as a string
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise RequestError(f"{where} = {value!r}: accepted is {_words(kind)}")


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))

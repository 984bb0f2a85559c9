"""YAML files whose unquoted values get their type from the field that they set. No torch.

YAML 1.1 would read `no` as false, `0123` as 83, `2024-11-29` as a date and `1e-4` as text.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from transom.base.errors import expect, explained
from transom.base.fields import Plain, options_of
from transom.base.files import read_text

NULLS = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    """A loader that returns `Plain` for unquoted scalars except null, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [str(key.value) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} twice", node.start_mark
                )
        return {_key(key): value for key, value in super().construct_mapping(node, deep).items()}


def _key(key: Hashable) -> Hashable:
    return str(key) if isinstance(key, str) else key


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | None:
    text = str(loader.construct_scalar(node))
    if node.style is not None:
        return text
    return None if text in NULLS else Plain(text)


_Loader.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}
_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)


def parse_yaml(text: str) -> Any:
    """Return the data of a YAML text, with unquoted scalars as `Plain`.

    Raises:
        yaml.YAMLError: If the text is not YAML or repeats a key of a mapping.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, which is empty for an empty file.

    Raises:
        RequestError: If the file cannot be read or contains anything else.
    """
    with explained(f"{path}: not valid YAML", yaml.YAMLError):
        data = parse_yaml(read_text(path))
    data = {} if data is None else data
    expect(isinstance(data, dict), str(path), data, "a mapping of fields")
    return dict(data)


def word_value(kind: Any, text: str, where: str) -> Any:
    """Return the value of a field that is given on the command line.

    A field of text takes it unchanged. Lists and mappings are written as YAML. If a field takes
    text as well as a list or mapping, only a text in brackets or braces is YAML.

    Args:
        kind: The type of the field.
        text: The word of the command line.
        where: The name of the field, for messages.
    """
    options = options_of(kind)
    nested = any(
        option is Any
        or typing.get_origin(option) in (tuple, dict)
        or dataclasses.is_dataclass(option)
        for option in options
    )
    if nested and (str not in options or text[:1] + text[-1:] in ("[]", "{}")):
        with explained(f"{where}: got {text!r}; expected valid YAML", yaml.YAMLError):
            return parse_yaml(text)
    if type(None) in options and text in NULLS:
        return None
    return text if str in options else Plain(text)

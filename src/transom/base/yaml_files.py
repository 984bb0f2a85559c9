"""YAML whose unquoted values get their type from the field that they set, not from the rules of
YAML 1.1.

YAML 1.1 reads `no` as false, `0123` as 83, `2024-11-29` as a date and `1e-4` as text. No torch.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from transom.base.errors import RequestError
from transom.base.fields import Plain, options_of

NULLS = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    """Builds `Plain` from every unquoted scalar but null, and refuses a key that stands twice in a
    mapping.
    """

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
    """Return the data of a YAML text, with unquoted scalars as `Plain`; raise `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; expected a config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RequestError(f"{path}: expected a mapping of fields")
    return data


def word_value(kind: Any, text: str, where: str) -> Any:
    """Return the data that `text` of the command line is for a field of type `kind`.

    A field of text takes it unchanged. Lists and mappings are written as YAML. Where a field takes
    text as well as a list or mapping, only a text in brackets or braces is YAML.
    """
    options = options_of(kind)
    nested = any(
        option is Any
        or typing.get_origin(option) in (tuple, dict)
        or dataclasses.is_dataclass(option)
        for option in options
    )
    if nested and (str not in options or text[:1] + text[-1:] in ("[]", "{}")):
        try:
            return parse_yaml(text)
        except yaml.YAMLError:
            raise RequestError(f"{where}: got {text!r}; expected valid YAML") from None
    if type(None) in options and text in NULLS:
        return None
    return text if str in options else Plain(text)

"""The files of a model folder that hold chat templates and name control tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from transom.base.errors import expect, notice
from transom.base.files import read_json, read_text, shown_name, writing
from transom.tokenizers.folder import TEMPLATES
from transom.tokenizers.token_files import spelling_of

FILE, CONFIG, OLD_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
DEFAULT = "default"


def stored_templates(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the file in which a folder keeps its chat templates, and the templates by name.

    As in transformers, template files take precedence over tokenizer_config.json, and a single
    template is called `default`.
    """
    file, in_config = folder / FILE, _templates(folder / CONFIG)
    files = {one.stem: one for one in sorted((folder / TEMPLATES).glob("*.jinja"))}
    files |= {DEFAULT: file} if file.exists() else {}
    if files:
        stored = {name: read_text(one) for name, one in files.items()}
        if any(stored.get(name) != source for name, source in in_config.items()):
            notice(
                f"{folder}: template files and {CONFIG} hold different chat "
                f"templates; the first is taken"
            )
        return shown_name(file if file.exists() else folder / TEMPLATES), stored
    if in_config:
        return shown_name(folder / CONFIG), in_config
    return str(folder / OLD_FILE), _templates(folder / OLD_FILE)


def write_templates(folder: Path, sources: Mapping[str, str]) -> None:
    """Write templates by name into the files that `stored_templates` reads."""
    for name, source in sources.items():
        file = folder / (FILE if name == DEFAULT else f"{TEMPLATES}/{name}.jinja")
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            file.write_text(source, encoding="utf-8")


def _templates(file: Path) -> dict[str, str]:
    """Return the templates of a file by name: a text, an object of texts, or a list of objects."""
    entry = read_json(file).get("chat_template") if file.exists() else None
    named: Any = {} if entry is None else entry
    if isinstance(entry, str):
        named = {DEFAULT: entry}
    elif isinstance(entry, list):
        items = [one if isinstance(one, dict) else {} for one in entry]
        named = {one.get("name"): one.get("template") for one in items}
    texts = isinstance(named, dict) and all(isinstance(one, str) for one in chain(*named.items()))
    expected = "a text, an object of texts, or a list of objects with name and template"
    expect(texts, f"{file}: chat_template", entry, expected)
    return dict(named)


def variables_of(folder: Path) -> dict[str, str]:
    """Return the control tokens that tokenizer_config.json names, such as `image_token`."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    tokens = {name: spelling_of(one) for name, one in named.items() if name.endswith("_token")}
    return {name: token for name, token in tokens.items() if token is not None}

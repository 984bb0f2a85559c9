"""The files of a model folder that hold chat templates and name control tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import WorkError, notice, require
from transom.base.files import read_json, read_text
from transom.tokenizers.folder import TEMPLATES

FILE, CONFIG, OLD_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
DEFAULT = "default"


def stored_templates(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the file in which a folder keeps its chat templates, and the templates by name.

    As in transformers, template files take precedence over tokenizer_config.json, and a single
    template is called `default`.
    """
    config, file = folder / CONFIG, folder / FILE
    in_config = (
        _templates(read_json(config).get("chat_template"), config) if config.exists() else {}
    )
    files = {one.stem: one for one in sorted((folder / TEMPLATES).glob("*.jinja"))}
    files |= {DEFAULT: file} if file.exists() else {}
    if files:
        stored = {name: read_text(one) for name, one in files.items()}
        if any(stored.get(name) != source for name, source in in_config.items()):
            notice(
                f"{folder}: template files and {CONFIG} hold different chat "
                f"templates; the first is taken"
            )
        return str(file if file.exists() else folder / TEMPLATES), stored
    old = folder / OLD_FILE
    if in_config or not old.exists():
        return str(config), in_config
    return str(old), _templates(read_json(old).get("chat_template"), old)


def write_templates(folder: Path, sources: Mapping[str, str]) -> None:
    """Write templates by name into the files that `stored_templates` reads."""
    try:
        for name, source in sources.items():
            file = folder / (FILE if name == DEFAULT else f"{TEMPLATES}/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            file.write_text(source, encoding="utf-8")
    except OSError as error:
        raise WorkError(f"{folder / FILE}: could not be written ({error})") from None


def _templates(entry: Any, file: Path) -> dict[str, str]:
    """Return templates by name from an entry: a text, an object of texts, or a list of objects."""
    if entry is None:
        return {}
    pairs: list[tuple[Any, Any]] = [(None, None)]
    if isinstance(entry, str):
        pairs = [(DEFAULT, entry)]
    elif isinstance(entry, dict):
        pairs = list(entry.items())
    elif isinstance(entry, list):
        pairs = [
            (one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None)
            for one in entry
        ]
    texts = all(isinstance(part, str) for pair in pairs for part in pair)
    expected = (
        "expected a text, an object of texts by name, or a list of objects with a "
        "name and a template"
    )
    require(texts, f"{file}: chat_template", entry, expected)
    return dict(pairs)


def variables_of(folder: Path) -> dict[str, str]:
    """Return the control tokens that tokenizer_config.json names, such as `image_token`."""
    if not (folder / CONFIG).exists():
        return {}
    config = read_json(folder / CONFIG)
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    tokens = {
        name: one.get("content") if isinstance(one, dict) else one for name, one in named.items()
    }
    return {
        name: token
        for name, token in tokens.items()
        if name.endswith("_token") and isinstance(token, str)
    }

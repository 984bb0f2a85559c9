"""Where folders keep their chat templates, and the tokens that templates write by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, WorkError, notice, require
from transom.base.files import read_bytes, read_json
from transom.tokenizers.folder import TEMPLATES

FILE, CONFIG, OLD_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
DEFAULT = "default"


def stored_templates(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the file that a folder keeps its chat templates in, and those by name; none at all is
    an empty dict.

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
        found = {name: read_text(one) for name, one in files.items()}
        if any(found.get(name) != source for name, source in in_config.items()):
            notice(
                f"{folder}: template files and {CONFIG} hold different chat templates; the first "
                f"is taken"
            )
        return str(file if file.exists() else folder / TEMPLATES), found
    if in_config or not (folder / OLD_FILE).exists():
        return str(config), in_config
    return str(folder / OLD_FILE), _templates(
        read_json(folder / OLD_FILE).get("chat_template"), folder / OLD_FILE
    )


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
    """Return templates by name from a text, an object of texts, or a list of `{"name": ...,
    "template": ...}`.
    """
    if entry is None:
        return {}
    given = entry
    if isinstance(entry, dict):
        entry = [{"name": name, "template": source} for name, source in entry.items()]
    named = [{"name": DEFAULT, "template": entry}] if isinstance(entry, str) else entry
    fits = isinstance(named, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str)
        for one in named
    )
    expected = (
        "expected a text, an object of texts by name, or a list of objects with a name and a "
        "template"
    )
    require(fits, f"{file}: chat_template", given, expected)
    return {one["name"]: one["template"] for one in named}


def variables_of(folder: Path) -> dict[str, str]:
    """Tokens that tokenizer_config.json has names for (`image_token`), which templates write by
    these names.
    """
    if not (folder / CONFIG).exists():
        return {}
    config = read_json(folder / CONFIG)
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    contents = {
        name: entry.get("content") if isinstance(entry, dict) else entry
        for name, entry in named.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in contents.items() if isinstance(token, str)}


def read_text(file: Path) -> str:
    """Return the text of a template file."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file}: expected text in UTF-8 ({error})") from None

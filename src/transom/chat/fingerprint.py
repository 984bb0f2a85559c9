"""The hashes of the tokenizer and chat template that a model was trained with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transom.base.errors import notice
from transom.base.files import read_json, write_text
from transom.chat.template import ChatTemplate
from transom.tokenizers.tokenizer import Tokenizer

FILE = "trained_with.json"


def write_fingerprint(folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    """Write the hashes of tokenizer and template into a model folder."""
    hashes = {
        "tokenizer": tokenizer.hash,
        "template": None if template is None else template_hash(template),
    }
    write_text(folder / FILE, json.dumps(hashes, indent=2))


def template_hash(template: ChatTemplate) -> str:
    """Return the SHA-256 in hex of what a template writes by, except messages and time."""
    parts = {"sources": template.sources, "variables": template.variables_read}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def warn_if_other(
    folders: tuple[Path, ...], tokenizer: Tokenizer, template: ChatTemplate | None
) -> None:
    """Print a notice if a model was trained with another tokenizer or template."""
    path = next((folder / FILE for folder in folders if (folder / FILE).exists()), None)
    trained = {} if path is None else read_json(path)
    others = ["another tokenizer"] if trained and trained.get("tokenizer") != tokenizer.hash else []
    if template is not None and trained.get("template") not in (None, template_hash(template)):
        others.append(f"another chat template than {template.origin}")
    for other in others:
        notice(
            f"{path}: the model was trained with {other}; its answers will be worse "
            f"than they could be"
        )

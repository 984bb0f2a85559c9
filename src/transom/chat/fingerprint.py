"""Whether a model is talked to in the words it was trained with: a hash of template and tokenizer,
kept with it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transom.base.errors import WorkError, notice
from transom.base.files import read_json
from transom.chat.template import ChatTemplate
from transom.tokenizers.tokenizer import Tokenizer

FILE = "trained_with.json"


def write_fingerprint(folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    """Keep beside the weights what turned conversations into the tokens they were trained on."""
    facts = {
        "tokenizer": tokenizer.hash,
        "template": None if template is None else template_hash(template),
    }
    try:
        (folder / FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise WorkError(f"{folder / FILE}: could not be written ({error})") from None


def template_hash(template: ChatTemplate) -> str:
    """Return the SHA-256 in hex of all that a template writes by, but for the messages and the
    date.
    """
    return _hash_of(template, template.variables_read)


def _hash_of(template: ChatTemplate, variables: dict[str, Any]) -> str:
    whole = {"sources": template.sources, "variables": variables}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def warn_if_other(
    folders: tuple[Path, ...], tokenizer: Tokenizer, template: ChatTemplate | None
) -> None:
    """One line where the model of these folders was trained with another tokenizer or, if given,
    template.
    """
    path = next((folder / FILE for folder in folders if (folder / FILE).exists()), None)
    if path is None:
        return
    trained = read_json(path)
    if trained.get("tokenizer") != tokenizer.hash:
        notice(
            f"{path}: the model was trained with another tokenizer; its answers will be worse "
            f"than they could be"
        )
    if template is None or trained.get("template") is None:
        return
    # Earlier folders have the hash with all variables, also those that the template does not read.
    if trained["template"] not in (template_hash(template), _hash_of(template, template.variables)):
        notice(
            f"{path}: the model was trained with another chat template than {template.origin}; "
            f"its answers will be worse than they could be"
        )

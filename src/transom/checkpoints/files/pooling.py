"""The pooling of tokens to one vector per text that folders of sentence-transformers state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from transom.base.errors import explained, notice
from transom.base.files import read_json

POOLING = "1_Pooling/config.json"
MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
SENTENCE_TRANSFORMERS = (MODULES, POOLING, *_SETTINGS)
_MODES: dict[str, Literal["mean", "last"]] = {
    "mean": "mean",
    "lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


def stated_pooling(folder: Path) -> Literal["mean", "last"] | None:
    """Return the pooling that a folder states; None, with a notice, if it is not supported."""
    path = folder / POOLING
    if not path.exists():
        return None
    data = read_json(path)
    # Newer files name the mode, older ones have a flag for every mode.
    flags = [key for key in data if key.startswith("pooling_mode_") and data[key] is True]
    named = data.get("pooling_mode", flags)
    modes = named if isinstance(named, list) else [named]
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    found = ", ".join(map(str, modes)) or "none"
    notice(f"{path}: pooling_mode: got {found}, which is not supported; expected mean or lasttoken")
    return None


def tell_other_modules(folder: Path, normalize: bool) -> None:
    """Print a notice if a folder lists modules after the pooling that are not applied.

    Raises:
        RequestError: `modules.json` is no list of modules.
    """
    path = folder / MODULES
    if not path.exists():
        return
    expected = f"{path}: expected a list of modules with types"
    with explained(expected, ValueError, LookupError, TypeError):
        types = [str(entry["type"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
    applied = ("Transformer", "Pooling", *(["Normalize"] if normalize else []))
    others = [kind for kind in (name.rpartition(".")[2] for name in types) if kind not in applied]
    if others:
        hint = "; --normalize does what Normalize does" if "Normalize" in others else ""
        notice(f"{path}: modules that are not applied: {', '.join(others)}{hint}")

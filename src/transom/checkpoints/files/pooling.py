"""How a folder of sentence-transformers states the pooling of tokens to one vector per text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from transom.base.errors import RequestError, notice
from transom.base.files import read_json

POOLING = "1_Pooling/config.json"
MODULES = "modules.json"
SENTENCE_TRANSFORMERS = (
    MODULES,
    POOLING,
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
MODES: dict[str, Literal["mean", "last"]] = {"mean": "mean", "lasttoken": "last"}
# The older files have a flag for every mode; `pooling_mode` names one in the newer ones.
FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken"}


def stated_pooling(folder: Path) -> Literal["mean", "last"] | None:
    """Return the pooling that a folder states; None where it states none, or, with a notice,
    another kind.
    """
    path = folder / POOLING
    if not path.exists():
        return None
    data = read_json(path)
    named = data.get("pooling_mode")
    flags = [
        key for key, value in data.items() if key.startswith("pooling_mode_") and value is True
    ]
    flagged = [FLAGS.get(key, key) for key in flags]
    modes = flagged if named is None else named if isinstance(named, list) else [named]
    if len(modes) == 1 and modes[0] in MODES:
        return MODES[modes[0]]
    notice(
        f"{path}: pooling by {', '.join(map(str, modes)) or 'nothing'} is not done; mean and "
        f"last are"
    )
    return None


def tell_other_modules(folder: Path, normalize: bool) -> None:
    """Print a notice about modules after the pooling that a folder lists and that are not
    applied.
    """
    path = folder / MODULES
    if not path.exists():
        return
    try:
        kinds = [
            str(entry["type"]).rpartition(".")[2]
            for entry in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise RequestError(f"{path}: expected a list of modules with types ({error})") from None
    applied = ("Transformer", "Pooling", *(["Normalize"] if normalize else []))
    others = [kind for kind in kinds if kind not in applied]
    if others:
        hint = "; --normalize does what Normalize does" if "Normalize" in others else ""
        notice(f"{path}: modules that are not applied: {', '.join(others)}{hint}")

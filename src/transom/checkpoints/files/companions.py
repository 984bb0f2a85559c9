"""Copy the files beside the weights of a model: tokenizer, chat templates, licence and others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transom.base.files import read_json, write_text
from transom.checkpoints.files.generation_config import (
    stated_settings,
    stop_tokens_of,
    write_settings,
)
from transom.checkpoints.files.layout import GENERATION, TOKENIZERS
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.files.pooling import SENTENCE_TRANSFORMERS
from transom.tokenizers.folder import TEMPLATES
from transom.tokenizers.tokenizer import Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *(*TOKENIZERS, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja")
TRAINED_WITH = "trained_with.json"
_OTHERS = (
    *(TRAINED_WITH, GENERATION, "labels.json", *SENTENCE_TRANSFORMERS),
    *("preprocessor_config.json", "processor_config.json"),
    *("LICENSE", "LICENSE.txt", "USE_POLICY.md"),
)


def copy_companions(
    source: Path, out: Path, patterns: Sequence[str] = (*TOKENIZER_FILES, *TEMPLATE_FILES, *_OTHERS)
) -> list[str]:
    """Copy the files beside the weights of a model; return their names relative to `source`."""
    found = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(source).as_posix() for path in found)
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    return names


def carry_companions(location: ModelLocation, out: Path) -> list[str]:
    """Copy the files beside the weights, an adapter's before those of its base.

    All parts of the tokenizer come from one folder, and so do the templates. Generation settings of
    a `config.json` are written to a file of their own, since not every format has a place for them.

    Returns:
        The names of the files.
    """
    vocabulary = location.tokenizer
    templates = next(filter(_has_template, location.folders), location.model)
    names = copy_companions(vocabulary, out, TOKENIZER_FILES)
    names += copy_companions(templates, out, TEMPLATE_FILES)
    for folder in reversed(location.folders):
        names += copy_companions(folder, out, _OTHERS)
    if templates != vocabulary and (out / TOKENIZER_CONFIG).exists():
        stored = read_json(out / TOKENIZER_CONFIG) | {"chat_template": _stored_template(templates)}
        if not stored["chat_template"]:
            del stored["chat_template"]
        write_text(out / TOKENIZER_CONFIG, json.dumps(stored, indent=2, ensure_ascii=False))
    settings = stated_settings(location.folders)
    if location.adapter == vocabulary and settings.get("eos_token_id") is not None:
        ends = list(stop_tokens_of(location, Tokenizer.load(vocabulary)))
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    copied = read_json(out / GENERATION) if (out / GENERATION).exists() else {}
    if settings not in ({}, copied):
        write_settings(out, settings)
        names.append(GENERATION)
    return sorted(set(names))


def _has_template(folder: Path) -> bool:
    files = any(any(folder.glob(name)) for name in TEMPLATE_FILES)
    return files or bool(_stored_template(folder))


def _stored_template(folder: Path) -> object:
    """Return the chat template in `tokenizer_config.json`, which may be a list of several."""
    path = folder / TOKENIZER_CONFIG
    return read_json(path).get("chat_template") if path.exists() else None

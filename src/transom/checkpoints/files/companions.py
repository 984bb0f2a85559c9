"""Copy the files beside the weights of a model: tokenizer, chat templates, licence and others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from transom.base.files import read_json, write_text
from transom.checkpoints.files.generation_config import (
    GENERATION,
    stated_settings,
    stop_tokens_of,
    write_settings,
)
from transom.checkpoints.files.layout import TOKENIZERS
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
_COMPANIONS = (
    *(*TOKENIZER_FILES, *TEMPLATE_FILES, TRAINED_WITH, GENERATION, *SENTENCE_TRANSFORMERS),
    *("labels.json", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE", "LICENSE.txt", "USE_POLICY.md"),
)


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy the files beside the weights of a model; return their names relative to `source`."""
    found = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(source).as_posix() for path in found)
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    return names


def carry_companions(location: ModelLocation, out: Path) -> list[str]:
    """Copy the files beside the weights, an adapter's before those of its base.

    The parts of one tokenizer, and the templates of one folder, stay together. Generation settings
    of a `config.json` are written to a file of their own, since not every format has a place for
    them.

    Returns:
        The names of the files.
    """
    names = copy_companions(location.model, out)
    if location.adapter is not None:
        names += copy_companions(location.adapter, out)
        _keep_together(location, out, sorted(set(names)))
    settings = stated_settings(location.folders)
    if location.adapter == location.tokenizer and settings.get("eos_token_id") is not None:
        ends = list(stop_tokens_of(location, Tokenizer.load(location.tokenizer)))
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    copied = read_json(out / GENERATION) if (out / GENERATION).exists() else {}
    if settings not in ({}, copied):
        write_settings(out, settings)
        names.append(GENERATION)
    return sorted(name for name in set(names) if (out / name).exists())


def _keep_together(location: ModelLocation, out: Path, names: Sequence[str]) -> None:
    """Of all copied files, keep the parts of one tokenizer and the templates of one folder."""
    vocabulary = location.tokenizer
    templates = next(filter(_has_template, location.folders), location.model)
    for patterns, source in ((TOKENIZER_FILES, vocabulary), (TEMPLATE_FILES, templates)):
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in patterns):
                continue
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)
            else:
                (out / name).unlink()
    if templates != vocabulary and (out / TOKENIZER_CONFIG).exists():
        settings = read_json(out / TOKENIZER_CONFIG) | {
            "chat_template": _stored_template(templates)
        }
        if not settings["chat_template"]:
            del settings["chat_template"]
        write_text(out / TOKENIZER_CONFIG, json.dumps(settings, indent=2, ensure_ascii=False))


def _has_template(folder: Path) -> bool:
    files = any(any(folder.glob(name)) for name in TEMPLATE_FILES)
    return files or bool(_stored_template(folder))


def _stored_template(folder: Path) -> object:
    """Return the chat template in `tokenizer_config.json`, which may be a list of several."""
    path = folder / TOKENIZER_CONFIG
    return read_json(path).get("chat_template") if path.exists() else None

"""What goes along with the weights of a model: tokenizer, templates, settings of generation. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.checkpoints.folders import CONFIG, TOKENIZERS
from transom.checkpoints.foreign_config import OLDER_SETTINGS
from transom.errors import notice
from transom.paths import read_json, write_text
from transom.tokenizers.folder import TEMPLATES

if TYPE_CHECKING:
    from transom.tokenizer import Tokenizer

GENERATION = "generation_config.json"
# Ids that a Hugging Face config holds as well, for software that looks there.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Where an id may stand in a config.json, in the order of transformers' `GenerationConfig.from_model_config`.
NESTED = ("decoder", "generator", "text_config")
_COMPANIONS = (
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "labels.json", "trained_with.json", GENERATION),
    *("preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md"),
)


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy what goes along with a model unchanged; return the names of the files, templates by their folder."""
    names = [path.name for path in sorted(source.iterdir()) if path.is_file() and _goes_along(path.name)]
    names += [path.relative_to(source).as_posix() for path in sorted((source / TEMPLATES).glob("*.jinja"))]
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    return names


def _goes_along(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _COMPANIONS)


def stated_settings(folders: Sequence[Path]) -> dict[str, Any]:
    """Return what the first of these folders with settings of generation states, ids from config.json included."""
    for folder in folders:
        path, config = folder / GENERATION, folder / CONFIG
        beside = read_json(config) if config.exists() else {}
        older = {} if path.exists() else {key: beside[key] for key in OLDER_SETTINGS if beside.get(key) is not None}
        ids = {key: stated_id(beside, key) for key in IDS}
        settings = {key: id for key, id in ids.items() if id is not None} | older
        stated = read_json(path) if path.exists() else {}
        settings |= {key: value for key, value in stated.items() if value is not None or key not in settings}
        if settings:
            return settings
    return {}


def stated_id(data: Mapping[str, Any], key: str) -> Any:
    """Return an id, or a list of ids, of a config, or that of the language model inside it; None without one."""
    return next((part[key] for part in _parts(data) if part.get(key) is not None), None)


def _parts(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield data
    for name in NESTED:
        inner = data.get(name)
        if isinstance(inner, dict):
            yield inner


def settings_to_write(stated: Mapping[str, Any], tokenizer: Tokenizer | None, where: str) -> dict[str, Any]:
    """Return the settings that a model came with, completed by the ids of the tokenizer that is written with it.

    Stop tokens that this tokenizer does not have belong to another one, and its own take their place.
    """
    settings = dict(stated)
    if tokenizer is None:
        return settings
    ends = settings.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if ends is not None and any(type(id) is not int or not 0 <= id < tokenizer.vocab_size for id in listed):
        notice(f"{where}: eos_token_id {ends} of the model's folder is not in this tokenizer, whose own is written")
        del settings["eos_token_id"]
    elif ends is not None and tokenizer.eos_id is not None and tokenizer.eos_id not in listed:
        notice(
            f"{where}: eos_token_id is {ends}, as the model's folder states; that of the tokenizer, "
            f"{tokenizer.eos_id}, is not among them"
        )
    stops = list(tokenizer.stop_ids)  # Meta's have ends of turns and messages beside the EOS
    own = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id}
    for key, id in own.items():
        if settings.get(key) is None:
            settings[key] = id
    return settings


def ids_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of settings that a Hugging Face config holds as well."""
    return {key: settings[key] for key in IDS if key in settings}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write generation_config.json, where there is something to state."""
    if settings:
        write_text(folder / GENERATION, json.dumps(settings, indent=2))

"""Files beside the weights of a model: tokenizer, templates, generation settings. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import notice, require
from transom.base.files import read_json, write_text
from transom.checkpoints.families.foreign_config import OLDER_SETTINGS
from transom.checkpoints.files.folders import CONFIG, TOKENIZERS, Found
from transom.checkpoints.files.pooling import SENTENCE_TRANSFORMERS
from transom.tokenizers.folder import TEMPLATES

if TYPE_CHECKING:
    from transom.tokenizers.tokenizer import Tokenizer

GENERATION = "generation_config.json"
# Ids that a Hugging Face config has as well, for software that looks there.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Parts of a config.json that may state an id, in the order of transformers'
# `GenerationConfig.from_model_config`.
NESTED = ("decoder", "generator", "text_config")
TOKENIZER_FILES = (
    *TOKENIZERS,
    *(
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ),
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja")
TRAINED_WITH = "trained_with.json"
_COMPANIONS = (
    *(
        *TOKENIZER_FILES,
        *TEMPLATE_FILES,
        TRAINED_WITH,
        GENERATION,
        "labels.json",
        *SENTENCE_TRANSFORMERS,
    ),
    *(
        "preprocessor_config.json",
        "processor_config.json",
        "LICENSE",
        "LICENSE.txt",
        "USE_POLICY.md",
    ),
)


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy the files beside the weights of a model; return their names below `source`."""
    found = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(source).as_posix() for path in found)
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    return names


def stated_settings(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings of generation that folders state, ids from config.json included.

    Settings come from the first folder that states any; ids that it does not state come from the
    next one.
    """
    settings: dict[str, Any] = {}
    for own in map(_settings_in, folders):
        settings = {key: own[key] for key in own if key in IDS or not settings} | settings
    return settings


def _settings_in(folder: Path) -> dict[str, Any]:
    path, config = folder / GENERATION, folder / CONFIG
    beside = read_json(config) if config.exists() else {}
    older = (
        {}
        if path.exists()
        else {key: beside[key] for key in OLDER_SETTINGS if beside.get(key) is not None}
    )
    ids = {key: stated_id(beside, key) for key in IDS}
    settings = {key: id for key, id in ids.items() if id is not None} | older
    stated = read_json(path) if path.exists() else {}
    return settings | {
        key: value for key, value in stated.items() if value is not None or key not in settings
    }


def stop_ids(found: Found, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a text of a model.

    They come from the first file that states `eos_token_id`: generation_config.json, then
    config.json, first those of the adapter, then those of the model. Where no file does, they come
    from the tokenizer. An adapter folder with a tokenizer, but without stop tokens, adds the stop
    tokens of this tokenizer to those of its base.
    """
    stated = [_stops_in(folder) for folder in found.folders]
    ids = next((ids for ids in stated if ids is not None), None)
    own = found.adapter == found.tokenizer and stated[0] is None
    beyond = [id for id in ids or () if id >= tokenizer.vocab_size]
    if beyond:
        notice(
            f"{found}: eos_token_id {beyond[0]} is not in the tokenizer of "
            f"{tokenizer.vocab_size} tokens"
        )
    return tuple(dict.fromkeys((*(ids or ()), *(tokenizer.stop_ids if ids is None or own else ()))))


def stop_strings(found: Found) -> tuple[str, ...]:
    """Return the texts that end an answer of a model: `stop_strings` among its settings of
    generation.
    """
    stated = stated_settings(found.folders).get("stop_strings") or []
    listed = (
        (stated,)
        if isinstance(stated, str)
        else tuple(stated)
        if isinstance(stated, list)
        else (None,)
    )
    right = all(isinstance(one, str) and one for one in listed)
    require(
        right,
        f"{found.model / GENERATION}: stop_strings",
        stated,
        "expected a text or a list of texts",
    )
    return listed


def _stops_in(folder: Path) -> list[int] | None:
    """Return the stop tokens of the first file of a folder that states some."""
    for path in (folder / GENERATION, folder / CONFIG):
        ids = stated_id(read_json(path) if path.exists() else {}, "eos_token_id")
        if ids is not None:
            listed = ids if isinstance(ids, list) else [ids]
            right = all(type(id) is int and id >= 0 for id in listed)
            require(right, f"{path}: eos_token_id", ids, "expected a token id or a list of them")
            return listed
    return None


def stated_id(data: Mapping[str, Any], key: str) -> Any:
    """Return an id or a list of ids from a config or from the language model inside it; None if it
    has none.
    """
    return next((part[key] for part in _parts(data) if part.get(key) is not None), None)


def _parts(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield data
    for name in NESTED:
        inner = data.get(name)
        if isinstance(inner, dict):
            yield inner


def settings_to_write(
    stated: Mapping[str, Any], tokenizer: Tokenizer | None, where: str
) -> dict[str, Any]:
    """Return the settings of a model, completed by the ids of the tokenizer that is written with
    it.

    Stop tokens that this tokenizer does not have belong to another one and are replaced by its own.
    """
    settings = dict(stated)
    if tokenizer is None:
        return settings
    ends = settings.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if ends is not None and any(
        type(id) is not int or not 0 <= id < tokenizer.vocab_size for id in listed
    ):
        notice(
            f"{where}: eos_token_id {ends} of the model's folder is not in this tokenizer, whose "
            f"own is written"
        )
        del settings["eos_token_id"]
    elif ends is not None and tokenizer.eos_id is not None and tokenizer.eos_id not in listed:
        notice(
            f"{where}: eos_token_id is {ends}, as the model's folder states; that of the "
            f"tokenizer, {tokenizer.eos_id}, is not among them"
        )
    stops = list(
        tokenizer.stop_ids
    )  # Meta's tokenizers end turns and messages with tokens other than EOS
    own = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id,
    }
    for key, id in own.items():
        if settings.get(key) is None:
            settings[key] = id
    return settings


def ids_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the settings that a Hugging Face config has as well."""
    return {key: settings[key] for key in IDS if key in settings}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write generation_config.json, unless there are no settings."""
    if settings:
        write_text(folder / GENERATION, json.dumps(settings, indent=2))

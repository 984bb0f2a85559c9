"""Settings of generation that model folders state: sampling, stop tokens, stop strings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import expect, notice
from transom.base.files import read_json, write_text
from transom.checkpoints.families.foreign_config import OLDER_SETTINGS
from transom.checkpoints.files.layout import CONFIG, GENERATION
from transom.checkpoints.files.location import ModelLocation

if TYPE_CHECKING:
    from transom.chat.template import ChatTemplate
    from transom.tokenizers.tokenizer import Tokenizer

# Ids that the config.json of transformers has as well, for software that looks there.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Parts of a config.json that may state an id, in the order of transformers'
# `GenerationConfig.from_model_config`.
NESTED = ("decoder", "generator", "text_config")


def stated_settings(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings of generation that folders state, ids from `config.json` included.

    The settings are those of the first folder that states any. Ids that it does not state come from
    the next one.
    """
    settings: dict[str, Any] = {}
    for own in map(_settings_in, folders):
        settings = {key: own[key] for key in own if key in IDS or not settings} | settings
    return settings


def _settings_in(folder: Path) -> dict[str, Any]:
    config, stated = _read(folder / CONFIG), _read(folder / GENERATION)
    older = () if (folder / GENERATION).exists() else OLDER_SETTINGS
    found = {key: _stated_id(config, key) for key in IDS}
    found |= {key: config.get(key) for key in older}
    settings = {key: value for key, value in found.items() if value is not None}
    return settings | {k: v for k, v in stated.items() if v is not None or k not in settings}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _stated_id(config: Mapping[str, Any], key: str) -> Any:
    """Return an id, or a list of ids, from a config or from the language model inside it."""
    inner = (config.get(name) for name in NESTED)
    parts = [config, *(part for part in inner if isinstance(part, dict))]
    return next((part[key] for part in parts if part.get(key) is not None), None)


def stop_tokens_of(
    where: ModelLocation | Path, tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text, or a turn that `template` writes.

    They come from the first file that states `eos_token_id`: `generation_config.json`, then
    `config.json`, first those of the adapter, then those of the model. If no file does, they come
    from the tokenizer. An adapter folder with a tokenizer but without stop tokens adds the stop
    tokens of this tokenizer to those of its base.

    Raises:
        RequestError: A file states something else than token ids.
    """
    location = ModelLocation(where) if isinstance(where, Path) else where
    stated = [_stops_in(folder) for folder in location.folders]
    ids = next((ids for ids in stated if ids is not None), None)
    own = location.adapter == location.tokenizer and stated[0] is None
    beyond = [id for id in ids or () if id >= tokenizer.vocab_size]
    if beyond:
        size = tokenizer.vocab_size
        notice(f"{location}: eos_token_id {beyond[0]} is not in the tokenizer of {size} tokens")
    of_tokenizer = tokenizer.stop_ids if ids is None or own else ()
    of_turns = () if template is None else template.stop_tokens
    return tuple(dict.fromkeys((*(ids or ()), *of_tokenizer, *of_turns)))


def _stops_in(folder: Path) -> list[int] | None:
    ids = _settings_in(folder).get("eos_token_id")
    if ids is None:
        return None
    listed = ids if isinstance(ids, list) else [ids]
    right = all(type(id) is int and id >= 0 for id in listed)
    expect(right, f"{folder}: eos_token_id", ids, "a token id or a list of them")
    return listed


def stop_strings(location: ModelLocation) -> tuple[str, ...]:
    """Return the texts that end an answer, stated as `stop_strings`.

    Raises:
        RequestError: The folder states something else than texts.
    """
    stated = stated_settings(location.folders).get("stop_strings") or []
    listed = stated if isinstance(stated, list) else [stated]
    right = all(isinstance(one, str) and one for one in listed)
    field = f"{location.model / GENERATION}: stop_strings"
    expect(right, field, stated, "a text or a list of texts")
    return tuple(listed)


def settings_to_write(
    stated: Mapping[str, Any], tokenizer: Tokenizer | None, where: str
) -> dict[str, Any]:
    """Return the settings of a model, completed with the ids of the tokenizer written beside it.

    Stop tokens that the tokenizer does not have belong to another one: the tokenizer's own replace
    them, with a notice.
    """
    settings = dict(stated)
    if tokenizer is None:
        return settings
    ends, size = settings.get("eos_token_id"), tokenizer.vocab_size
    listed = ends if isinstance(ends, list) else [ends]
    states = f"{where}: the model's folder states eos_token_id {ends}"
    if ends is not None and not all(type(id) is int and 0 <= id < size for id in listed):
        notice(f"{states}, which is not in this tokenizer; the tokenizer's own is written")
        del settings["eos_token_id"]
    # Meta's tokenizers end turns and messages with tokens other than EOS.
    several = len(tokenizer.stop_ids) > 1
    own = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids) if several else tokenizer.eos_id,
    }
    return settings | {key: id for key, id in own.items() if settings.get(key) is None}


def ids_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the settings that the config.json of transformers has as well."""
    return {key: settings[key] for key in IDS if key in settings}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write `generation_config.json`, unless there are no settings."""
    if settings:
        write_text(folder / GENERATION, json.dumps(settings, indent=2))

"""The arguments of a model by any name, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, expect, nearest
from transom.checkpoints.adapters.peft_config import summary
from transom.checkpoints.files.hub import is_hub_id
from transom.checkpoints.files.layout import CONFIG, PARAMS
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.files.packaged import PACKAGED, is_packaged
from transom.checkpoints.gguf.reader import is_gguf
from transom.checkpoints.read_args import lacks_vocabulary, read_args
from transom.config.model_args import ModelArgs
from transom.config.presets import PRESETS, preset


@dataclass(frozen=True)
class DescribedModel:
    """A model without its weights.

    Attributes:
        name: its name for people.
        args: its arguments.
        location: its folders, or None for a preset.
        adapter: a summary of its adapter, or None.
    """

    name: str
    args: ModelArgs
    location: ModelLocation | None
    adapter: dict[str, Any] | None = None


def describe_model(
    name: str, revision: str | None = None, *, settings_only: bool = False
) -> DescribedModel:
    """Return the arguments of a model.

    Args:
        name: a model, adapter or run folder, a GGUF file, a config.json or params.json, a preset,
            the name of a model that a package carries, or a hub id. A path that exists wins over
            a preset of the same name.
        revision: branch, tag or commit of a hub id.
        settings_only: download no weights of a hub id unless its config lacks something that only
            they show.

    Raises:
        RequestError: there is no such model.
    """
    path = Path(name)
    if path.is_file() and not is_gguf(path):
        expected = "a config.json, a params.json, a GGUF file, a folder, a hub id or a preset"
        expect(path.name in (CONFIG, PARAMS), "file", name, expected)
        expect(revision is None, "revision", revision, "none without a hub id")
        return DescribedModel(name, read_args(path.parent), ModelLocation(path.parent))
    if not path.exists() and name in PRESETS:
        expect(revision is None, "revision", revision, "none without a hub id")
        return DescribedModel(f"preset {name}", preset(name), None)
    if not path.exists() and not is_hub_id(name) and not is_packaged(name):
        known = [*PACKAGED, *PRESETS]
        expected = f"expected a folder, a file, a hub id or one of {', '.join(known)}"
        raise RequestError(
            f"model: got {name!r}, no such folder or file; {expected}{nearest(name, known)}"
        )
    location = find_model(path, revision, settings_only=settings_only)
    if settings_only and lacks_vocabulary(location.model):
        location = find_model(path, revision)
    adapter = None if location.adapter is None else summary(location.adapter)
    return DescribedModel(str(location), read_args(location.model), location, adapter)

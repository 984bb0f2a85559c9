"""The model or run that a user names for a check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import expect
from transom.base.fields import field_types
from transom.base.yaml_files import read_yaml
from transom.checkpoints.describe_model import describe_model
from transom.checkpoints.files.layout import CONFIG, PARAMS
from transom.checkpoints.gguf.reader import is_gguf
from transom.config.model_args import ModelArgs
from transom.config.presets import PRESETS
from transom.training.config import TrainArgs, read_config
from transom.verify.sample_models import SAMPLES, small_copy


def has_weights(name: str) -> bool:
    """Return whether a name means a folder or a hub id, and not a config file or a preset."""
    path = Path(name)
    return path.is_dir() or not (path.exists() or name in PRESETS)


def small_models(
    name: str | None, samples: Iterable[str], *, context: bool = False
) -> list[tuple[str, ModelArgs]]:
    """Return the name and arguments of a small copy of a model, or of the samples without one.

    `context` keeps cross-attention, see `sample_models.small_copy`.
    """
    if name is None:
        return [(sample, ModelArgs.from_dict(SAMPLES[sample])) for sample in samples]
    return [(name, small_copy(model_args(name), name, context=context))]


def model_args(name: str) -> ModelArgs:
    """Return the arguments of a named model.

    Args:
        name: A model, adapter or run folder, a GGUF file, `smollm2`, a hub id, a preset, a
            `config.json` or `params.json`, or a YAML or JSON file with the fields of a model
            or the config of a run.

    Raises:
        RequestError: If there is no such model.
    """
    path = Path(name)
    if not path.is_file() or path.name in (CONFIG, PARAMS) or is_gguf(path):
        return describe_model(name).args
    fields = _fields(path)
    return read_config(path).model_args(None) if _is_run(fields) else ModelArgs.from_dict(fields)


def run_args(name: str) -> TrainArgs:
    """Return the config of a named run, or the default config with a named model."""
    path = Path(name)
    if (path / "config.yaml").exists():
        path = path / "config.yaml"
    fields_file = path.is_file() and path.name != CONFIG and not is_gguf(path)
    if fields_file and _is_run(_fields(path)):
        return read_config(path)
    return TrainArgs(model=model_args(name).to_dict())


def _is_run(fields: Mapping[str, Any]) -> bool:
    """Return whether fields are those of a run: they include one that a model doesn't have."""
    return bool(set(fields) & (set(field_types(TrainArgs)) - set(field_types(ModelArgs))))


def _fields(path: Path) -> dict[str, Any]:
    """Return the fields in a YAML or JSON file.

    Raises:
        RequestError: If the file is empty or is not a mapping.
    """
    fields = read_yaml(path)
    expect(bool(fields), str(path), None, "a mapping of fields")
    return fields

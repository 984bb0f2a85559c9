"""Convert a model folder to another format, tensor by tensor from memory map to file.

No model is built, unless an adapter is merged into its base on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json
from transom.base.runtime import DTYPES
from transom.checkpoints.files.checksums import verify_step
from transom.checkpoints.files.companions import carry_companions
from transom.checkpoints.files.generation_config import ids_of, stated_settings
from transom.checkpoints.files.layout import CONFIG, Format, gguf_files
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.files.staging import staged
from transom.checkpoints.load import count_nonfinite, load, warn_nonfinite
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import plan_layout
from transom.checkpoints.state import open_parameters
from transom.config.model_args import ModelArgs
from transom.lora.adapters import plain_weights
from transom.lora.merge import fold_adapters


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        source: The folders that were read.
        source_format: The format of the model folder, or `gguf`.
        format: The format that was written.
        parameters: The number of parameters.
        bytes: Bytes of weights written.
        companions: The names of the files beside the weights.
    """

    source: ModelLocation
    source_format: str
    format: Format
    parameters: int
    bytes: int
    companions: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    format: Format = "hf",
    dtype: str | None = None,
    max_shard_size: str | None = None,
    revision: str | None = None,
) -> Converted:
    """Write a model in another format, with the files beside its weights.

    Args:
        source: A model or adapter folder, a run folder for its best step, or a hub id. An adapter
            is merged into its base.
        out: The folder to write, which must be another one.
        format: As for `save`.
        dtype: As for `save`; None keeps the dtype of the files.
        max_shard_size: As for `save`.
        revision: Branch, tag or commit of a hub id.

    Raises:
        RequestError: As for `load` and `save`, or `out` is a folder that is read.
        WorkError: As for `save`.
    """
    require(dtype is None or dtype in DTYPES, "dtype", dtype, f"expected {', '.join(DTYPES)}")
    location = find_model(source, revision)
    if Path(out).resolve() in (folder.resolve() for folder in location.folders):
        raise RequestError(f"{out}: is the folder that is read; expected another one")
    args, state = open_merged(location, dtype)
    counts: dict[str, int] = {}
    ours = {name: _counted(name, lazy, counts) for name, lazy in state.items()}
    layout = plan_layout(args, ours, format, dtype, max_shard_size)
    if format == "hf":
        layout.config.update(config_ids(location))
    with staged(Path(out)) as folder:
        layout.write(folder)
        companions = carry_companions(location, folder)
    warn_nonfinite(counts, str(location))
    if format == "hf" and "tokenizer.model" in companions and "tokenizer.json" not in companions:
        notice(
            f"{out}: tokenizer.model was copied; many tools need a tokenizer.json, which is missing"
        )
    size = sum(meta.nbytes for group in layout.groups for meta in group.metas)
    parameters = sum(torch.Size(lazy.shape).numel() for lazy in state.values())
    kind = "gguf" if gguf_files(location.model) else location.format
    return Converted(location, kind, format, parameters, size, tuple(companions))


def open_merged(location: ModelLocation, dtype: str | None = None) -> tuple[ModelArgs, LazyTensors]:
    """Return a model's arguments and parameters, with the adapter merged if there is one.

    Without an adapter, the parameters are not read yet. To merge one, the whole model is loaded. If
    the caller casts to `dtype`, it is loaded in float32 or wider, so that the sum is rounded once.

    Raises:
        RequestError: As for `load`.
    """
    if location.adapter is None:
        verify_step(location.model)
        args = read_args(location.model)
        return args, open_parameters(location.model, args)
    wide = None if dtype is None else "float64" if dtype == "float64" else "float32"
    model = fold_adapters(load(location, dtype=wide))
    weights = plain_weights(model).items()
    return model.args, {name: LazyTensor.of(weight.detach()) for name, weight in weights}


def config_ids(location: ModelLocation) -> dict[str, Any]:
    """Return the ids for the config of the result: those of the base's config come first."""
    own = read_json(location.model / CONFIG) if location.format == "hf" else {}
    return {**ids_of(stated_settings(location.folders)), **ids_of(own)}


def _counted(name: str, lazy: LazyTensor, counts: dict[str, int]) -> LazyTensor:
    """Return the same tensor; reading it counts its NaN and infinite numbers."""

    def read() -> Tensor:
        tensor = lazy.read()
        counts[name] = count_nonfinite(tensor)
        return tensor

    return LazyTensor(lazy.shape, lazy.dtype, read)

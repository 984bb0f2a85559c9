"""Convert a model folder to another format, tensor by tensor from memory map to file.

No model is built, unless an adapter is merged into its base on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from transom.base.errors import expect, notice
from transom.base.files import read_json
from transom.checkpoints.exported import Programs, dense_model, export_programs
from transom.checkpoints.files.checksums import verify_step
from transom.checkpoints.files.companions import carry_companions
from transom.checkpoints.files.generation_config import ids_of, stated_settings
from transom.checkpoints.files.layout import CONFIG, FileFormat, gguf_files
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.files.staging import staged
from transom.checkpoints.gguf.write import GgufLayout
from transom.checkpoints.load import count_nonfinite, load, warn_nonfinite
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import FolderLayout, check_dtype, plan_layout
from transom.checkpoints.state import open_codes, open_parameters
from transom.config.model_args import ModelArgs
from transom.lora.adapters import plain_weights
from transom.lora.merge import fold_adapters

ConvertFormat = FileFormat | Literal["awq", "exported"]


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
    format: ConvertFormat
    parameters: int
    bytes: int
    companions: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    format: ConvertFormat | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    revision: str | None = None,
    *,
    keep_quantized: bool = False,
    context: int | None = None,
    batch: int | None = None,
) -> Converted:
    """Write a model in another format, with the files beside its weights.

    Args:
        source: A model or adapter folder, a run folder for its best step, or a hub id. An adapter
            is merged into its base.
        out: The folder to write, or the file with the format `gguf`. It must be another one.
        format: As for `save`; None is `gguf` if the name ends in .gguf, and otherwise `hf`.
            `exported` writes programs of torch.export. `awq` is `hf` with the codes of a quantized
            folder in the layout of AWQ (GEMM), if all of them are int4 in groups of one size.
        dtype: As for `save`; None keeps the dtype of the files.
        max_shard_size: As for `save`.
        revision: Branch, tag or commit of a hub id.
        keep_quantized: Keep weights in codes in the formats `hf` and `native`, as `save` does.
            Without it, they are dequantized. GGUF files always have them if they have such a type.
        context: With `exported`, tokens per row that fit into the cache (default: at most 2048).
        batch: With `exported`, rows of every call (default: 1).

    Raises:
        RequestError: As for `load` and `save`, or `out` is what is read.
        WorkError: As for `save`.
    """
    out = Path(out)
    format = format or ("gguf" if out.suffix == ".gguf" else "hf")
    fits = format == "gguf" or out.suffix != ".gguf"
    expect(fits, "format", format, "gguf, as OUT ends in .gguf")
    check_dtype(format, dtype)
    for name, value in (("context", context), ("batch", batch)):
        expect(format == "exported" or value is None, name, value, "none without format exported")
    location = find_model(source, revision)
    files = gguf_files(location.model)
    read = [path.resolve() for path in (*location.folders, *files)]
    expect(out.resolve() not in read, "OUT", str(out), "a file or folder that is not read")
    args, state = open_merged(location, dtype)
    counts: dict[str, int] = {}
    ours = {name: _counted(name, lazy, counts) for name, lazy in state.items()}
    codes, awq = {}, format == "awq"
    if location.adapter is None and (format == "gguf" or keep_quantized or awq):
        codes = open_codes(location.model, args, {name: one.shape for name, one in state.items()})
    expect(bool(codes) or not awq, "format", format, "hf, as SRC has no codes")
    expected = "a quantized folder or GGUF file, and format hf or native"
    fits = bool(codes) and format in ("hf", "native", "awq")
    expect(fits or not keep_quantized, "keep_quantized", keep_quantized, expected)
    layout: FolderLayout | GgufLayout | Programs
    if format == "exported":
        expected = "none, since the weights of programs are one file"
        expect(max_shard_size is None, "max_shard_size", max_shard_size, expected)
        rows = 1 if batch is None else batch
        layout = export_programs(dense_model(args, ours, dtype), context, rows)
    else:
        of_files: FileFormat = "hf" if format == "awq" else format
        layout = plan_layout(args, ours, of_files, dtype, max_shard_size, codes, awq=awq)
    if format in ("hf", "awq"):
        layout.config.update(config_ids(location))
    with staged(out, file=layout.file) as folder:
        companions = carry_companions(location, folder)
        size = layout.write(folder)
    warn_nonfinite(counts, str(location))
    if (
        format in ("hf", "awq")
        and "tokenizer.model" in companions
        and "tokenizer.json" not in companions
    ):
        notice(
            f"{out}: tokenizer.model was copied; many tools need a tokenizer.json, which is missing"
        )
    own = "gguf" if files else location.format
    parameters = sum(torch.Size(lazy.shape).numel() for lazy in state.values())
    return Converted(location, own, format, parameters, size, tuple(companions))


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
    model = fold_adapters(load(location, dtype=wide, keep_quantized=False))
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

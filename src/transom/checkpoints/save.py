"""Save models in the formats of Transom, Hugging Face, Meta, Mistral and llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

from transom.base.errors import expect, notice, require
from transom.base.files import write_text
from transom.base.runtime import DTYPES
from transom.checkpoints.families.hf import args_from_hf, args_to_hf
from transom.checkpoints.families.registry import PARAMS_FAMILIES, WEIGHT_NAMES
from transom.checkpoints.files.consolidated import write_pickled
from transom.checkpoints.files.generation_config import ids_of, settings_to_write, write_settings
from transom.checkpoints.files.layout import (
    CONFIG,
    CONSOLIDATED,
    MODEL_TYPE,
    PARAMS,
    WEIGHTS,
    FileFormat,
)
from transom.checkpoints.files.lazy_tensors import (
    LazyTensor,
    LazyTensors,
    TensorGroup,
    cast,
    main_dtype,
)
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.files.safetensors_files import parse_size, write_stream
from transom.checkpoints.files.staging import staged
from transom.checkpoints.gguf.write import GGUF_DTYPES, GgufLayout, plan_gguf
from transom.checkpoints.mapping import to_foreign
from transom.checkpoints.quantized.codes import Codes
from transom.checkpoints.quantized.config import KEY as QUANTIZATION
from transom.checkpoints.quantized.folder import quantized_groups
from transom.checkpoints.state import meta_model
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.lora.adapters import plain_weights
from transom.models.llm import LLM
from transom.names.transforms import permute_rotary
from transom.quantize.leaves import quantized_leaves
from transom.tokenizers.tokenizer import Tokenizer

MAX_SHARD_SIZE = "5GB"


def save(
    model: LLM,
    folder: str | Path,
    format: FileFormat = "native",
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    weights: LazyTensors | None = None,
) -> None:
    """Save a model with its config, its generation settings and a tokenizer.

    An existing folder gets the new files, completely or not at all. The generation settings are
    those of the folder that the model was loaded from, with the ids of the tokenizer for those that
    it does not state.

    Args:
        model: The model; its adapters are left out unless they are merged. Quantized leaves are
            written in codes where the format has them, and otherwise dequantized, with a notice.
        folder: The folder to write, or the file with the format `gguf`.
        format: `native`, or `hf`, `meta`, `mistral` or `gguf` for the codes that read those.
        tokenizer: The tokenizer to write beside the weights.
        dtype: The dtype of the weights; None keeps the model's. A GGUF file may also have `q8_0`,
            `q4_0` or `q4_1`.
        max_shard_size: The size of a weights file, such as `500MB` (default: 5GB); valid for
            `native` and `hf`.
        weights: The parameters to write, by their names; None writes those of the model.

    Raises:
        RequestError: An argument is wrong, the format cannot hold the model, or the model is on the
            meta device.
        WorkError: The files could not be written, or weights are too large for the dtype.
    """
    plain = plain_weights(model, quantized=True) if weights is None else {}
    for name, one in plain.items():
        expect(not one.is_meta, f"{name}: device", "meta", "weights on a device that holds values")
    ours = {name: LazyTensor.of(one.detach()) for name, one in plain.items()} | dict(weights or {})
    leaves = {f"{path}.weight": leaf for path, leaf in quantized_leaves(model).items()}
    for name, leaf in leaves.items():
        ours[name] = LazyTensor(leaf.shape, leaf.weight_dtype, leaf.dequantize)
    codes = {name: Codes.of(leaf) for name, leaf in leaves.items()}
    layout = plan_layout(model.args, ours, format, dtype, max_shard_size, codes)
    settings = settings_to_write(model.generation_settings, tokenizer, str(folder))
    if format == "hf":
        layout.config.update(ids_of(settings))
    with staged(Path(folder), file=layout.file) as out:
        if tokenizer is not None:
            tokenizer.save(out)
        write_settings(out, settings)
        layout.write(out)


@dataclass(frozen=True)
class FolderLayout:
    """The config and the weights of a folder to write; shards have at most `max_bytes`."""

    format: FileFormat
    config: dict[str, Any]
    groups: Sequence[TensorGroup]
    max_bytes: int | None
    file: ClassVar[str] = ""

    def write(self, out: Path) -> int:
        """Write the weights, then the config; return the bytes of the weights."""
        if self.format == "meta":
            write_pickled(out, self.groups)
        else:
            name = CONSOLIDATED if self.format == "mistral" else WEIGHTS
            write_stream(out, self.groups, self.max_bytes, name)
        name = CONFIG if self.format in ("native", "hf") else PARAMS
        write_text(out / name, json.dumps(self.config, indent=2))
        return sum(meta.nbytes for group in self.groups for meta in group.metas)


def check_dtype(format: str, dtype: str | None) -> None:
    """Raise `RequestError` unless a format has a dtype, by the names of `save`."""
    names = GGUF_DTYPES if format == "gguf" else DTYPES
    expect(dtype is None or dtype in names, "dtype", dtype, ", ".join(names))


def check_out(
    out: str | Path,
    location: ModelLocation,
    args: ModelArgs,
    format: FileFormat,
    dtype: str | None = None,
) -> None:
    """Check the folder and the format of a model to write, before the model is made.

    Args:
        out: The folder to write.
        location: The model to read.
        args: The arguments of the model to write.
        format: As for `save`.
        dtype: As for `save`.

    Raises:
        RequestError: If `out` is one of the folders that are read, or as for `plan_layout`.
    """
    unread = Path(out).resolve() not in [folder.resolve() for folder in location.folders]
    expect(unread, "out", str(out), "a folder that is not read")
    shapes = {name: LazyTensor.of(one) for name, one in meta_model(args).named_parameters()}
    plan_layout(args, shapes, format, dtype)


def plan_layout(
    args: ModelArgs,
    ours: LazyTensors,
    format: FileFormat,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    codes: Mapping[str, Codes] | None = None,
    *,
    awq: bool = False,
) -> FolderLayout | GgufLayout:
    """Return everything that is written for a model in a format, before anything is written.

    Args:
        args: The model's arguments.
        ours: Its parameters under Transom's names. They are read while they are written.
        format: As for `save`.
        dtype: As for `save`.
        max_shard_size: As for `save`.
        codes: The parameters that are in codes. Formats that have these codes store them.
        awq: Store them in the layout of AWQ, with the format `hf`.

    Raises:
        RequestError: As for `save`.
    """
    formats, sharded = get_args(FileFormat), format in ("native", "hf")
    expect(format in formats, "format", format, ", ".join(formats))
    check_dtype(format, dtype)
    one_file = f"valid only with native and hf, since format {format} is one file"
    require(sharded or max_shard_size is None, "max_shard_size", max_shard_size, one_file)
    if format == "gguf":
        return plan_gguf(args, ours, dtype, codes or {})
    codes = codes or {}
    ours = cast(ours, None if dtype is None else DTYPES[dtype])
    kind = main_dtype({name: lazy for name, lazy in ours.items() if name not in codes})
    size = max_shard_size or MAX_SHARD_SIZE
    max_bytes = parse_size(size, "max_shard_size") if sharded else None
    layout: RopeLayout = "interleaved"
    if format == "native":
        config: dict[str, Any] = {"model_type": MODEL_TYPE, **args.to_dict()}
        family, layout = MODEL_TYPE, args.rope_layout
    elif format == "hf":
        config = args_to_hf(args)
        config["torch_dtype"] = str(kind).removeprefix("torch.")
        family = str(config["model_type"])
        # Halves stay halves in every family.
        layout = (
            "halves" if args.rope_layout == "halves" else args_from_hf(config, CONFIG).rope_layout
        )
    else:
        args, ours = _untied(args, ours, format)
        written = PARAMS_FAMILIES[format].config_of(replace(args, rope_layout="interleaved"))
        shapes = {"meta": "Llama 2, 3 and 4", "mistral": "Mistral and Mixtral"}[format]
        expected = f"hf or native: {format} has the shapes of {shapes}"
        expect(written is not None, "format", format, expected)
        config, family = written or {}, f"params_{format}"
    if args.rope_layout != layout:
        change = partial(permute_rotary, args=args, to=layout)
        ours = {name: lazy.then(partial(change, name)) for name, lazy in ours.items()}
        codes = {name: one.plain().reordered(partial(change, name)) for name, one in codes.items()}
    mappings = WEIGHT_NAMES[family].mappings(args, ours)
    groups = to_foreign(mappings, ours, f"format {format}")
    if codes and sharded:
        groups, config[QUANTIZATION] = quantized_groups(mappings, groups, codes, kind, awq=awq)
    elif codes:
        notice(f"{len(codes)} weights are dequantized, as format {format} has no codes")
    return FolderLayout(format, config, groups, max_bytes)


def _untied(args: ModelArgs, ours: LazyTensors, format: str) -> tuple[ModelArgs, LazyTensors]:
    """Return a model whose output is a copy of the embeddings if they are tied."""
    if not args.tie_embeddings:
        return args, ours
    notice(
        f"format {format} has no tied output: the embeddings are written twice, and read back as "
        "two matrices"
    )
    return replace(args, tie_embeddings=False), {
        **ours,
        "output.weight": ours["tok_embeddings.weight"],
    }

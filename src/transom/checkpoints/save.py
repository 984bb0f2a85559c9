"""Models into folders: native, Hugging Face's, Meta's and Mistral's layout, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from transom.base.errors import RequestError, notice
from transom.base.files import write_text
from transom.base.runtime import DTYPES
from transom.checkpoints.families.hf import args_from_hf, args_to_hf
from transom.checkpoints.families.meta_params import args_to_meta
from transom.checkpoints.families.mistral_params import args_to_mistral
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.consolidated import write_pickled
from transom.checkpoints.files.generation_config import ids_of, settings_to_write, write_settings
from transom.checkpoints.files.layout import (
    CONFIG,
    CONSOLIDATED,
    MODEL_TYPE,
    PARAMS,
    WEIGHTS,
    Format,
)
from transom.checkpoints.files.lazy_tensors import (
    LazyTensor,
    LazyTensors,
    TensorGroup,
    cast,
    main_dtype,
)
from transom.checkpoints.files.safetensors_files import parse_size, write_stream
from transom.checkpoints.files.staging import staged
from transom.checkpoints.mapping import to_foreign
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.lora.adapters import plain_weights
from transom.models.llm import LLM
from transom.names.transforms import permute_rotary
from transom.tokenizers.tokenizer import Tokenizer

MAX_SHARD_SIZE = "5GB"


def save(
    model: LLM,
    folder: str | Path,
    format: Format = "native",
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Write config, weights and tokenizer into `folder`; `hf`, `meta` and `mistral` are what those
    codes read.

    Weights keep their dtype unless one is named; native and hf files are cut at `max_shard_size`
    (5GB). What the folder that the model was loaded from states on generation is written too; what
    it does not state comes from the tokenizer.
    """
    ours = {
        name: LazyTensor.of(parameter.detach()) for name, parameter in plain_weights(model).items()
    }
    for name, stored in ours.items():
        if stored.read().is_meta:
            raise RequestError(
                f"{name}: on the meta device, which has no values; expected a model with weights"
            )
    layout = plan_layout(model.args, ours, format, dtype, max_shard_size)
    settings = settings_to_write(model.generation_settings, tokenizer, str(folder))
    if format == "hf":
        layout.config.update(ids_of(settings))
    with staged(Path(folder)) as out:
        if tokenizer is not None:
            tokenizer.save(out)
        write_settings(out, settings)
        layout.write(out)


@dataclass(frozen=True)
class FolderLayout:
    """What is to be written: the config and its file's name, and the weights as batches."""

    format: Format
    config: dict[str, Any]
    batches: Sequence[TensorGroup]
    max_bytes: int | None

    def write(self, out: Path) -> None:
        """Weights first, then the config that makes the folder a model."""
        if self.format == "meta":
            write_pickled(out, self.batches)
        else:
            write_stream(
                out,
                self.batches,
                self.max_bytes,
                CONSOLIDATED if self.format == "mistral" else WEIGHTS,
            )
        name = CONFIG if self.format in ("native", "hf") else PARAMS
        write_text(out / name, json.dumps(self.config, indent=2))


def plan_layout(
    args: ModelArgs,
    ours: LazyTensors,
    format: Format,
    dtype: str | None = None,
    max_shard_size: str | None = None,
) -> FolderLayout:
    """All that `format` wants, before anything is written; what it cannot hold is a
    `RequestError`.
    """
    if format not in get_args(Format):
        raise RequestError(f"format: got {format!r}; expected {', '.join(get_args(Format))}")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    if max_shard_size is not None and format not in ("native", "hf"):
        raise RequestError(
            f"max_shard_size: got {max_shard_size!r}; format {format} is one file; expected none"
        )
    ours = cast(ours, None if dtype is None else DTYPES[dtype])
    max_bytes = (
        parse_size(max_shard_size or MAX_SHARD_SIZE, "max_shard_size")
        if format in ("native", "hf")
        else None
    )
    if format == "native":
        config: dict[str, Any] = {"model_type": MODEL_TYPE, **args.to_dict()}
        batches = [TensorGroup((name,), (one.meta,), _reader(one)) for name, one in ours.items()]
        return FolderLayout(format, config, batches, max_bytes)
    if format == "hf":
        config = args_to_hf(args)
        config["torch_dtype"] = str(main_dtype(ours)).removeprefix("torch.")
        table, rotary = str(config["model_type"]), args.rope_layout
        if rotary == "interleaved":  # halves stay halves in every family
            rotary = args_from_hf(config, CONFIG).rope_layout
    else:
        args, ours = _untied(args, ours, format)
        plain = replace(args, rope_layout="interleaved")
        config = args_to_meta(plain) if format == "meta" else args_to_mistral(plain)
        table, rotary = f"params_{format}", "interleaved"
    state = {name: _turned(name, one, args, rotary) for name, one in ours.items()}
    batches = to_foreign(WEIGHT_NAMES[table].mappings(args, state), state, f"format {format}")
    return FolderLayout(format, config, batches, max_bytes)


def _reader(stored: LazyTensor) -> Callable[[], list[Tensor]]:
    return lambda: [stored.read()]


def _untied(args: ModelArgs, ours: LazyTensors, format: str) -> tuple[ModelArgs, LazyTensors]:
    """Codes that know no tying get the embeddings a second time, as the output."""
    if not args.tie_embeddings:
        return args, ours
    notice(
        f"format {format} knows no tied output: the embeddings are written twice, and read back "
        f"as two matrices"
    )
    return replace(args, tie_embeddings=False), {
        **ours,
        "output.weight": ours["tok_embeddings.weight"],
    }


def _turned(name: str, stored: LazyTensor, args: ModelArgs, to: RopeLayout) -> LazyTensor:
    if args.rope_layout == to:
        return stored
    return stored.then(lambda tensor: permute_rotary(name, tensor, args, to))

"""Open the parameters of a model folder, with every key accounted for and every shape checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from transom.base.errors import RequestError, notice
from transom.base.files import refuse_pointer, shown_name
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.consolidated import open_ranks
from transom.checkpoints.files.layout import (
    CONSOLIDATED,
    INDEX,
    first_names,
    gguf_files,
    names_table,
    other_weights,
    weight_files,
)
from transom.checkpoints.files.lazy_tensors import LazyTensor, refuse_quantized
from transom.checkpoints.files.safetensors_files import open_safetensors
from transom.checkpoints.gguf.weights import gguf_codes, open_gguf
from transom.checkpoints.mapping import clean, to_ours
from transom.checkpoints.quantized.codes import Codes, under_our_names
from transom.checkpoints.quantized.config import stated_quantization
from transom.checkpoints.quantized.folder import open_quantized
from transom.checkpoints.read_args import read_args
from transom.config.model_args import ModelArgs
from transom.models.llm import LLM
from transom.names.tables import KeyMapping
from transom.names.transforms import Shape
from transom.planning.tables import counted


def meta_model(args: ModelArgs) -> LLM:
    """Return the model on the meta device: it has every parameter's shape and takes no memory."""
    with torch.device("meta"):
        return LLM(args)


def open_parameters(
    folder: Path, args: ModelArgs | None = None, *, apart: bool = False
) -> dict[str, LazyTensor]:
    """Return the parameters of a model folder under Transom's names, not read yet.

    Args:
        folder: A model folder of any format.
        args: The model's arguments; None reads them from the folder.
        apart: As for `open_safetensors`. Pickles of torch's old layout are in memory all the same.

    Raises:
        RequestError: Weights are missing, left over, quantized or of another shape than the model
            has. One message names all of them.
    """
    args = read_args(folder) if args is None else args
    shapes = {name: tuple(one.shape) for name, one in meta_model(args).named_parameters()}
    table, where = names_table(folder), shown_name(folder)
    source = clean(table, open_files(folder, args, apart=apart), args, where)
    mappings = WEIGHT_NAMES[table].mappings_to_read(args, shapes)
    if stated_quantization(folder) is not None:
        source = _without_empty_biases(source, mappings, where)
    refuse_quantized(source, where)
    return to_ours(mappings, source, shapes, where)


def _without_empty_biases(
    source: dict[str, LazyTensor], mappings: Sequence[KeyMapping], where: str
) -> dict[str, LazyTensor]:
    """Return tensors without the biases of zeros that AutoGPTQ writes for layers without one."""
    known = {key for mapping in mappings for key in mapping.foreign}
    unknown = [key for key in source if key.endswith(".bias") and key not in known]
    empty = [key for key in unknown if not source[key].read().any()]
    if empty:
        notice(f"{where}: {counted(len(empty), 'tensor')} left unread: biases of zeros")
    return {key: lazy for key, lazy in source.items() if key not in empty}


def open_files(folder: Path, args: ModelArgs, *, apart: bool = False) -> dict[str, LazyTensor]:
    """Return all tensors of a model folder by their names in its files, not read yet.

    Print a notice if files of weights are ignored. The arguments are those of `open_parameters`.

    Raises:
        RequestError: Files of weights are missing or damaged.
    """
    if gguf_files(folder):
        return open_gguf(folder, apart=apart)
    taken = weight_files(folder)
    others = other_weights(folder, taken)
    if not any((folder / file).exists() for file in taken.files):
        for other in others:
            refuse_pointer(folder / other)
        single = taken.files[0] if taken.files else CONSOLIDATED
        found = f"{first_names(others)} is there" if others else "no weights"
        raise RequestError(f"{folder}: {found}; expected {single}, or shards and {single}{INDEX}")
    if others:
        read, ignored = first_names(taken.files), first_names(others)
        notice(f"{folder}: weights are read from {read}; ignored: {ignored}")
    if taken.files[0].endswith(".pth"):
        return open_ranks(folder, taken.files, args, apart=apart)
    if stated_quantization(folder) is None:
        return open_safetensors(folder, taken.files, apart=apart)
    plain, codes = open_quantized(folder)
    return plain | {key: one.dense() for key, one in codes.items()}


def open_codes(
    folder: Path, args: ModelArgs, leaves: Mapping[str, Shape], *, apart: bool = False
) -> dict[str, Codes]:
    """Return the weights of leaves that are in codes in the files of a folder, not read yet.

    Args:
        folder: A model folder of any format.
        args: Its model.
        leaves: The shapes of all weights of leaves, by our names.
        apart: As for `open_parameters`.

    Raises:
        RequestError: As for `open_parameters`.
    """
    in_gguf = bool(gguf_files(folder))
    if not in_gguf and stated_quantization(folder) is None:
        return {}
    source = gguf_codes(folder, apart=apart) if in_gguf else open_quantized(folder)[1]
    names = WEIGHT_NAMES[names_table(folder)]
    source = {names.known_key(key): one for key, one in source.items()}
    return under_our_names(names.mappings_to_read(args, leaves), source, leaves)

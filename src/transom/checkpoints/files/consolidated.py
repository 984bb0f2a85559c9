"""`consolidated.XX.pth`: opened as memory maps without running code, ranks laid together, and
written.

The rules by which Meta's code cuts a model for parallel ranks are those of meta-llama/llama-models,
models/checkpoint.py.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from transom.base.errors import RequestError, WorkError, notice
from transom.base.files import refuse_pointer
from transom.checkpoints.files.layout import PICKLED, weight_files
from transom.checkpoints.files.lazy_tensors import LazyTensor, TensorGroup
from transom.checkpoints.files.safetensors_files import (
    open_safetensors,
    read_safetensors,
    write_stream,
)
from transom.config.model_args import ModelArgs

_ZIP = b"PK\x03\x04"


def _no_bytes(*size: object) -> bytes:
    """Return `bytes()`; refuse arguments, with which a file could take any amount of memory."""
    if size:
        raise ValueError("a pickle that asks for bytes")
    return b""


# Extra states of Meta's training library are BytesIO objects, most of them empty. They run no code.
# A pickle writes an empty one with a call of `bytes`.
_OF_EXTRA_STATES: list[Any] = [io.BytesIO, (_no_bytes, "builtins.bytes")]

# How the parts that ranks hold make a whole: rows below rows, columns beside columns, experts one
# by one, fused matrices part by part; what no pattern names is held by every rank.
Rule = Literal["rows", "columns", "experts", "qkv", "pair", "kv", "embedding", "same"]
_RULES: tuple[tuple[str, Rule], ...] = (
    (r"attention\.wqkv\.weight", "qkv"),
    (r"mlp\.fc1_weight", "pair"),
    (r"experts\.moe_w_out_eF_D", "experts"),
    (r"experts\.moe_w_(in|swiglu)_eD_F", "columns"),
    (r"layers\.\d+\.attention\.(wk|wv)\.(weight|bias)", "kv"),
    (r"tok_embeddings\.weight", "embedding"),
    (r"(wo|w2|w_out_shared_DF|mlp\.c_proj)\.weight|mlp\.fc2_weight", "columns"),
    (
        r"(wq|wk|wv|mlp\.c_fc)\.(weight|bias)|(w1|w3|output|w_in_shared_FD|w_swiglu_FD)\.weight",
        "rows",
    ),
    (r"conv1\._linear\.weight|vision_projection\.weight", "rows"),
)


def open_ranks(folder: Path, files: Sequence[str], args: ModelArgs) -> dict[str, LazyTensor]:
    """Return the tensors of a model whose weights are cut into one `.pth` file per rank.

    Args:
        folder: The model folder.
        files: The names of the files, in the order of the ranks.
        args: The model's arguments, which decide where some tensors are joined.

    Raises:
        RequestError: A rank is missing or damaged, or the parts do not fit together.
    """
    parts = _read_ranks(folder, files)
    return {key: _joined(key, [state[key] for state in parts], args, folder) for key in parts[0]}


def _read_ranks(folder: Path, files: Sequence[str]) -> list[dict[str, Tensor]]:
    for rank, name in enumerate(files):
        expected = PICKLED.format(rank=rank)
        if name != expected:
            raise RequestError(f"{folder / expected}: missing, {name} is there")
    parts = [read_pickled(folder / name) for name in files]
    for name, state in zip(files, parts, strict=True):
        odd = next(iter(sorted(parts[0].keys() ^ state.keys())), None)
        if odd is not None:
            raise RequestError(
                f"{folder / name}: {odd} is in {files[0]} or in this file, not in both"
            )
    return parts


def vocabulary_of(folder: Path, dim: int) -> int:
    """Return the number of token embeddings in the weights of a folder in Meta's format.

    The `params.json` of Llama 1 and 2 does not state it.

    Raises:
        RequestError: There are no weights or no embeddings.
    """
    key, files = "tok_embeddings.weight", weight_files(folder).files
    if files and files[0].endswith(".pth"):
        shapes = [tuple(part[key].shape) for part in _read_ranks(folder, files) if key in part]
    else:
        tensors = open_safetensors(folder, files)
        shapes = [tensors[key].shape] if key in tensors else []
    if not shapes or len(shapes[0]) != 2:
        raise RequestError(f"{folder}: {key} is missing, and params.json gives no vocab_size")
    return shapes[0][0] if shapes[0][1] != dim else sum(shape[0] for shape in shapes)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of one .pth file, views of its memory map; whatever a pickle could run is a
    `RequestError`.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == _ZIP
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    if zipped and not zipfile.is_zipfile(path):
        raise RequestError(f"{path}: not a whole checkpoint, its end is missing")
    try:
        with torch.serialization.safe_globals(_OF_EXTRA_STATES):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle fails in any way it likes
        refuse_pointer(path)
        asked = (
            re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError)
            else None
        )
        if asked:
            raise RequestError(
                f"{path}: wants to run {asked[1]}; expected files of tensors alone"
            ) from None
        raise RequestError(f"{path}: not a whole checkpoint ({type(error).__name__})") from None
    if not zipped:
        notice(f"{path}: of a layout that cannot be mapped: all of it was read into memory")
    if not isinstance(state, dict):
        raise RequestError(f"{path}: holds a {type(state).__name__}; expected named tensors")
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, (Tensor, io.BytesIO)):
            raise RequestError(f"{path}: {key} is a {type(value).__name__}; expected named tensors")
        out[str(key)] = value.detach() if isinstance(value, Tensor) else torch.empty(0)
    return out


def _joined(key: str, parts: Sequence[Tensor], args: ModelArgs, folder: Path) -> LazyTensor:
    """The parts of all ranks as one tensor, laid together when it is read."""
    if len(parts) == 1:
        return LazyTensor.of(parts[0])
    rule = rule_of(key)
    try:
        outline = join(rule, [part.to("meta") for part in parts], args)
    except (RuntimeError, IndexError):
        found = ", ".join(str(tuple(part.shape)) for part in parts)
        raise RequestError(
            f"{folder}: {key} has shapes {found} in {len(parts)} ranks, which do not fit"
        ) from None
    return LazyTensor(tuple(outline.shape), outline.dtype, lambda: join(rule, parts, args))


def rule_of(key: str) -> Rule:
    """How ranks share the tensor of this key."""
    return next(
        (rule for pattern, rule in _RULES if re.search(rf"(^|\.)({pattern})$", key)), "same"
    )


def join(rule: Rule, parts: Sequence[Tensor], args: ModelArgs) -> Tensor:
    """One tensor from those of all ranks."""
    match rule:
        case "same":
            return parts[0]
        case "rows":
            return torch.cat(list(parts))
        case "columns":
            return torch.cat(list(parts), -1)
        case "embedding":  # Llama 1 and 2 cut the features, later models the vocabulary
            return torch.cat(list(parts), 0 if parts[0].size(1) == args.dim else 1)
        case "kv":  # with more ranks than heads, neighbours hold the same head
            rows, wanted = sum(part.size(0) for part in parts), args.kv_heads * args.head_size
            return torch.cat(list(parts[:: max(rows // wanted, 1)]))
        case "experts":
            cut = [part.unflatten(0, (_experts(args), -1)) for part in parts]
            return torch.cat(cut, 1).flatten(0, 1)
        case "pair":
            halves = [part.chunk(2) for part in parts]
            return torch.cat([gate for gate, _ in halves] + [value for _, value in halves])
        case "qkv":
            unit = parts[0].size(0) // (args.n_heads + 2 * args.kv_heads)
            thirds = [
                part.split([unit * args.n_heads] + [unit * args.kv_heads] * 2) for part in parts
            ]
            return torch.cat([piece for pieces in zip(*thirds, strict=True) for piece in pieces])


def _experts(args: ModelArgs) -> int:
    return args.moe_args.num_experts if args.moe_args else 1


def write_pickled(folder: Path, batches: Sequence[TensorGroup]) -> None:
    """`consolidated.00.pth`, for one rank, without holding the model in memory."""
    # A pickle is written in one go: tensors go to a plain file first, and from its memory map into
    # the pickle.
    scratch = "scratch.safetensors"
    write_stream(folder, batches, None, scratch)
    path = folder / PICKLED.format(rank=0)
    try:
        torch.save(read_safetensors(folder / scratch), path)
    except (OSError, RuntimeError) as error:
        raise WorkError(f"{path}: could not be written ({error})") from None
    (folder / scratch).unlink()

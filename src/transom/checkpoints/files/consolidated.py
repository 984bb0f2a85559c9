"""Weights in `consolidated.XX.pth`: read without running code, joined over ranks, and written.

Meta's code cuts a model into one file per rank by the rules of meta-llama/llama-models,
models/checkpoint.py.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from transom.base.errors import RequestError, expect, explained, notice
from transom.base.files import refuse_pointer, writing
from transom.checkpoints.files.file_pieces import FilePiece, SourceFile, read_piece
from transom.checkpoints.files.layout import PICKLED, weight_files
from transom.checkpoints.files.lazy_tensors import LazyTensor, TensorGroup
from transom.checkpoints.files.safetensors_files import (
    read_safetensors,
    write_stream,
)
from transom.config.model_args import ModelArgs

_ZIP = b"PK\x03\x04"


def _no_bytes(*size: object) -> bytes:
    """Return `bytes()`; with an argument, a file could allocate any amount of memory."""
    if size:
        raise ValueError("a pickle that asks for bytes")
    return b""


# Extra states of Meta's training library are BytesIO objects, most of them empty. They run no code.
# A pickle writes an empty one with a call of `bytes`.
_EXTRA_STATES: list[Any] = [io.BytesIO, (_no_bytes, "builtins.bytes")]

# How the parts of a tensor are joined: as rows, as columns, expert by expert, or part by part of a
# fused matrix. A tensor without a pattern is the same on every rank.
Rule = Literal["rows", "columns", "experts", "qkv", "pair", "kv", "embedding", "same"]
_RULES: tuple[tuple[str, Rule], ...] = (
    (r"attention\.wqkv\.weight", "qkv"),
    (r"mlp\.fc1_weight", "pair"),
    (r"experts\.moe_w_out_eF_D", "experts"),
    (r"experts\.moe_w_(in|swiglu)_eD_F", "columns"),
    (r"layers\.\d+\.attention\.(wk|wv)\.(weight|bias)", "kv"),
    (r"tok_embeddings\.weight", "embedding"),
    (r"(wo|w2|w_out_shared_DF|mlp\.c_proj)\.weight|mlp\.fc2_weight", "columns"),
    (r"(wq|wk|wv|mlp\.c_fc)\.(weight|bias)", "rows"),
    (r"(w1|w3|output|w_in_shared_FD|w_swiglu_FD)\.weight", "rows"),
    (r"conv1\._linear\.weight|vision_projection\.weight", "rows"),
)


def open_ranks(
    folder: Path, files: Sequence[str], args: ModelArgs, *, apart: bool = False
) -> dict[str, LazyTensor]:
    """Return the tensors of a model whose weights are cut into one `.pth` file per rank.

    Args:
        folder: The model folder.
        files: The names of the files, in the order of the ranks.
        args: The model's arguments, which decide where some tensors are joined.
        apart: As for `open_safetensors`, for files that can be mapped.

    Raises:
        RequestError: A rank is missing or damaged, or the parts do not fit together.
    """
    states = _read_ranks(folder, files)
    parts = [_lazy(folder / name, one, apart) for name, one in zip(files, states, strict=True)]
    return {key: _joined(key, [state[key] for state in parts], args, folder) for key in parts[0]}


def _lazy(path: Path, state: Mapping[str, Tensor], apart: bool) -> dict[str, LazyTensor]:
    """Return the tensors of a file; if they are read apart, each has its place in the file."""
    out = {key: LazyTensor.of(tensor) for key, tensor in state.items()}
    if apart:
        with FakeTensorMode():  # the storages then have their offsets in the file
            places = read_pickled(path)
        file = SourceFile(path)
        for key, fake in places.items():
            offset = fake.untyped_storage()._checkpoint_offset
            if offset is not None and fake.is_contiguous():
                place = offset + int(fake.storage_offset()) * fake.itemsize
                piece = FilePiece(file, place, state[key].nbytes)
                read = functools.partial(read_piece, piece, fake.shape, fake.dtype)
                out[key] = replace(out[key], read=read, pieces=(piece,))
    return out


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
    pickled = bool(files) and files[0].endswith(".pth")
    parts = _read_ranks(folder, files) if pickled else [read_safetensors(folder / f) for f in files]
    shapes = [tuple(part[key].shape) for part in parts if key in part]
    if not shapes or len(shapes[0]) != 2:
        raise RequestError(f"{folder}: {key} is missing, and params.json gives no vocab_size")
    return shapes[0][0] if shapes[0][1] != dim else sum(shape[0] for shape in shapes)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.pth` or `.bin` file, as views of its memory map.

    Files of torch's old layout cannot be mapped and are read into memory, with a notice.

    Raises:
        RequestError: The file is missing or damaged, holds something else than named tensors, or
            its pickle would run code.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == _ZIP
        with torch.serialization.safe_globals(_EXTRA_STATES):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        refuse_pointer(path)
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"would run {code[1]}" if code else f"cannot be read ({type(error).__name__})"
        raise RequestError(f"{path}: {found}; expected a complete file of tensors") from None
    if not zipped:
        notice(f"{path}: of a layout that cannot be mapped: all of it was read into memory")
    named, out = isinstance(state, dict), dict[str, Tensor]()
    expect(named, str(path), type(state).__name__, "tensors with names")
    for key, value in state.items():
        right, kind = isinstance(value, Tensor | io.BytesIO), type(value).__name__
        expect(right, f"{path}: {key}", kind, "a tensor with a name")
        out[str(key)] = value.detach() if isinstance(value, Tensor) else torch.empty(0)
    return out


def _joined(key: str, parts: Sequence[LazyTensor], args: ModelArgs, folder: Path) -> LazyTensor:
    if len(parts) == 1:
        return parts[0]
    join, shapes = _JOIN[rule_of(key)], ", ".join(str(part.shape) for part in parts)
    found = f"{folder}: {key}: got shapes {shapes} in {len(parts)} ranks; expected ones that fit"
    with explained(found, RuntimeError, IndexError):
        return LazyTensor.made_of(parts, lambda tensors: join(tensors, args))


def rule_of(key: str) -> Rule:
    """Return how the parts of the tensor with this key are joined."""
    found = (rule for pattern, rule in _RULES if re.search(rf"(^|\.)({pattern})$", key))
    return next(found, "same")


def _joined_pieces(parts: Sequence[Tensor], shares: Sequence[int]) -> Tensor:
    """Return the first pieces of all parts as rows, then the second ones; `shares` cuts a part."""
    unit = parts[0].size(0) // sum(shares)
    pieces = [part.split([unit * share for share in shares]) for part in parts]
    return torch.cat([piece for same in zip(*pieces, strict=True) for piece in same])


def _joined_experts(parts: Sequence[Tensor], args: ModelArgs) -> Tensor:
    count = args.moe_args.num_experts if args.moe_args else 1
    return torch.cat([part.unflatten(0, (count, -1)) for part in parts], 1).flatten(0, 1)


def _joined_heads(parts: Sequence[Tensor], args: ModelArgs) -> Tensor:
    # If there are more ranks than heads, neighbours have the same head.
    rows, wanted = sum(part.size(0) for part in parts), args.kv_heads * args.head_size
    return torch.cat([*parts[:: max(rows // wanted, 1)]])


_JOIN: dict[Rule, Callable[[Sequence[Tensor], ModelArgs], Tensor]] = {
    "same": lambda parts, args: parts[0],
    "rows": lambda parts, args: torch.cat([*parts]),
    "columns": lambda parts, args: torch.cat([*parts], -1),
    # Llama 1 and 2 cut the features, later models the vocabulary.
    "embedding": lambda parts, args: torch.cat([*parts], int(parts[0].size(1) != args.dim)),
    "kv": _joined_heads,
    "experts": _joined_experts,
    "pair": lambda parts, args: _joined_pieces(parts, (1, 1)),
    "qkv": lambda parts, args: _joined_pieces(parts, (args.n_heads, args.kv_heads, args.kv_heads)),
}


def write_pickled(folder: Path, groups: Sequence[TensorGroup]) -> None:
    """Write `consolidated.00.pth`, for one rank, without holding the model in memory.

    Raises:
        WorkError: It could not be written.
    """
    # torch.save takes all tensors at once. They are written to a safetensors file first, whose
    # memory map is then saved.
    scratch, path = folder / "scratch.safetensors", folder / PICKLED.format(rank=0)
    write_stream(folder, groups, None, scratch.name)
    with writing(path, RuntimeError):
        torch.save(read_safetensors(scratch), path)
    scratch.unlink()

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
from transom.checkpoints.files.folders import PICKLED, SAFE, consolidated_files
from transom.checkpoints.files.lazy_tensors import Batch, Stored
from transom.checkpoints.files.safetensors_files import (
    open_safetensors,
    read_safetensors,
    write_stream,
)
from transom.checkpoints.files.weight_files import WeightFiles, find_weights, say_ignored
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


def open_consolidated(folder: Path, args: ModelArgs) -> dict[str, Stored]:
    """The whole tensors of a folder of Meta's or Mistral's, still in their files."""
    if _is_safe(folder):
        taken = find_weights(folder, SAFE)
        say_ignored(folder, taken)
        return open_safetensors(folder, taken.files)
    parts = _read_ranks(folder)
    say_ignored(folder, WeightFiles([path.name for path in consolidated_files(folder)]))
    return {key: _whole(key, [state[key] for state in parts], args, folder) for key in parts[0]}


def _is_safe(folder: Path) -> bool:
    return any(SAFE in path.name for path in consolidated_files(folder))


def _read_ranks(folder: Path) -> list[dict[str, Tensor]]:
    ranks = consolidated_files(folder)
    if not ranks:
        raise RequestError(
            f"{folder}: no weights; expected {SAFE} or {PICKLED.format(rank=0)} beside params.json"
        )
    for number, path in enumerate(ranks):
        if path.name != PICKLED.format(rank=number):
            raise RequestError(
                f"{folder / PICKLED.format(rank=number)}: missing, {path.name} is there"
            )
    parts = [read_pickled(path) for path in ranks]
    for path, state in zip(ranks, parts, strict=True):
        odd = next(iter(sorted(parts[0].keys() ^ state.keys())), None)
        if odd is not None:
            raise RequestError(
                f"{path}: {odd} stands in {ranks[0].name} or in this file, not in both"
            )
    return parts


def vocabulary_of(folder: Path, dim: int) -> int:
    """Tokens in the embeddings of a folder whose params.json does not say, as those of Llama 1 and
    2 do not.
    """
    key = "tok_embeddings.weight"
    if _is_safe(folder):
        stored = open_safetensors(folder, find_weights(folder, SAFE).files)
        shapes = [stored[key].shape] if key in stored else []
    else:
        shapes = [tuple(part[key].shape) for part in _read_ranks(folder) if key in part]
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


def _whole(key: str, parts: Sequence[Tensor], args: ModelArgs, folder: Path) -> Stored:
    """The parts of all ranks as one tensor, laid together when it is read."""
    if len(parts) == 1:
        return Stored.of(parts[0])
    rule = rule_of(key)
    try:
        outline = join(rule, [part.to("meta") for part in parts], args)
    except (RuntimeError, IndexError):
        found = ", ".join(str(tuple(part.shape)) for part in parts)
        raise RequestError(
            f"{folder}: {key} has shapes {found} in {len(parts)} ranks, which do not fit"
        ) from None
    return Stored(tuple(outline.shape), outline.dtype, lambda: join(rule, parts, args))


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


def write_pickled(folder: Path, batches: Sequence[Batch]) -> None:
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

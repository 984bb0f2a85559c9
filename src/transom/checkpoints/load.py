"""Weights from a folder of any format into a model, one tensor at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice
from transom.base.files import refuse_pointer
from transom.base.runtime import DTYPES, bound_kernel_caches, one_thread, pick_device
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.companions import stated_settings
from transom.checkpoints.files.consolidated import open_consolidated
from transom.checkpoints.files.folders import (
    CONFIG,
    Format,
    Found,
    find_model,
    folder_format,
    read_args,
    read_json,
    verify_step,
)
from transom.checkpoints.files.lazy_tensors import Stored, dtypes_of, refuse_quantized
from transom.checkpoints.files.safetensors_files import (
    ALIGNMENT,
    open_safetensors,
    read_safetensors,
    write_tensors,
    write_text,
)
from transom.checkpoints.files.weight_files import INDEX, WEIGHTS, find_weights, say_ignored
from transom.checkpoints.mapping import account, clean, to_ours
from transom.checkpoints.save import save
from transom.config.model_args import ModelArgs
from transom.models.llm import LLM
from transom.names.transforms import Shape
from transom.tokenizers.tokenizer import Tokenizer

__all__ = [
    "WEIGHTS",
    "load",
    "load_tokenizer",
    "open_state",
    "outline",
    "read_safetensors",
    "read_state",
    "save",
    "write_tensors",
    "write_text",
]

# What one thread reads before a second is awake on a machine that has other work.
_MANY_BYTES = 1 << 27


def load(
    folder: str | Path | Found,
    device: str = "cpu",
    dtype: str | None = None,
    revision: str | None = None,
) -> LLM:
    """The model of a folder or hub id, weights in the files' own dtype unless one is named; ready
    for inference.

    An adapter comes on its base, a run folder stands for its best step; what `find_model` found is
    taken as it is.

    Weights whose dtype is kept stay in their files' memory maps, which are private: while the model
    lives, such a file may be replaced, not written over. Where weights are computed or cast, memory
    holds one more at a time.
    """
    found = folder if isinstance(folder, Found) else find_model(folder, revision)
    if found.adapter is not None:
        verify_step(found.adapter)
        from transom.checkpoints.fingerprint import (
            check_trained_on,  # which reads folders by this module
        )

        check_trained_on(found.adapter, found.model)
        model = load_adapter(load(Found(found.model), device, dtype), found.adapter)
        model.generation_settings = stated_settings(found.folders)
        return model
    where = found.model
    target = pick_device(device)
    bound_kernel_caches()
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    verify_step(where)
    args = read_args(where)
    model = outline(args)
    source = open_state(where, args, shapes_of(model))
    kind_of = dtypes_of(source, DTYPES[dtype] if dtype else None)
    placed: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    taken: set[int] = set()
    for name, stored in source.items():
        placed[name], counts[name] = _place(stored.read(), target, kind_of[name], taken)
        taken.add(placed[name].data_ptr())
    say_bad_numbers(counts, str(where))
    model.load_state_dict(placed, strict=True, assign=True)
    model.generation_settings = stated_settings(found.folders)
    return model.eval()


def outline(args: ModelArgs) -> LLM:
    """The model on the meta device: every shape, no memory."""
    with torch.device("meta"):
        return LLM(args)


def shapes_of(model: LLM) -> dict[str, Shape]:
    """The shape of every parameter by its name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _place(
    read: Tensor, device: torch.device, dtype: torch.dtype, taken: Set[int]
) -> tuple[Tensor, int]:
    """What was read, where and as it is wanted, and how many of its numbers are bad.

    It may stay where it is, most often in its file's map, unless another weight is there: `taken`
    are addresses.
    """
    if (
        device.type == "cpu"
        and read.dtype == dtype
        and read.data_ptr() not in taken
        and _may_stay(read)
    ):
        return read, bad_numbers(read)
    placed = torch.empty(read.shape, dtype=dtype, device=device).copy_(read)
    widened = (
        device.type == "cpu" and read.dtype.itemsize < dtype.itemsize
    )  # fewer bytes to look through
    return placed, bad_numbers(read if widened else placed)


def _may_stay(read: Tensor) -> bool:
    # A part of something larger would keep all of it. Where float32 begins decides on the last bit
    # of its products; those of halves do not depend on it.
    alignment = read.dtype.itemsize if read.dtype.itemsize <= 2 else ALIGNMENT
    whole = read.is_contiguous() and read.untyped_storage().nbytes() == read.nbytes
    return whole and read.data_ptr() % alignment == 0


def say_bad_numbers(counts: Mapping[str, int], where: str) -> None:
    """One line when weights are infinite or no numbers: how many, and where the first is."""
    bad = {name: count for name, count in counts.items() if count}
    if bad:
        tensors = f"{len(bad)} tensor{'s' if len(bad) > 1 else ''}"
        notice(
            f"{where}: {sum(bad.values())} weights are NaN or infinite, in {tensors}, first in "
            f"{next(iter(bad))}"
        )


def bad_numbers(tensor: Tensor) -> int:
    """How many of a tensor's numbers are infinite or none."""
    # One infinite term makes a sum infinite or NaN, and one thread adds as fast as memory is read.
    # Where finite terms are together more than float16 holds, the extremes tell; to look at each
    # number takes 50 times as long.
    with one_thread() if tensor.nbytes < _MANY_BYTES else contextlib.nullcontext():
        total = tensor.sum()
    if bool(torch.isfinite(total)) or bool(
        torch.isfinite(torch.stack(torch.aminmax(tensor))).all()
    ):
        return 0
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(1 << 22))


def load_tokenizer(folder: str | Path, revision: str | None = None) -> Tokenizer:
    """Return the tokenizer of a model folder or hub id, or of a run's best step.

    Its tokens must fit the embeddings. Of a hub id no weights are fetched. A folder with a
    tokenizer and no model, and the file of a tokenizer, are opened as well.
    """
    return open_tokenizer(find_model(folder, revision, settings_only=True))


def open_tokenizer(found: Found) -> Tokenizer:
    """Return the tokenizer of a model or its adapter, whose tokens must fit the embeddings."""
    tokenizer = Tokenizer.load(found.tokenizer)
    check_vocabulary(tokenizer, found.vocabulary, str(found.tokenizer))
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, rows: int | None, where: str) -> None:
    """Refuse a tokenizer that makes tokens without an embedding; special ones, which no text makes,
    are said.
    """
    beyond = set(range(tokenizer.vocab_size if rows is None else rows, tokenizer.vocab_size))
    plain = sorted(beyond - tokenizer.special_ids)
    if plain:
        token = tokenizer.id_to_token(plain[0])
        raise RequestError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, among them {token!r} "
            f"with id {plain[0]}, "
            f"and the embeddings have {rows} rows; expected as many or more rows"
        )
    if beyond:
        notice(
            f"{where}: special tokens from id {min(beyond)} on have no embedding and must not be "
            f"used"
        )


def open_state(folder: Path, args: ModelArgs, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """Our parameters, still in the folder's files, every key accounted for and every shape
    checked.
    """
    kind = folder_format(folder)
    source = open_files(folder, kind, args)
    refuse_quantized(source, str(folder))
    if kind == "native":
        misfits = [
            f"{name} has shape {source[name].shape}, config.json asks for {shape}"
            for name, shape in shapes.items()
            if name in source and source[name].shape != tuple(shape)
        ]
        account(
            str(folder),
            sorted(set(shapes) - set(source)),
            sorted(set(source) - set(shapes)),
            [],
            misfits,
        )
        return {name: source[name] for name in shapes}
    table = read_json(folder / CONFIG)["model_type"] if kind == "hf" else f"params_{kind}"
    source = clean(table, source, args, str(folder))
    return to_ours(WEIGHT_NAMES[table].mappings_to_read(args, shapes), source, shapes, str(folder))


def open_files(folder: Path, kind: Format, args: ModelArgs) -> dict[str, Stored]:
    """Return all tensors of a folder by their names in its files, unread; print a notice about
    ignored files.
    """
    if kind in ("meta", "mistral"):
        return open_consolidated(folder, args)
    taken = find_weights(folder, WEIGHTS, read_json(folder / CONFIG) if kind == "hf" else None)
    if taken.files == [WEIGHTS] and not (folder / WEIGHTS).exists():
        patterns = ("*.safetensors", "*.bin", "*.gguf", "*.pth", "original/consolidated.*")
        others = [
            path.relative_to(folder)
            for pattern in patterns
            for path in sorted(folder.glob(pattern))
        ]
        for other in others:
            refuse_pointer(folder / other)
        found = f"{others[0]} is there" if others else "no weights are there"
        raise RequestError(f"{folder}: {found}; expected {WEIGHTS}, or shards and {WEIGHTS}{INDEX}")
    say_ignored(folder, taken)
    return open_safetensors(folder, taken.files)


def read_state(folder: Path, args: ModelArgs, model: LLM) -> dict[str, Tensor]:
    """Our state dict from the folder's files, every key accounted for and every shape checked."""
    return {
        name: stored.read() for name, stored in open_state(folder, args, shapes_of(model)).items()
    }

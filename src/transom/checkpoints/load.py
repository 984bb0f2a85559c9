"""Load a model from a folder of any format, one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from transom.base.errors import expect, notice
from transom.base.files import shown_name
from transom.base.runtime import (
    DTYPES,
    bound_kernel_caches,
    dtype_name,
    large_pages,
    one_thread,
    pick_device,
    pick_dtype,
    release_memory,
)
from transom.checkpoints.adapters.read import adapter_bytes, load_adapter
from transom.checkpoints.files.checksums import verify_step
from transom.checkpoints.files.generation_config import stated_settings
from transom.checkpoints.files.lazy_tensors import (
    LazyTensor,
    TensorGroup,
    dtypes_of,
    main_dtype,
)
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.files.safetensors_files import alignment_of
from transom.checkpoints.fingerprint import check_trained_on
from transom.checkpoints.gguf.weights import quantized_types
from transom.checkpoints.quantized.codes import Codes
from transom.checkpoints.quantized.config import stated_quantization
from transom.checkpoints.read_args import read_args
from transom.checkpoints.state import meta_model, open_codes, open_parameters
from transom.config.model_args import ModelArgs
from transom.lora.adapters import leaves
from transom.models.llm import LLM
from transom.planning.memory import weight_kind
from transom.quantize.formats import empty_parts
from transom.quantize.leaves import replace_weight

# Tensors of fewer numbers are read and summed by one thread, which has finished before others have
# started.
_MANY = 1 << 25


@dataclass(frozen=True)
class LoadPlan:
    """What will be loaded.

    Attributes:
        args: The arguments of the model.
        weights: Bytes of its weights in memory by kind, as in `planning.memory.weight_counts`.
        mapped_bytes: Bytes of those that stay in memory maps of their files.
        dtype: The dtype of its embeddings, keys and values.
        device: Its device.
        max_memory: Bytes that weights and requests together may take, if there is a limit.
    """

    args: ModelArgs
    weights: Mapping[str, int]
    mapped_bytes: int
    dtype: torch.dtype
    device: torch.device
    max_memory: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(self.weights.values())


BeforeWeights = Callable[[LoadPlan], int | None]
Blocks = Mapping[int, Sequence[TensorGroup]]  # the weights of each block, not read yet


class Offloader(Protocol):
    """Decides which blocks stay out of memory, and lets them run all the same."""

    def place(
        self, plan: LoadPlan, blocks: Blocks, before_weights: BeforeWeights | None
    ) -> Iterable[int]:
        """Return the indices of the blocks whose weights are not read.

        Args:
            plan: What would be loaded without offloading.
            blocks: The weights of all blocks.
            before_weights: As for `load`, for a plan with the fewest weights in memory.
        """

    def attach(self, model: LLM, blocks: Blocks) -> None:
        """Let blocks run whose weights were not read; their parameters are on meta."""


@dataclass(frozen=True)
class _Source:
    """The weights of a folder, not read yet.

    Attributes:
        plan: What will be loaded.
        model: The model on the meta device.
        groups: The tensors of every weight by its name. They are read in the dtypes of the files.
        codes: The codes of leaves by the names of their weights.
        quantized: What is quantized in the files, in words.
    """

    plan: LoadPlan
    model: LLM
    groups: Mapping[str, TensorGroup]
    codes: Mapping[str, Codes]
    quantized: str

    @property
    def blocks(self) -> dict[int, list[TensorGroup]]:
        """The weights of each block."""
        blocks: dict[int, list[TensorGroup]] = {i: [] for i in range(self.plan.args.n_layers)}
        for name, group in self.groups.items():
            blocks.get(_block_of(name), []).append(group)
        return blocks


def load(
    folder: str | Path | ModelLocation,
    device: str = "cpu",
    dtype: str | None = None,
    revision: str | None = None,
    *,
    keep_quantized: bool | None = None,
    before_weights: BeforeWeights | None = None,
    offload: Offloader | None = None,
) -> LLM:
    """Load a model, in evaluation mode.

    Weights that keep their dtype stay in private memory maps of their files: while the model
    lives, such a file may be replaced but not written in place. Weights that are converted or moved
    to another device need the memory of one more tensor while loading.

    Args:
        folder: A model or adapter folder, a run folder for its best step, a GGUF file, a hub id, or
            the result of `find_model`. The base of an adapter is loaded too.
        device: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto` for the best one there is.
        dtype: `float32`, `bfloat16`, `float16` or `float64`. None keeps the dtype of the files; a
            quantized GGUF file becomes bfloat16 where the device is fast at it, else float32.
        revision: Branch, tag or commit of a hub id.
        keep_quantized: Keep the weights of leaves in the codes of the files. They are frozen, and
            dequantized whenever a product needs them. None keeps the codes of a quantized folder,
            and dequantizes those of a GGUF file.
        before_weights: Called before the weights are read. An error that it raises ends the call.
            With `offload`, the bytes that it returns stay free beside the weights.
        offload: An `Offload`, for a model that is larger than the memory.

    Raises:
        RequestError: There is no such folder, or its files are damaged, of an unsupported model,
            quantized, or do not fit the config; or the adapter belongs to another base.
    """
    location = folder if isinstance(folder, ModelLocation) else find_model(folder, revision)
    if location.adapter is not None:
        verify_step(location.adapter)
        check_trained_on(location.adapter, location.model)
    bound_kernel_caches()
    verify_step(location.model)
    source = _open(location, device, dtype, keep_quantized, apart=offload is not None)
    absent = _absent(source, before_weights, offload)
    model = _read_weights(location.model, source, set(absent))
    if offload is not None and absent:
        offload.attach(model, absent)
    if location.adapter is not None:
        load_adapter(model, location.adapter)
    model.generation_settings = stated_settings(location.folders)
    return model


def open_weights(
    folder: Path, dtype: str, *, keep_quantized: bool | None = False
) -> tuple[LLM, Mapping[str, TensorGroup]]:
    """Return a model with all weights on the meta device, and its weights by name, not read yet.

    Args:
        folder: A model folder of any format.
        dtype: As for `load`.
        keep_quantized: As for `load`.

    Raises:
        RequestError: As for `load`.
    """
    verify_step(folder)
    source = _open(ModelLocation(folder), "cpu", dtype, keep_quantized, apart=True)
    model = _read_weights(folder, source, {*map(_block_of, source.groups)})
    model.generation_settings = stated_settings((folder,))
    return model, source.groups


def load_plan(
    location: ModelLocation,
    device: str = "cpu",
    dtype: str | None = None,
    keep_quantized: bool | None = None,
    before_weights: BeforeWeights | None = None,
    offload: Offloader | None = None,
) -> LoadPlan:
    """Return what `load` would load. No weights are read or checked.

    Raises:
        RequestError: As for `load`.
    """
    source = _open(location, device, dtype, keep_quantized, apart=offload is not None)
    _absent(source, before_weights, offload)
    return source.plan


def _absent(
    source: _Source, before_weights: BeforeWeights | None, offload: Offloader | None
) -> dict[int, Sequence[TensorGroup]]:
    """Return the blocks that are not read; the arguments are those of `load`."""
    if offload is not None:
        blocks, plan = source.blocks, source.plan
        return {index: blocks[index] for index in offload.place(plan, blocks, before_weights)}
    if before_weights is not None:
        before_weights(source.plan)
    return {}


def _open(
    location: ModelLocation,
    device: str,
    dtype: str | None,
    keep_quantized: bool | None,
    *,
    apart: bool,
) -> _Source:
    """Open the weights of a model; see `load` and `open_parameters` for the arguments."""
    expect(dtype is None or dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
    kind, place, folder = DTYPES[dtype] if dtype else None, pick_device(device), location.model
    args = read_args(folder)
    model = meta_model(args)
    source = open_parameters(folder, args, apart=apart)
    types, stated, where = quantized_types(folder), stated_quantization(folder), shown_name(folder)
    codes: dict[str, Codes] = {}
    if types or stated:
        found = {f"{path}.weight": tuple(leaf.weight.shape) for path, leaf in leaves(model).items()}
        codes = open_codes(folder, args, found, apart=apart)
        plain = {name: lazy for name, lazy in source.items() if name not in codes}
        kind = kind or (main_dtype(plain) if stated else pick_dtype("auto", place))
        keeps = bool(stated) if keep_quantized is None else keep_quantized
        codes, source = (codes, plain) if keeps else ({}, source)
    expected = f"a quantized GGUF file or folder, not {where}"
    expect(bool(codes) or not keep_quantized, "keep_quantized", True, expected)
    dtypes = dtypes_of(source, kind)
    groups = {name: _dense_group(name, lazy, dtypes[name]) for name, lazy in source.items()}
    groups |= {name: _coded_group(name, one) for name, one in codes.items()}
    sizes: Counter[str] = Counter()
    for group in groups.values():
        for key, meta in zip(group.keys, group.metas, strict=True):
            sizes[weight_kind(key)] += meta.nbytes
    mapped = sum(
        groups[name].nbytes
        for name, lazy in source.items()
        if lazy.mapped and place.type == "cpu" and lazy.dtype == dtypes[name]
        if _is_aligned(lazy.read())
    )
    kind = kind or dtypes["tok_embeddings.weight"]
    if location.adapter is not None:
        sizes["adapter"] = adapter_bytes(location.adapter, kind)
    plan = LoadPlan(args, dict(sizes), mapped, kind, place)  # `asdict` breaks Counters
    quantized = f"tensors of types {types}" if types else f"weights of {stated}" if stated else ""
    return _Source(plan, model, groups, codes, quantized)


def _block_of(name: str) -> int:
    """Return the index of the block that a weight belongs to, or -1."""
    first, *rest = name.split(".")
    return int(rest[0]) if first == "layers" else -1


def _dense_group(name: str, lazy: LazyTensor, dtype: torch.dtype) -> TensorGroup:
    pieces = lazy.pieces if lazy.dtype == dtype else ()
    return TensorGroup((name,), (lazy.meta.to(dtype),), lambda: [lazy.read()], pieces)


def _coded_group(name: str, codes: Codes) -> TensorGroup:
    parts = empty_parts(codes.shape, codes.format, "meta")
    keys = [f"{name.removesuffix('weight')}{key}" for key in parts]

    def read() -> list[Tensor]:
        found = codes.read()
        return [found[key] for key in parts]

    return TensorGroup(keys, list(parts.values()), read)


def _read_weights(folder: Path, source: _Source, absent: Set[int]) -> LLM:
    """Return the model; the parameters of `absent` blocks stay on the meta device."""
    plan, model, where = source.plan, source.model, shown_name(folder)
    if source.quantized:
        how = "kept in codes and computed in" if source.codes else "dequantized to"
        size = f"{plan.weight_bytes / 1e6:,.1f} MB"
        notice(f"{where}: {source.quantized}, {how} {dtype_name(plan.dtype)}, {size}")
    found = {f"{path}.weight": leaf for path, leaf in leaves(model).items()}
    placed: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    taken: set[int] = set()
    for name, group in source.groups.items():
        tensors, coded = [*group.metas], source.codes.get(name)
        with one_thread(sum(meta.numel() for meta in group.metas) < _MANY):
            if _block_of(name) in absent:
                pass
            elif coded is not None:
                tensors = [part.to(plan.device) for part in group.read()]
            else:
                (read,), dtype = group.read(), tensors[0].dtype
                tensors[0], counts[name] = _place(read, plan.device, dtype, taken)
                taken.add(tensors[0].data_ptr())
        if coded is not None:
            parts = {key.rpartition(".")[2]: x for key, x in zip(group.keys, tensors, strict=True)}
            replace_weight(found[name], parts, coded.format, plan.dtype)
            release_memory()  # else glibc keeps what made the parts, up to the size of the weights
        placed |= zip(group.keys, tensors, strict=True)
    warn_nonfinite(counts, where)
    model.load_state_dict(placed, strict=True, assign=True)
    return model.eval()


def _place(
    read: Tensor, device: torch.device, dtype: torch.dtype, taken: Set[int]
) -> tuple[Tensor, int]:
    """Return a tensor with the given device and dtype, and how many of its numbers are not finite.

    The tensor stays in the memory map of its file if it can. `taken` are the addresses of weights
    that have been placed: two weights that share memory in a file do not share it in the model.
    """
    kept = device.type == "cpu" and read.dtype == dtype
    if kept and read.data_ptr() not in taken and _is_aligned(read):
        return read, count_nonfinite(read)
    placed = large_pages(torch.empty(read.shape, dtype=dtype, device=device)).copy_(read)
    # If the dtype is widened, the original has fewer bytes to look through.
    widened = device.type == "cpu" and read.dtype.itemsize < dtype.itemsize
    return placed, count_nonfinite(read if widened else placed)


def _is_aligned(read: Tensor) -> bool:
    # A view of a larger tensor would keep all of it in memory.
    alone = read.is_contiguous() and read.untyped_storage().nbytes() == read.nbytes
    return alone and read.data_ptr() % alignment_of(read.dtype) == 0


def warn_nonfinite(counts: Mapping[str, int], where: str) -> None:
    """Print a notice if weights are NaN or infinite: how many, and the name of the first tensor."""
    bad = {name: count for name, count in counts.items() if count}
    if bad:
        tensors = f"{len(bad)} tensor{'s' if len(bad) > 1 else ''}"
        total, first = sum(bad.values()), next(iter(bad))
        notice(f"{where}: {total} weights are NaN or infinite, in {tensors}, first in {first}")


def count_nonfinite(tensor: Tensor) -> int:
    """Return how many numbers of a tensor are NaN or infinite."""
    # One infinite term makes a sum infinite or NaN. If the sum of finite float16 numbers overflows,
    # the extremes decide. Testing each number takes 50 times as long.
    total = tensor.sum()
    if total.isfinite() or torch.stack(torch.aminmax(tensor)).isfinite().all():
        return 0
    return sum(int((~part.isfinite()).sum()) for part in tensor.reshape(-1).split(1 << 22))

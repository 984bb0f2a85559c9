"""What differs between two models: weight by weight under our names, whatever formats their folders
have.

One tensor of each is in memory at a time; an adapter is first merged into its base, which then is
whole in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from transom.checkpoints.convert import open_merged
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.checkpoints.files.location import ModelLocation
from transom.config.model_args import ModelArgs
from transom.names.transforms import Shape, permute_rotary

PART = (
    1 << 22
)  # numbers compared at a time, so that a difference in float32 stays small beside its tensors


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors of one name and shape are apart."""

    name: str
    shape: Shape
    largest: float  # max |a - b|; infinite where only one is finite or a number
    scale: float  # max |a| over its finite numbers
    differing: int  # numbers that are not equal
    count: int  # numbers in all


@dataclass(frozen=True)
class ModelDifference:
    """All that differs; `differing` has the largest difference first, `identical` counts what is
    all equal.
    """

    args: tuple[ModelArgs, ModelArgs]
    rotary: Literal[
        "same", "turned", "kept"
    ]  # kept: the layouts differ, and these heads cannot be turned
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes: dict[str, tuple[Shape, Shape]]
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]]
    differing: tuple[TensorDifference, ...]
    identical: int
    compared: int


def compare_models(first: ModelLocation, second: ModelLocation) -> ModelDifference:
    """Compare every parameter; rotary rows of the second are turned where it keeps them in the
    other layout.
    """
    (one, ours), (other, theirs) = open_merged(first), open_merged(second)
    rotary: Literal["same", "turned", "kept"] = "same"
    if one.rope_layout != other.rope_layout:
        rotary = "kept" if other.mla_args is not None else "turned"
    if rotary == "turned":
        theirs = {name: _turned(name, stored, other, one) for name, stored in theirs.items()}
    both = [name for name in ours if name in theirs]
    shapes = {
        n: (ours[n].shape, theirs[n].shape)
        for n in both
        if tuple(ours[n].shape) != tuple(theirs[n].shape)
    }
    dtypes = {n: (ours[n].dtype, theirs[n].dtype) for n in both if ours[n].dtype != theirs[n].dtype}
    differing, identical = [], 0
    for name in (name for name in both if name not in shapes):
        found = _difference(name, ours[name].read(), theirs[name].read())
        if found.differing:
            differing.append(found)
        elif name not in dtypes:
            identical += 1
    return ModelDifference(
        args=(one, other),
        rotary=rotary,
        only_first=tuple(name for name in ours if name not in theirs),
        only_second=tuple(name for name in theirs if name not in ours),
        shapes=shapes,
        dtypes=dtypes,
        differing=tuple(sorted(differing, key=lambda one: (-one.largest, one.name))),
        identical=identical,
        compared=len(both),
    )


def _turned(name: str, stored: LazyTensor, args: ModelArgs, like: ModelArgs) -> LazyTensor:
    return stored.then(lambda tensor: permute_rotary(name, tensor, args, like.rope_layout))


def _difference(name: str, first: Tensor, second: Tensor) -> TensorDifference:
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    largest, scale, differing = 0.0, 0.0, 0
    for a, b in zip(first.reshape(-1).split(PART), second.reshape(-1).split(PART), strict=True):
        a, b = a.to(wide), b.to(wide)
        apart = (a != b) & ~(a.isnan() & b.isnan())
        if apart.any():
            differing += int(apart.sum())
            gaps = (a - b).abs()[apart]
            largest = max(
                largest, float(gaps.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
            )
        finite = a[a.isfinite()]
        scale = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    return TensorDifference(name, tuple(first.shape), largest, scale, differing, first.numel())

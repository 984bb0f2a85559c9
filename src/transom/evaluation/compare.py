"""How two models differ, weight by weight, whatever the formats of their folders are.

One tensor of each model is in memory at a time. An adapter is first merged into its base, which is
then in memory completely.
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

PART = 1 << 22  # numbers compared at a time, so that their float32 difference stays small


@dataclass(frozen=True)
class TensorDifference:
    """How two tensors a and b of one name and shape differ.

    Attributes:
        name: Their name.
        shape: Their shape.
        largest: max |a - b|; infinite if one of the two is not finite or NaN.
        scale: max |a| over its finite numbers.
        differing: How many numbers are not equal.
        count: How many numbers there are.
    """

    name: str
    shape: Shape
    largest: float
    scale: float
    differing: int
    count: int


@dataclass(frozen=True)
class ModelDifference:
    """How two models differ.

    Attributes:
        args: The arguments of both.
        rotary: Whether both have the `same` RoPE layout, or the second is `turned` into that of the
            first. Latent attention is `kept` as it is.
        only_first: Names of weights that only the first model has.
        only_second: Names of weights that only the second model has.
        shapes: The shapes of weights where they differ.
        dtypes: The dtypes of weights where they differ.
        differing: The weights with different numbers, the largest difference first.
        identical: How many weights are equal in numbers and dtype.
        compared: How many names both models have.
    """

    args: tuple[ModelArgs, ModelArgs]
    rotary: Literal["same", "turned", "kept"]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes: dict[str, tuple[Shape, Shape]]
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]]
    differing: tuple[TensorDifference, ...]
    identical: int
    compared: int


def compare_models(first: ModelLocation, second: ModelLocation) -> ModelDifference:
    """Compare every weight of two models, in the RoPE layout of the first."""
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

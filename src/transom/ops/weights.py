"""Weights as the C++ code sees them: `Weight` of weights.h, filled once for each leaf."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

# The numbers of `Kind` in weights.h. uint8 stands for codes of 4 bits.
KINDS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.uint8: 5,
}
DENSE = (torch.float32, torch.float16, torch.bfloat16)
_POINTERS = (
    "codes",
    "levels",
    "scales",
    "super_scales",
    "scale_mean",
    "zeros",
    "minimums",
    "super_minimums",
    "bias",
    "order",
)
_NUMBERS = (
    "outputs",
    "inputs",
    "group",
    "storage",
    "scale_kind",
    "super_kind",
    "block",
    "rounded",
    "tiled",
)


class Weight(ctypes.Structure):
    """A weight [out, in] and a bias [out], as weights.h declares them.

    Attributes:
        tensors: What the pointers point to. Tensors that are written elsewhere change the weight,
            but a cast or a move of a leaf makes new tensors, for which a new `Weight` is needed.
    """

    tensors: tuple[object, ...]
    outputs: int
    inputs: int
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    )


def dense_weight(weight: Tensor, bias: Tensor | None) -> Weight | None:
    """Return a dense weight [out, in] on the CPU, or None if C++ doesn't multiply by its dtype.

    Args:
        weight: [out, in]; a copy is made if it has gaps.
        bias: [out] of any floating dtype, or None.
    """
    if weight.dtype not in DENSE:
        return None
    outputs, inputs = weight.shape
    return _filled({"codes": weight}, bias, outputs=outputs, inputs=inputs, group=inputs)


def coded_weight(
    parts: Mapping[str, Tensor],
    levels: tuple[float, ...] | None,
    scales: torch.dtype,
    block: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Weight | None:
    """Return a weight in codes on the CPU, or None if C++ doesn't cover its format.

    Args:
        parts: The parts of W [out, in], in rows or in tiles.
        levels: The values of codes of 4 bits; None for codes of 8 bits.
        scales: What the bits of the scales are.
        block: Scales that share a super scale, or 0.
        bias: [out] of any floating dtype, or None.
        dtype: The dtype of the weight. In bfloat16, rows of bfloat16 are multiplied by numbers
            rounded to bfloat16, as PyTorch does, if that is faster.
    """
    outputs, groups = parts["scales"].shape
    tiled = "tiles" in parts
    own = {"codes" if name == "tiles" else name: part for name, part in parts.items()}
    inputs = own["codes"].size(1) * (1 if levels is None else 2)
    group = inputs // groups
    super_dtype = parts["super_scales"].dtype if block else torch.float32
    covered = scales in KINDS and super_dtype in KINDS
    if not covered or own["codes"].dtype not in KINDS or (levels and group % 2):
        return None
    numbers = {"scale_kind": KINDS[scales], "super_kind": KINDS[super_dtype], "block": block}
    numbers |= {"outputs": outputs, "inputs": inputs, "group": group}
    made = _filled(own, bias, rounded=int(dtype is torch.bfloat16), tiled=int(tiled), **numbers)
    if levels is not None:
        made.levels = ctypes.addressof(_levels(levels))
    return made


def _filled(parts: Mapping[str, Tensor], bias: Tensor | None, **numbers: int) -> Weight:
    own = {name: part.detach().contiguous() for name, part in parts.items()}
    if bias is not None:
        own["bias"] = bias.detach().float().contiguous()
    made = Weight(
        storage=KINDS[own["codes"].dtype],
        **{name: part.data_ptr() for name, part in own.items()},
        **numbers,
    )
    made.tensors = tuple(own.values())
    return made


@functools.cache  # so that the address stays valid
def _levels(levels: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(levels))(*levels)

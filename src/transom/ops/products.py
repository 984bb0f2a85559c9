"""x W^T for a few rows x and a weight W in codes of 4 or 8 bits, on the CPU.

The C++ code reads the parts of the weight that `quantize.formats` describes, and no dense weight
exists. All sums are float32. Its twin is `quantize.leaves.plain_product`; `transom verify ops`
compares the two.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from transom.ops.build import library

MOST_ROWS = 32
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The numbers of the dtypes in products.cpp.
_KINDS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}
_POINTERS = (
    "x",
    "y",
    "bias",
    "codes",
    "levels",
    "scales",
    "super_scales",
    "scale_mean",
    "zeros",
    "minimums",
    "super_minimums",
)
_NUMBERS = ("rows", "outputs", "inputs", "group", "scale_kind", "super_kind", "block", "threads")


class ProductArgs(ctypes.Structure):
    """The arguments of one product, as products.cpp declares them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    )


def takes(x: Tensor) -> bool:
    """Return whether `product` may take these rows, if a library can be had.

    It takes up to 32 rows on the CPU, outside graphs of torch.compile.
    """
    return (
        x.device.type == "cpu"
        and type(x) is Tensor  # no fake tensor, which has no data
        and x.dtype in X_DTYPES
        and 0 < x.numel() <= MOST_ROWS * x.size(-1)
        and not torch.compiler.is_compiling()
    )


def product(
    x: Tensor,
    bias: Tensor | None,
    parts: Mapping[str, Tensor],
    levels: tuple[float, ...] | None,
    scales: torch.dtype,
    block: int,
) -> Tensor | None:
    """Return x W^T + b, or None if no library can be had or if it doesn't cover the format.

    Args:
        x: Rows [..., in] for which `takes` is true.
        bias: [out] of any floating dtype, or None.
        parts: The parts of W [out, in] on the CPU.
        levels: The values of codes of 4 bits; None for codes of 8 bits.
        scales: What the bits of the scales are.
        block: Scales that share a super scale, or 0.

    Returns:
        [..., out] in the dtype of x, computed in float32 and rounded once. The weight is not
        rounded to a dtype before.
    """
    inputs, (outputs, groups) = x.size(-1), parts["scales"].shape
    super_dtype = parts["super_scales"].dtype if block else torch.float32
    group = inputs // groups
    covered = scales in _KINDS and super_dtype in _KINDS and not (levels and group % 2)
    native = library() if covered else None
    if native is None:
        return None
    rows = x.float().contiguous()
    wide_bias = None if bias is None else bias.float().contiguous()
    tensors = {name: part.contiguous() for name, part in parts.items()}
    y = torch.empty(*x.shape[:-1], outputs)
    args = ProductArgs(
        x=rows.data_ptr(),
        y=y.data_ptr(),
        bias=None if wide_bias is None else wide_bias.data_ptr(),
        levels=None if levels is None else ctypes.addressof(_levels(levels)),
        rows=x.numel() // inputs,
        outputs=outputs,
        inputs=inputs,
        group=group,
        scale_kind=_KINDS[scales],
        super_kind=_KINDS[super_dtype],
        block=block,
        threads=torch.get_num_threads(),
        **{name: part.data_ptr() for name, part in tensors.items()},
    )
    if native.transom_product(ctypes.byref(args)):
        raise MemoryError("no memory for the product of a quantized weight")
    return y.to(x.dtype)


@functools.cache
def _levels(levels: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(levels))(*levels)

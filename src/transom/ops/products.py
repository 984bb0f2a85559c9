"""x W^T for a few rows x and a weight W on the CPU: dense, or in codes of 4 or 8 bits.

The C++ code reads the parts of the weight that `quantize.formats` describes, and no dense weight
exists. All sums are float32. Its twin is `quantize.leaves.plain_product`, or `F.linear` for a dense
weight; `transom verify ops` compares them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transom.ops.build import library
from transom.ops.weights import Weight, coded_weight

MOST_ROWS = 64
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor, of_bytes: bool = False) -> bool:
    """Return whether `product` may take these rows, if a library can be had.

    It takes up to 64 rows on the CPU, outside graphs of torch.compile. If they are float32 and the
    weight is in tiles of bytes, it takes more rows too: instructions for bytes are faster than
    PyTorch's products in float32, but not than those in bfloat16.
    """
    return (
        x.device.type == "cpu"
        and type(x) is Tensor  # no fake tensor, which has no data
        and x.dtype in X_DTYPES
        and x.numel() > 0
        and (x.numel() <= MOST_ROWS * x.size(-1) or (of_bytes and x.dtype is torch.float32))
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
        [..., out] in the dtype of x, summed in float32 and rounded once. With rows of bfloat16, the
        weight may be rounded to bfloat16 before, as PyTorch does.
    """
    weight = coded_weight(parts, levels, scales, block, bias, x.dtype)
    outputs = None if weight is None else multiply(x, [weight])
    return None if outputs is None else outputs[0]


def multiply(
    x: Tensor, weights: Sequence[Weight], threads: int | None = None
) -> list[Tensor] | None:
    """Return x W^T + b for every weight, or None if no library can be had.

    Args:
        x: Rows [..., in] for which `takes` is true.
        weights: Weights of the same inputs. One call for several is faster than several calls.
        threads: As many as PyTorch uses by default.

    Returns:
        [..., out] for each weight, in the dtype of x, computed in float32 and rounded once.
    """
    native = library()
    if native is None:
        return None
    rows = x.float().contiguous()
    outputs = [torch.empty(*x.shape[:-1], weight.outputs) for weight in weights]
    count = len(weights)
    failed = native.transom_product(
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(x.numel() // x.size(-1)),
        (ctypes.c_void_p * count)(*map(ctypes.addressof, weights)),
        count,
        (ctypes.c_void_p * count)(*(y.data_ptr() for y in outputs)),
        threads or torch.get_num_threads(),
        0,  # y is not added to
    )
    if failed:
        raise MemoryError("no memory for the product of a few rows")
    return [y.to(x.dtype) for y in outputs]

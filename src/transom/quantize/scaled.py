"""Products of 8-bit floats on GPUs that multiply them, with inputs rounded to 8 bits as well.

Every row of the inputs has a scale of its own, as every output of the weight has. GPUs from compute
capability 8.9 on multiply such numbers about twice as fast as those of 16 bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from transom.attention.graphs import constant_in_graphs
from transom.quantize.formats import FLOAT8, LARGEST, Parts, not_zero


def takes(x: Tensor, parts: Parts) -> bool:
    """Return whether `product` multiplies rows [..., in] of 16 bits by a weight [out, in]."""
    codes = parts.get("codes", x)
    fits = x.is_cuda and x.element_size() == 2 and x.numel() > 0 and codes.dtype is FLOAT8
    fits = fits and parts["scales"].size(-1) == 1 and all(size % 16 == 0 for size in codes.shape)
    return fits and works(x.device)


def product(x: Tensor, bias: Tensor | None, parts: Parts) -> Tensor:
    """Return x W^T + b [..., out] in the dtype of x, rounded to bfloat16 once.

    Args:
        x: Rows [..., in], each rounded to floats of 8 bits with the scale of its largest number.
        bias: [out], or None.
        parts: `codes` float8_e4m3fn [out, in], and `scales` [out, 1].
    """
    rows, of_outputs = rounded(x.reshape(-1, x.size(-1))), parts["scales"].float().view(1, -1)
    y = torch._scaled_mm(
        rows["codes"], parts["codes"].T, rows["scales"], of_outputs, out_dtype=torch.bfloat16
    )
    y = y.view(*x.shape[:-1], -1).to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def rounded(weight: Tensor) -> Parts:
    """Return the parts of a weight [out, in] in floats of 8 bits, with a scale per output."""
    rows = weight.float()
    scales = not_zero(rows.abs().amax(-1, keepdim=True) / LARGEST[FLOAT8])
    return {"codes": (rows / scales).to(FLOAT8), "scales": scales}


@constant_in_graphs
def works(device: torch.device) -> bool:
    """Return whether a GPU multiplies 8-bit floats; one small product finds out."""
    return _tried(device)


@functools.cache
def _tried(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        y = product(ones, None, {"codes": ones.to(FLOAT8), "scales": ones[:, :1].float()})
        return bool((y == 16).all())
    except (RuntimeError, NotImplementedError):
        return False

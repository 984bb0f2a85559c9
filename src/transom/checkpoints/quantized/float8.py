"""Weights of 8-bit floats with a scale per block of outputs and inputs, as in DeepSeek-V3.

`weight` float8_e4m3fn [out, in], and `weight_scale_inv` [out / block, in / block], rounded up, by
which it is multiplied. A single scale stands for all. The source is `weight_dequant` in `kernel.py`
of DeepSeek-V3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.base.errors import RequestError, require
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors


def open_float8(
    where: str, stored: LazyTensors, block: tuple[int, int], dtype: torch.dtype
) -> LazyTensor:
    """Return the weight of one module, rounded once.

    Args:
        where: The module, for messages.
        stored: Its `weight` and its `weight_scale_inv`.
        block: Outputs and inputs that share a scale; zeros for all.
        dtype: The dtype of the weight.

    Raises:
        RequestError: The weight is missing, or a tensor has another shape or dtype.
    """
    require("weight" in stored, where, sorted(stored), "expected a tensor `weight` too")
    weight, scales = stored["weight"], stored["weight_scale_inv"]
    kind = torch.float8_e4m3fn
    require(weight.dtype == kind, f"{where}.weight: dtype", weight.dtype, f"expected {kind}")
    require(len(weight.shape) == 2, f"{where}.weight: shape", weight.shape, "expected a matrix")
    sizes = [own or size for own, size in zip(block, weight.shape, strict=True)]
    shape = tuple(-(-size // own) for size, own in zip(weight.shape, sizes, strict=True))
    fits = scales.shape == shape or (shape == (1, 1) and scales.shape in ((), (1,)))
    require(fits, f"{where}.weight_scale_inv: shape", scales.shape, f"expected {shape}")

    def read() -> Tensor:
        each = scales.read().float().view(shape)
        if not (each.isfinite() & (each >= 0)).all():
            expected = "expected finite, positive ones"
            raise RequestError(f"{where}.weight_scale_inv: got NaN or negative numbers; {expected}")
        out = weight.read().float()
        for axis, size in enumerate(sizes):
            each = each.repeat_interleave(size, axis).narrow(axis, 0, out.size(axis))
        return out.mul_(each).to(dtype)

    return LazyTensor(weight.shape, dtype, read)

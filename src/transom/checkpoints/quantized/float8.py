"""Weights of 8-bit floats with a scale per block of outputs and inputs, as in DeepSeek-V3.

Weights with blocks of one output stay in codes, and such blocks are written. Weights with other
blocks are dequantized.

A module has `weight`, float8_e4m3fn [out, in], and `weight_scale_inv`, the scales by which it is
multiplied, [out / block, in / block] rounded up. A single scale applies to the entire matrix; vLLM
calls it `weight_scale`. The sources are `weight_dequant` in `kernel.py` of DeepSeek-V3 and `fp8.py`
of vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.base.errors import RequestError, expect
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.quantized.codes import Codes, Rows
from transom.quantize.formats import FLOAT8, WeightFormat

WIDEST = 1 << 20  # inputs of a block that stands for all of them


def open_float8(
    where: str, stored: LazyTensors, block: tuple[int, int], dtype: torch.dtype
) -> LazyTensor | Codes:
    """Return the weight of one module, in codes or rounded once.

    Args:
        where: The module, for messages.
        stored: Its `weight` and its `weight_scale_inv` or `weight_scale`.
        block: Outputs and inputs that share a scale; zeros for all.
        dtype: The dtype of the weight.

    Raises:
        RequestError: The weight is missing, or a tensor has another shape or dtype.
    """
    expect("weight" in stored, where, sorted(stored), "a tensor `weight` too")
    name = "weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale"
    weight, scales = stored["weight"], stored[name]
    expect(weight.dtype == FLOAT8, f"{where}.weight: dtype", weight.dtype, str(FLOAT8))
    expect(len(weight.shape) == 2, f"{where}.weight: shape", weight.shape, "a matrix")
    sizes = [min(own or size, size) for own, size in zip(block, weight.shape, strict=True)]
    shape = tuple(-(-size // own) for size, own in zip(weight.shape, sizes, strict=True))
    fits = scales.shape == shape or (shape == (1, 1) and scales.shape in ((), (1,)))
    expect(fits, f"{where}.{name}: shape", scales.shape, str(shape))

    def checked() -> Tensor:
        each = scales.read().float().view(shape)
        if not (each.isfinite() & (each >= 0)).all():
            expected = "expected finite, positive ones"
            raise RequestError(f"{where}.{name}: got NaN or negative numbers; {expected}")
        return each

    def codes() -> Tensor:
        found = weight.read()
        numbers = bool((found.view(torch.uint8) & 127 != 127).all())
        expect(numbers, f"{where}.weight", float("nan"), "finite numbers")
        return found

    if sizes[0] == 1 and weight.shape[1] % sizes[1] == 0:
        format = WeightFormat(None, 0 if shape[1] == 1 else sizes[1], codes=FLOAT8)
        return Codes(format, weight.shape, lambda: {"codes": codes(), "scales": checked()})

    def read() -> Tensor:
        each, out = checked(), codes().float()
        for axis, size in enumerate(sizes):
            each = each.repeat_interleave(size, axis).narrow(axis, 0, out.size(axis))
        return out.mul_(each).to(dtype)

    return LazyTensor(weight.shape, dtype, read)


def to_float8(parts: Rows) -> Rows:
    """Return the tensors of a module from the parts of its weight."""
    return {"weight": parts["codes"], "weight_scale_inv": parts["scales"].float()}

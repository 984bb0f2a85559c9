"""Cached states as 8-bit codes, with one scale per token and head.

The largest value of a head has code 127 or -127, so a value is wrong by at most half of 1/127 of
it (symmetric quantization per token, as in KIVI, arXiv 2402.02750, for values).
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes int8 [..., H] and scales float32 [..., 1] of states [..., H].

    Scales are rounded to the dtype of `x` before they divide it, so that `from_codes` loses nothing
    where it multiplies in this dtype. States that are NaN or infinite have scales that are.
    """
    x = x.detach()
    scales = (x.abs().amax(-1, keepdim=True) / 127).to(torch.float32)
    if x.dtype != torch.float64:
        scales = scales.to(x.dtype).float()
    # A scale of 0 would make the codes NaN.
    codes = (x / scales.masked_fill(scales == 0, 1.0)).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the states [..., H] in `dtype` of their codes and scales. Nothing larger is made."""
    return codes.to(dtype).mul_(scales.to(dtype))

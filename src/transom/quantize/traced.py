"""Products of few rows with quantized weights as one sum, for compiled graphs on a GPU.

torch.compile makes one kernel of the sum. It reads each code once, and no dense weight is written
to memory: the product takes the time of reading the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.attention.graphs import constant_in_graphs
from transom.quantize.formats import Parts, WeightFormat, wide_scales

MOST_ROWS = 8  # every row reads all codes again, from the second row on out of the GPU's cache


def takes(x: Tensor) -> bool:
    """Return whether rows [..., in] are multiplied by `product` while a graph is traced."""
    few = 0 < x.numel() <= MOST_ROWS * x.size(-1)
    return few and x.is_cuda and torch.compiler.is_compiling()


def product(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """Return x W^T + b [..., out] in the dtype of x, computed in float32 and rounded once.

    Args:
        x: Rows [..., in].
        bias: [out], or None.
        parts: The parts of a weight [out, in].
        format: Their format.
    """
    scales = wide_scales(parts, "scales", format, slice(None)).unsqueeze(-1)  # [out, n, 1]
    groups = x.float().view(-1, 1, scales.size(1), x.size(-1) // scales.size(1))  # [M, 1, n, in/n]
    codes = parts["codes"].unflatten(-1, (scales.size(1), -1))  # [out, n, bytes of a group]
    pairs = [(codes.float(), groups)]
    if format.levels is not None:  # both codes of a byte, with the input of each
        halves = (codes >> 4, codes & 15)
        pairs = [(values_of(half, format), groups[..., i::2]) for i, half in enumerate(halves)]
    terms = torch.zeros((), device=x.device)
    for values, inputs in pairs:
        if format.offset == "zeros":
            values = values - parts["zeros"].float().unsqueeze(-1)
        weight = values * scales
        if format.offset == "minimums":
            weight = weight + wide_scales(parts, "minimums", format, slice(None)).unsqueeze(-1)
        terms = terms + inputs * weight
    y = terms.sum((-1, -2)).view(*x.shape[:-1], -1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def values_of(codes: Tensor, format: WeightFormat) -> Tensor:
    """Return the values of 4-bit codes uint8 in float32: computed, or looked up in a table."""
    levels = format.levels or ()
    if all(level == levels[0] + i for i, level in enumerate(levels)):
        return codes.float() + levels[0]
    return _table(levels, codes.device)[codes.int()]


@constant_in_graphs  # a graph that copies from the host can't be a CUDA graph
def _table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, device=device)

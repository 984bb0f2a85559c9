"""Weights in codes, rounded and decoded in float64 from the formulas.

This module shares no code with `quantize` and `checkpoints`. It works column by column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
KINDS = ("int4", "int8", "nf4", "fp4")


def levels(kind: str) -> Tensor:
    """Return the values of all codes of a kind, float64 [16] or [256], in the order of the codes.

    nf4 has quantiles of the normal distribution, 0 among them: appendix E of arXiv 2305.14314. fp4
    has a sign, 2 bits of an exponent that counts down, and 1 bit of a fraction.
    """
    if kind in ("int4", "int8"):
        half = 8 if kind == "int4" else 128
        return torch.arange(-half, half, dtype=torch.float64)
    if kind == "fp8":  # a sign, 4 bits of an exponent, 3 of a fraction; the last is no number
        sizes = [2.0 ** (max(e, 1) - 7) * ((e > 0) + m / 8) for e in range(16) for m in range(8)]
        sizes[-1] = math.inf
        return torch.tensor([sign * size for sign in (1, -1) for size in sizes]).double()
    if kind == "fp4":
        sizes = [2.0 ** (4 - e) * (1 + m / 2) if e else m / 16 for e in range(4) for m in range(2)]
        return torch.tensor([sign * size for sign in (1, -1) for size in sizes]).double() / 12
    last, quantile = (2 - 1 / 30 - 1 / 32) / 2, NormalDist().inv_cdf
    above = [quantile(last + (0.5 - last) * step / 8) for step in range(8)]
    below = [-quantile(last + (0.5 - last) * step / 7) for step in range(7)]
    return torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64) / above[0]


def kind_of(values: Sequence[float] | None) -> str:
    """Return the kind of codes of 4 bits by their values; int8 for None."""
    found = torch.tensor(values or levels("int8").tolist(), dtype=torch.float64)
    same = (one for one in KINDS if len(levels(one)) == len(found))
    return min(same, key=lambda one: float((levels(one) - found).abs().max()))


@dataclass(frozen=True)
class Grid:
    """The values that the codes of a weight [out, in] can have, in float64.

    Attributes:
        kind: The kind of the codes.
        group: Inputs that share a scale.
        scales: [out, in / group].
        zeros: [out, in / group]. They are subtracted before the scale multiplies.
    """

    kind: str
    group: int
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, weight: Tensor, kind: str, group: int, zero_points: bool) -> Grid:
        """Return the grid of round-to-nearest, by the largest weights of each group.

        Without zero points, the largest weight has a value of its own. With them, the lowest and
        the highest one are the ends of the range; the zeros are not rounded to integers yet.
        """
        scales, zeros = [], []
        for own in weight.split(group, 1):
            largest = own.gather(1, own.abs().argmax(1, keepdim=True)).squeeze(1)
            low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
            if zero_points:
                scales.append((high - low) / (15 if kind == "int4" else 255))
            elif kind == "int4":
                scales.append(largest / -8)
            else:
                scales.append(largest.abs() / {"int8": 127, "fp8": 448}.get(kind, 1))
            zeros.append((-low / scales[-1] - (8 if kind == "int4" else 128)) * zero_points)
        return cls(kind, group, torch.stack(scales, 1), torch.stack(zeros, 1))

    @classmethod
    def stored(cls, parts: Parts, kind: str) -> Grid:
        """Return the grid that the parts of a matrix state."""
        scales = parts["scales"].double()
        zeros = parts["zeros"].double() if "zeros" in parts else torch.zeros_like(scales)
        inputs = parts["codes"].size(1) * (1 if kind in ("int8", "fp8") else 2)
        return cls(kind, inputs // scales.size(1), scales, zeros)

    def values(self, column: int) -> Tensor:
        """Return the values [out, codes] of all codes for one input."""
        place = (slice(None), column // self.group, None)
        return (levels(self.kind) - self.zeros[place]) * self.scales[place]

    def nearest(self, weights: Tensor, column: int) -> Tensor:
        """Return the values nearest to the weights [out] of one input."""
        values = self.values(column)
        return values.gather(1, (values - weights[:, None]).abs().argmin(1, True)).squeeze(1)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a weight [out, in] with every number replaced by the nearest value."""
        columns = enumerate(weight.unbind(1))
        return torch.stack([self.nearest(own, column) for column, own in columns], 1)

    def beyond(self, weight: Tensor, found: Tensor) -> float:
        """Return by how many scales a value is farther from its weight than the nearest, at most.

        All are [out, in].
        """
        more = (found - weight).abs() - (self.rounded(weight) - weight).abs()
        return float((more.unflatten(1, (-1, self.group)).amax(2) / self.scales.abs()).max())


def decoded(parts: Parts, kind: str) -> Tensor:
    """Return the weight [out, in] in float64 that the parts of one matrix stand for."""
    grid, codes = Grid.stored(parts, kind), parts["codes"]
    codes = (codes.view(torch.uint8) if kind == "fp8" else codes).long()
    inputs = grid.group * grid.scales.size(1)
    order = parts["order"].tolist() if "order" in parts else range(inputs)
    out = torch.empty(len(codes), inputs, dtype=torch.float64)
    for column, place in enumerate(order):
        if kind == "int8":
            code = codes[:, column] + 128
        elif kind == "fp8":
            code = codes[:, column]
        else:
            code = codes[:, column // 2] % 16 if column % 2 else codes[:, column // 2] // 16
        out[:, place] = grid.values(column).gather(1, code[:, None]).squeeze(1)
    return out


def eliminated(
    weight: Tensor, hessian: Tensor, grid: Grid, act_order: bool, damping: float
) -> Tensor:
    """Return the weight [out, in] that GPTQ makes, in float64.

    This is the elimination of Optimal Brain Quantization (arXiv 2208.11580), one input after the
    other in the order of GPTQ, with the inverse Hessian [in, in] of the inputs that are left.
    """
    rest, squares = weight.double().clone(), hessian.double().diagonal()
    inverse = (hessian.double() + damping * squares.mean() * torch.eye(len(squares))).inverse()
    out = torch.empty_like(rest)
    order = sorted(range(len(squares)), key=lambda i: -float(squares[i]) if act_order else i)
    for i in order:
        out[:, i] = grid.nearest(rest[:, i], i)
        rest -= ((rest[:, i] - out[:, i]) / inverse[i, i]).outer(inverse[i])
        inverse = inverse - inverse[:, i].outer(inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # the input is rounded, and its row is not read again
    return out


def enlarged(
    weights: list[Tensor], inputs: Tensor, kind: str, group: int, steps: int = 20
) -> Tensor:
    """Return the factors [in] of AWQ for weights [out, in] that read the same inputs [rows, in].

    They are powers of the mean sizes of the inputs, with the exponent whose rounding changes the
    outputs least (section 3.2 of arXiv 2306.00978), divided by the mean of the ends in logarithms.
    """
    sizes, best, least = inputs.abs().mean(0), torch.ones(inputs.size(1)), float("inf")
    for step in range(steps):
        factors = sizes ** (step / steps)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = 0.0
        for weight in weights:
            rounded = Grid.of(weight * factors, kind, group, False).rounded(weight * factors)
            error += float((inputs @ (rounded / factors - weight).T).square().sum())
        best, least = (factors, error) if error < least else (best, least)
    return best


def unpacked(stored: Parts, less_one: bool) -> Tensor:
    """Return the weight [out, in] in float64 of one module of a GPTQ folder.

    A word of `qweight` has neighbouring inputs, the first in the lowest bits. One of `qzeros`
    has neighbouring outputs. `g_idx` is the group of each input.
    """
    words, count = stored["qweight"].long(), len(stored["g_idx"]) // len(stored["qweight"])
    bits, mask = 32 // count, 2 ** (32 // count) - 1
    pairs, outputs = stored["qzeros"].long(), words.size(1)
    zeros = [pairs[:, o // count] >> bits * (o % count) & mask for o in range(outputs)]
    zero = ((torch.stack(zeros) + less_one) & mask).double()
    columns = []
    for i, g in enumerate(stored["g_idx"].tolist()):
        codes = (words[i // count] >> bits * (i % count) & mask).double()
        columns.append(stored["scales"][g].double() * (codes - zero[:, g]))
    return torch.stack(columns, 1)

"""Rounded weights, and scales of groups that minimise their squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.quantize.formats import (
    WeightFormat,
    group_parts,
    in_units,
    nearest_codes,
    not_zero,
    scaled,
)
from transom.quantize.traced import values_of

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the range of a group
WEIGHTS = 1 << 18  # fitted at a time: their tensors fit into the cache of a processor


def nearest_values(units: Tensor, format: WeightFormat) -> Tensor:
    """Return the values of the codes that `nearest_codes` returns, in float32."""
    codes = nearest_codes(units, format)
    return codes.float() if format.levels is None else values_of(codes, format)


@torch.no_grad()
def rounded(weight: Tensor, format: WeightFormat) -> Tensor:
    """Return the weight [..., in] that the parts of `quantize` stand for, without these parts."""
    groups = weight.float().unflatten(-1, (-1, format.group or weight.size(-1)))
    parts = group_parts(groups, format)
    return scaled(nearest_values(in_units(groups, parts, format), format), parts, format)


@torch.no_grad()
def fitted_parts(
    groups: Tensor, format: WeightFormat, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the scales and zeros of groups with the smallest sum of squared errors.

    Smaller ranges have finer steps and cut off the largest weights. Several ranges are tried, each
    with the scale that is best for its codes, as `make_qx_quants` of ggml does.

    Args:
        groups: Weights float32 [out, n, group].
        format: A format whose scales are not codes.
        importance: The weight [n, group] of each squared error; 1 by default.
    """
    rows = max(1, WEIGHTS // groups[0].numel())
    if len(groups) > rows:
        made = [fitted_parts(some, format, importance) for some in groups.split(rows)]
        return {name: torch.cat([parts[name] for parts in made]) for name in made[0]}
    factor = torch.ones_like(groups[0]) if importance is None else importance
    ends = torch.stack(groups.aminmax(dim=-1), -1)  # the range of a group is that of these two
    best: dict[str, Tensor] = {}
    least = torch.full_like(groups[..., 0], torch.inf)
    for shrink in SHRINKS:
        parts = group_parts(ends, format, shrink)
        units = nearest_values(in_units(groups, parts, format), format)
        units -= parts["zeros"].float().unsqueeze(-1) if "zeros" in parts else 0.0
        powers = (units.square() * factor).sum(-1)
        scales = (groups * units * factor).sum(-1) / not_zero(powers)
        # A group that shrinks to zeros keeps its scale.
        parts["scales"] = torch.where(powers == 0, parts["scales"].float(), scales).to(
            format.scales
        )
        errors = groups - units * parts["scales"].float().unsqueeze(-1)
        errors = (errors.square_() * factor).sum(-1)
        better = errors < least
        least = torch.where(better, errors, least)
        best = {
            name: torch.where(better, part, best.get(name, part)) for name, part in parts.items()
        }
    return best

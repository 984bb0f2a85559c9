"""GPTQ: rounding in which later inputs make up for the errors of earlier ones.

Frantar et al. 2022, arXiv 2210.17323. The inputs of a leaf are rounded one after the other. The
error of each, divided by its remaining freedom, is taken from the weights of the inputs that are
still to be rounded, so that the outputs on the calibration text change least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.base.errors import WorkError, notice
from transom.quantize.fitting import fitted_parts, nearest_values
from transom.quantize.formats import WeightFormat, nearest_codes, not_zero, pack

BLOCK = 128  # inputs whose errors reach the inputs after them in one product; a multiple of a group
_ATTEMPTS = 6


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    format: WeightFormat,
    act_order: bool = True,
    damping: float = 0.01,
) -> dict[str, Tensor]:
    """Return the parts of a weight that change its outputs least on the given inputs.

    Args:
        weight: [out, in] of any floating dtype.
        hessian: The sum of x x^T [in, in] over the inputs. An input that is always 0 is rounded
            to the nearest.
        format: A format without minimums whose scales are not codes, and whose group divides `in`.
        act_order: Round the inputs with the largest squares first. The scales of all groups are
            then chosen before, since the inputs of a group are not reached one after the other.
            Otherwise they are chosen when a group is reached, from weights with the errors of
            earlier ones.
        damping: Added to the diagonal of the Hessian, relative to its mean. It is made ten times
            as large as often as the Hessian is singular.

    Raises:
        WorkError: The Hessian is singular with much damping too.
    """
    inputs, squares = weight.size(1), hessian.diagonal()
    group = format.group or inputs
    order = torch.arange(inputs, device=weight.device)
    if act_order:
        order = squares.argsort(descending=True, stable=True)
    freedom = _freedom(hessian[order][:, order], damping)
    weighting = (squares / squares.mean().clamp(min=1e-30) + damping).float().view(-1, group)
    at_once = act_order or group == inputs
    parts: list[dict[str, Tensor]] = []
    if at_once:
        parts = [fitted_parts(weight.float().unflatten(1, (-1, group)), format, weighting)]
    grids = _grids(parts)
    rest = weight.float()[:, order].T.contiguous()  # [in, out], less the errors of earlier inputs
    units = torch.empty_like(rest)
    for start, places in zip(range(0, inputs, BLOCK), order.split(BLOCK), strict=True):
        stop = start + len(places)
        block, inside = rest[start:stop], freedom[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i, place in enumerate(places.tolist()):
            if not at_once and place % group == 0:
                own = block[i : i + group].T.contiguous().unsqueeze(1)
                parts.append(fitted_parts(own, format, weighting[place // group, None]))
                grids += _grids(parts[-1:])
            inverse, scale, zero = grids[place // group]
            units[start + i] = block[i] * inverse + zero
            rounded = (nearest_values(units[start + i], format) - zero) * scale
            errors[i] = (block[i] - rounded) / inside[i, i]
            block[i:].addr_(inside[i, i:], errors[i], alpha=-1)
        rest[stop:].addmm_(freedom[start:stop, stop:].T, errors, alpha=-1)
    codes = nearest_codes(units[order.argsort()].T.contiguous(), format)
    made = {name: torch.cat([one[name] for one in parts], 1) for name in parts[0]}
    return {"codes": codes if format.levels is None else pack(codes), **made}


def _grids(parts: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the inverse scale, the scale and the zero of every group, each float32 [out]."""
    out: list[tuple[Tensor, Tensor, Tensor]] = []
    for one in parts:
        scales = one["scales"].float().T.contiguous()
        zeros = one["zeros"].float().T.contiguous() if "zeros" in one else torch.zeros_like(scales)
        out += zip(1 / not_zero(scales), scales, zeros, strict=True)
    return out


def _freedom(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper factor U of the inverse Hessian, U^T U = H^-1, in float32.

    Row i of U says how much the inputs from i on can make up for, once those before are rounded.

    Raises:
        WorkError: The Hessian is singular with much damping too.
    """
    wide = hessian.double()
    squares = wide.diagonal()
    mean = squares.mean().clamp(min=1e-30)
    # From the last to the first, the factor of H itself is upper, and its inverse is U: one
    # factorization, where the inverse of H would take another and lose half of the digits.
    for attempt in range(_ATTEMPTS):
        added = squares + damping * 10.0**attempt * mean
        lower, failed = torch.linalg.cholesky_ex(wide.diagonal_scatter(added).flip(0, 1))
        if not int(failed):
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            upper = lower.flip(0, 1)
            return torch.linalg.solve_triangular(upper, identity, upper=True).float()
        notice("gptq: a singular Hessian got ten times the damping", again=True)
    raise WorkError("calibration: got a Hessian that is singular; expected more text")

"""Several adapters as one change of each weight: added up, by TIES or by DARE, as PEFT's
`merge_utils` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.lora.adapters import LoraWeights, carriers
from transom.lora.combine_args import CombineArgs


def weigh_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Multiply what each adapter adds by its weight, in place.

    One that replaces (DoRA, whole modules) adds nothing that could be weighed: other than 1 is a
    `RequestError`.
    """
    for path, _, held in carriers(model):
        for name, weight in weights.items():
            part = held._modules.get(name)
            if part is None or weight == 1:
                continue
            if not isinstance(part, LoraWeights) or part.magnitude is not None:
                raise RequestError(
                    f"weight: got {weight:g}; adapter {name!r} replaces {path} or its length "
                    f"(DoRA), which has no weight; expected 1"
                )
            part.alpha *= weight


def combined(
    deltas: Sequence[Tensor], weights: Sequence[float], args: CombineArgs, draws: torch.Generator
) -> Tensor:
    """One change of a weight from those of several adapters, all of its shape, in their dtype."""
    match args.method:
        case "linear":
            return sum_of(deltas, weights)
        case "ties":
            return ties(deltas, weights, args.density)
        case "dare":
            return dare(deltas, weights, args.density, draws)


def sum_of(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum."""
    out = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        out += weight * delta
    return out


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect a sign per number, average those that agree with it (Yadav et al. 2023, arXiv
    2306.01708).

    The largest `density` of each delta is kept; the elected sign is that of their plain sum.
    Weights enter the average only, and its count is of deltas, as in PEFT.
    """
    trimmed = [trim(delta, density) for delta in deltas]
    elected = torch.where(sum_of(trimmed, [1.0] * len(trimmed)) >= 0, 1.0, -1.0).to(
        trimmed[0].dtype
    )
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = delta.sign() == elected
        total += weight * delta * agrees
        count += agrees
    return total / count.clamp(min=1)


def trim(delta: Tensor, density: float) -> Tensor:
    """The largest share of the numbers by magnitude, zeros for the rest."""
    if density >= 1:
        return delta
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    flat = torch.zeros_like(delta).flatten()
    flat[kept] = delta.flatten()[kept]
    return flat.view_as(delta)


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, draws: torch.Generator
) -> Tensor:
    """Each number is kept with probability `density` and then divided by it (Yu et al. 2023, arXiv
    2311.03099).
    """
    if density >= 1:
        return sum_of(deltas, weights)
    kept = [torch.bernoulli(torch.full(delta.shape, density), generator=draws) for delta in deltas]
    thinned = [delta * mask.to(delta) / density for delta, mask in zip(deltas, kept, strict=True)]
    return sum_of(thinned, weights)

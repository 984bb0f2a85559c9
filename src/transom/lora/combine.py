"""Several adapters as one change of each weight: summed, by TIES or by DARE, as PEFT's
`merge_utils` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transom.base.errors import expect
from transom.lora.adapters import adapted_modules
from transom.lora.args import CombineArgs
from transom.lora.weights import LoraWeights


def scale_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Multiply the change of each adapter by its weight, in place.

    Args:
        model: a model with adapters.
        weights: factors by name of adapter.

    Raises:
        RequestError: the weight of an adapter that replaces parameters (DoRA, whole modules) is not
            1.
    """
    for path, _, adapters in adapted_modules(model):
        for name, weight in weights.items():
            part = adapters._modules.get(name)
            if part is None or weight == 1:
                continue
            adds = isinstance(part, LoraWeights) and part.magnitude is None
            expected = f"1, as adapter {name!r} replaces {path} or its length (DoRA)"
            expect(adds, "weight", weight, expected)
            assert isinstance(part, LoraWeights)
            part.alpha *= weight


def combined(
    deltas: Sequence[Tensor], weights: Sequence[float], args: CombineArgs, draws: torch.Generator
) -> Tensor:
    """Return one change of a weight.

    Args:
        deltas: the changes of the adapters, all of one shape and dtype.
        weights: their factors.
        args: the method and its density.
        draws: the generator of DARE.
    """
    match args.method:
        case "linear":
            return weighted_sum(deltas, weights)
        case "ties":
            return ties(deltas, weights, args.density)
        case "dare":
            return dare(deltas, weights, args.density, draws)


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of weight * delta."""
    out = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        out += weight * delta
    return out


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim each delta, elect a sign for each number, and average the deltas that agree with it.

    Source: Yadav et al. 2023, arXiv 2306.01708. The elected sign is that of the sum of the trimmed
    deltas. As in PEFT, weights act in the average only, and its divisor is the number of deltas
    that agree.
    """
    trimmed = [trim(delta, density) for delta in deltas]
    elected = torch.where(weighted_sum(trimmed, [1.0] * len(trimmed)) >= 0, 1.0, -1.0).to(
        trimmed[0].dtype
    )
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = delta.sign() == elected
        total += weight * delta * agrees
        count += agrees
    return total / count.clamp(min=1)


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the numbers with the largest magnitude, and set the others to
    0.
    """
    if density >= 1:
        return delta
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    flat = torch.zeros_like(delta).flatten()
    flat[kept] = delta.flatten()[kept]
    return flat.view_as(delta)


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, draws: torch.Generator
) -> Tensor:
    """Keep each number with probability `density`, divide it by `density`, and sum the deltas.

    Source: Yu et al. 2023, arXiv 2311.03099.
    """
    if density >= 1:
        return weighted_sum(deltas, weights)
    kept = [torch.bernoulli(torch.full(delta.shape, density), generator=draws) for delta in deltas]
    thinned = [delta * mask.to(delta) / density for delta, mask in zip(deltas, kept, strict=True)]
    return weighted_sum(thinned, weights)

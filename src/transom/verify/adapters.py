"""Adapters written out from their formula, sharing no code with `transom.lora`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transom.layers.linear import Embedding
from transom.lora.weights import Leaf, LoraWeights


def merged_weight(leaf: Leaf, weight: Tensor, parts: Sequence[LoraWeights]) -> Tensor:
    """Return W + scale B A for all parts, in float64 and differentiable.

    DoRA (arXiv 2402.09353) then gives the result the learned lengths; the lengths that it has are
    constants for the gradient, as section 4.3 asks.

    Args:
        leaf: The module of the weight.
        weight: The weight without adapters.
        parts: The adapters; those of DoRA come alone.
    """
    total = weight.double()
    for lora in parts:
        factors = {"direct": 1.0, "alpha_over_rank": 1 / lora.rank, "rslora": lora.rank**-0.5}
        change = torch.einsum("...or,...ri->...oi", lora.B.double(), lora.A.double())
        change = change.mT if isinstance(leaf, Embedding) else change
        total = total + factors[lora.scaling] * lora.alpha * change
    magnitude = parts[0].magnitude
    if magnitude is None:
        return total
    dim = 0 if isinstance(leaf, Embedding) else -1  # of the inputs, over which lengths are taken
    lengths = total.detach().norm(dim=dim, keepdim=True)
    return total / lengths * magnitude.double().unsqueeze(dim)


def randomize_adapters(model: nn.Module, seed: int) -> None:
    """Add random numbers to all adapters, which are the identity when they are new."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora." in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))

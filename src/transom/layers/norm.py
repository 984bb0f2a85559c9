"""Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467), float32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rmsnorm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 or better, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """rmsnorm times a learned weight [D]; cast first, then multiply, as Llama does."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.eps) * self.weight

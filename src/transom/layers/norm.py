"""Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) and LayerNorm, float32
inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.config.layer_args import NormKind


def rmsnorm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 or better, in x's
    dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """rmsnorm times a learned weight [D]; `kind` says whether the product or the cast comes
    first.
    """

    def __init__(self, dim: int, eps: float = 1e-6, kind: NormKind = "rms") -> None:
        super().__init__()
        self.eps, self.kind = eps, kind
        self.weight = nn.Parameter(torch.zeros(dim) if kind == "rms_plus_one" else torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return rmsnorm(x, self.eps) * self.weight
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = self.weight.to(wide.dtype)
        if (
            self.kind == "rms_plus_one"
        ):  # stored without the 1, so that weight decay pulls towards 1
            weight = 1.0 + weight
        return F.rms_norm(wide, wide.shape[-1:], weight, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias [D], float32 or better inside, in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def make_norm(kind: NormKind, dim: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm of that kind over `dim` features."""
    return LayerNorm(dim, eps) if kind == "layer" else RMSNorm(dim, eps, kind)

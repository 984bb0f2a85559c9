"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and LayerNorm, in float32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.config.layer_args import NormKind


def rmsnorm(x: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension.

    It is computed in float32 or better and cast back to the dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rmsnorm` times a learned weight [D].

    Args:
        dim: Features D.
        eps: Added to the mean square.
        kind: `rms` casts before the product with the weight (Llama), `rms_wide` after it (OLMo),
            and `rms_plus_one` multiplies by 1 + weight (Gemma).
    """

    def __init__(self, dim: int, eps: float = 1e-6, kind: NormKind = "rms") -> None:
        super().__init__()
        self.eps, self.kind = eps, kind
        self.weight = nn.Parameter(torch.zeros(dim) if kind == "rms_plus_one" else torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., D] in its dtype."""
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
    """LayerNorm with weight and bias [D], in float32 or better inside."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., D] in its dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def make_norm(kind: NormKind, dim: int, eps: float) -> RMSNorm | LayerNorm:
    """Return the norm of that kind over `dim` features."""
    return LayerNorm(dim, eps) if kind == "layer" else RMSNorm(dim, eps, kind)

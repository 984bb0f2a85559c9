"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from transom.layers.linear import Linear


class FeedForward(nn.Module):
    """w_out(silu(w_gate x) * w_value x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w_gate = Linear(dim, hidden_dim)
        self.w_value = Linear(dim, hidden_dim)
        self.w_out = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(F.silu(self.w_gate(x)) * self.w_value(x))

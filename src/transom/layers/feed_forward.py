"""Feed-forward, with a gate (SwiGLU and relatives, Shazeer 2020, arXiv 2002.05202) or without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.config.layer_args import Activation
from transom.layers.linear import Linear, products


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Apply the activation of that name elementwise; `gelu` is the exact one."""
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)


class FeedForward(nn.Module):
    """w_out(act(w_gate x) * w_value x), or w_out(act(w_value x)) when not gated."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w_gate = Linear(dim, hidden_dim, bias) if gated else None
        self.w_value = Linear(dim, hidden_dim, bias)
        self.w_out = Linear(hidden_dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward [..., dim] of hidden states [..., dim], in the same dtype."""
        if self.w_gate is None:
            return self.w_out(activate(self.w_value(x), self.activation))
        gate, value = products(x, self.w_gate, self.w_value)
        hidden = activate(gate, self.activation)
        # Without gradients nothing else needs the activation: prompts take a tensor less of memory.
        hidden = hidden * value if torch.is_grad_enabled() else hidden.mul_(value)
        del gate, value  # `w_out` needs memory too
        return self.w_out(hidden)

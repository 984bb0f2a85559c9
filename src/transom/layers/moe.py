"""Mixture of experts: a router chooses, a dispatcher moves tokens, experts compute.

Expert parallelism replaces the dispatcher and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.args import LayerArgs, MoeArgs
from transom.layers.feed_forward import FeedForward
from transom.layers.linear import GroupedLinear


@dataclass(frozen=True)
class RouterStatistics:
    """What one layer's router did with the real tokens of a call; returned, never stored in buffers.

    `picks_E` counts choices, `probabilities_E` sums softmax probabilities (with gradient), over `tokens`.
    """

    picks_E: Tensor
    probabilities_E: Tensor
    tokens: Tensor


class Router(nn.Module):
    """Scores every expert for every token in float32 or better and keeps the best `top_k`."""

    def __init__(self, dim: int, moe: MoeArgs) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, dim))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [T, A], weights [T, A] float32, logits [T, E] float32)."""
        # Autocast would run this product in half precision, and near-ties would flip between machines.
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        if self.moe.routing == "sigmoid":
            best, ids_TA = logits_TE.topk(self.moe.top_k, -1)
            return ids_TA, best.sigmoid(), logits_TE
        if self.moe.normalize:  # equal to softmax over all, top-k, divided by their sum (Mixtral)
            best, ids_TA = logits_TE.topk(self.moe.top_k, -1)
            return ids_TA, best.softmax(-1), logits_TE
        weights_TA, ids_TA = logits_TE.softmax(-1).topk(self.moe.top_k, -1)
        return ids_TA, weights_TA, logits_TE


class Experts(nn.Module):
    """E SwiGLU feed-forwards with grouped weights."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w_gate = GroupedLinear(num_experts, dim, hidden_dim)
        self.w_value = GroupedLinear(num_experts, dim, hidden_dim)
        self.w_out = GroupedLinear(num_experts, hidden_dim, dim)

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        hidden = F.silu(self.w_gate(rows_RD, ends_E)) * self.w_value(rows_RD, ends_E)
        return self.w_out(hidden, ends_E)


class Handle(NamedTuple):
    """What `combine` needs to undo `dispatch`: the sorting order [R] and the rows per token."""

    order_R: Tensor
    active: int


class LocalDispatcher:
    """Sorts tokens by expert on one device, and puts the results back in order."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, x_TD: Tensor, ids_TA: Tensor, scale_TA: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Handle]:
        """(rows [R, D] sorted by expert, ends [E], handle for `combine`); `scale_TA` scales the input."""
        order_R = ids_TA.flatten().argsort(stable=True)
        rows_RD = x_TD.index_select(0, order_R // ids_TA.size(1))
        if scale_TA is not None:
            rows_RD = (rows_RD * scale_TA.flatten()[order_R, None]).to(x_TD.dtype)
        ends_E = torch.bincount(ids_TA.flatten(), minlength=self.num_experts).cumsum(0)
        return rows_RD, ends_E, Handle(order_R, ids_TA.size(1))

    def combine(self, rows_RD: Tensor, handle: Handle, weights_TA: Tensor | None = None) -> Tensor:
        """Sum [T, D] of every token's rows, weighted by `weights_TA` where given."""
        # The inverse permutation gathers: unlike index_add its result does not depend on thread order.
        rows_TAD = rows_RD.index_select(0, handle.order_R.argsort()).unflatten(0, (-1, handle.active))
        if weights_TA is not None:
            rows_TAD = rows_TAD * weights_TA.unsqueeze(-1).to(rows_TAD.dtype)
        return rows_TAD.sum(1)


class MoE(nn.Module):
    """Router, experts, and optionally one shared expert that every token visits."""

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        assert layer.moe is not None and layer.moe.hidden_dim is not None, "LayerArgs resolves both"
        moe, hidden_dim = layer.moe, layer.moe.hidden_dim
        self.moe = moe
        self.router = Router(layer.dim, moe)
        self.experts = Experts(moe.num_experts, layer.dim, hidden_dim)
        self.shared_expert = FeedForward(layer.dim, hidden_dim) if moe.shared_expert else None
        self.dispatcher = LocalDispatcher(moe.num_experts)

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, RouterStatistics]:
        """([B, T, D], statistics over the tokens that are not padding)."""
        x_TD = x_BTD.flatten(0, 1)
        ids_TA, weights_TA, logits_TE = self.router(x_TD)
        scale_input = self.moe.routing == "sigmoid"
        rows, ends, handle = self.dispatcher.dispatch(x_TD, ids_TA, weights_TA if scale_input else None)
        y_TD = self.dispatcher.combine(self.experts(rows, ends), handle, None if scale_input else weights_TA)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view_as(x_BTD), statistics(ids_TA, logits_TE, valid_BT)


def statistics(ids_TA: Tensor, logits_TE: Tensor, valid_BT: Tensor | None) -> RouterStatistics:
    """Count choices and sum probabilities over the real tokens."""
    probabilities_TE = logits_TE.softmax(-1)
    picks_TE = torch.zeros_like(probabilities_TE).scatter(1, ids_TA, 1.0)
    if valid_BT is None:
        tokens = torch.full((), ids_TA.size(0), dtype=torch.float32, device=ids_TA.device)
    else:
        valid_T1 = valid_BT.flatten().float().unsqueeze(1)
        picks_TE, probabilities_TE = picks_TE * valid_T1, probabilities_TE * valid_T1
        tokens = valid_T1.sum()
    return RouterStatistics(picks_TE.sum(0).detach(), probabilities_TE.sum(0), tokens)

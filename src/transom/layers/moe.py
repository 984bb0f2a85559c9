"""Mixture of experts: a router chooses, a dispatcher moves tokens, experts compute.

Expert parallelism only has to replace the dispatcher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.base.runtime import no_autocast
from transom.config.layer_args import LayerArgs, MoeArgs
from transom.layers.feed_forward import FeedForward, activate
from transom.layers.initial import draw_weight
from transom.layers.linear import GroupedLinear

Routing = Literal["softmax", "sigmoid", "biased_sigmoid"]
GPT_OSS_ALPHA = (
    1.702  # makes x * sigmoid(alpha x) close to gelu (Hendrycks and Gimpel 2016, arXiv 1606.08415)
)


@dataclass(frozen=True)
class RouterStatistics:
    """What the router of one layer did in a call.

    The forward pass returns it and stores nothing, so that recomputed activations do not count
    twice. Sums are computed in `training/losses/balance.py`, since decoding needs none.

    Attributes:
        chosen_TA: int64 [T, A], the experts that the router chose before any capacity; -1 for
            padding.
        ids_TA: int64 [T, A], the experts that computed the token.
        logits_TE: Router logits [T, E] in float32 or better.
        rows: Rows of the batch. T counts the tokens of all rows, one row after the other.
        routing: How scores are computed.
    """

    chosen_TA: Tensor
    ids_TA: Tensor
    logits_TE: Tensor
    rows: int  # T counts the tokens of all rows, one after the other
    routing: Routing


def scores(logits_TE: Tensor, routing: Routing) -> Tensor:
    """Return the scores [T, E]: the softmax over all experts, or the sigmoid of each expert."""
    return logits_TE.softmax(-1) if routing == "softmax" else logits_TE.sigmoid()


class Router(nn.Module):
    """Scores every expert for every token and keeps the best `top_k`.

    It computes in float32 or better. `choice_bias` [E] is added to the scores for the choice, but
    not to the weights (DeepSeek-V3, arXiv 2412.19437). Balancing updates it, not the gradient.
    """

    def __init__(self, dim: int, moe: MoeArgs) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, dim))
        draw_weight(self.weight)
        self.bias = nn.Parameter(torch.zeros(moe.num_experts)) if moe.router_bias else None
        choice_bias = nn.Parameter(torch.zeros(moe.num_experts), requires_grad=False)
        self.choice_bias = choice_bias if moe.has_choice_bias else None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts for each token.

        Args:
            x_TD: Hidden states [T, D].

        Returns:
            Expert ids int64 [T, A], best first, their weights [T, A] and the logits [T, E], both in
            float32 or better.
        """
        # Autocast would run this product in half precision, and near-ties would flip between
        # machines.
        with no_autocast(x_TD.device.type):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            x_TD = x_TD.to(wide)
            if (
                self.training and self.moe.jitter > 0
            ):  # not in place: experts see the tokens as they are
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(
                    1 - self.moe.jitter, 1 + self.moe.jitter
                )
            logits_TE = F.linear(
                x_TD, self.weight.to(wide), None if self.bias is None else self.bias.to(wide)
            )
            ids_TA = self.preference(logits_TE).topk(self.moe.top_k, -1).indices
            return ids_TA, self.weigh(logits_TE, ids_TA), logits_TE

    @torch.no_grad()
    def preference(self, logits_TE: Tensor) -> Tensor:
        """Return the scores that decide the choice [T, E]; -inf in groups that are not eligible."""
        # Scores have the same order, but large ones round to the same number.
        if self.choice_bias is None:
            return logits_TE
        choice_TE = scores(logits_TE, self.moe.routing) + self.choice_bias.to(logits_TE.dtype)
        if self.moe.num_groups == 1:
            return choice_TE
        choice_TGE = choice_TE.unflatten(-1, (self.moe.num_groups, -1))
        best_TG = choice_TGE.topk(2, -1).values.sum(-1).topk(self.moe.top_groups, -1).indices
        outside_TG = torch.ones_like(choice_TGE[..., 0], dtype=torch.bool).scatter(
            -1, best_TG, False
        )
        return choice_TGE.masked_fill(outside_TG.unsqueeze(-1), -torch.inf).flatten(-2)

    def weigh(self, logits_TE: Tensor, ids_TA: Tensor) -> Tensor:
        """Return the weights [T, A] of the chosen experts; those of id -1 are 0."""
        weights_TA = scores(logits_TE, self.moe.routing).gather(-1, ids_TA.clamp(min=0))
        weights_TA = weights_TA.masked_fill(ids_TA < 0, 0.0)
        if self.moe.normalize and self.moe.routing != "sigmoid":
            weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
        return (
            weights_TA * self.moe.routed_scale
            if self.moe.routing == "biased_sigmoid"
            else weights_TA
        )


class Experts(nn.Module):
    """E feed-forwards with grouped weights, with a gate or without."""

    def __init__(self, layer: LayerArgs, moe: MoeArgs, hidden_dim: int) -> None:
        super().__init__()
        self.layer, self.moe = layer, moe
        count, dim, bias = moe.num_experts, layer.dim, moe.expert_bias
        self.w_gate = GroupedLinear(count, dim, hidden_dim, bias) if layer.ffn_gated else None
        self.w_value = GroupedLinear(count, dim, hidden_dim, bias)
        self.w_out = GroupedLinear(count, hidden_dim, dim, bias)

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Compute the feed-forward of every row by its expert.

        Args:
            rows_RD: Rows [R, D], sorted by expert.
            ends_E: Integers [E], the end of each expert's rows.

        Returns:
            [R, D]. Rows after the last end have no meaning.
        """
        value = self.w_value(rows_RD, ends_E)
        if self.w_gate is None:
            return self.w_out(activate(value, self.layer.activation), ends_E)
        gate = self.w_gate(rows_RD, ends_E)
        if self.moe.expert_activation == "clamped":
            hidden = clamped_product(gate, value, self.moe.activation_limit)
        else:
            hidden = activate(gate, self.layer.activation) * value
        return self.w_out(hidden, ends_E)


def clamped_product(gate: Tensor, value: Tensor, limit: float) -> Tensor:
    """Return gpt-oss's (value + 1) * gate * sigmoid(1.702 gate).

    Both are at most `limit`, and the value is at least -`limit` (arXiv 2508.10925).
    """
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    return (value + 1) * (gate * torch.sigmoid(GPT_OSS_ALPHA * gate))


class Handle(NamedTuple):
    """What `combine` needs to undo `dispatch`.

    Attributes:
        order_R: int64 [R], the sorting order of the rows.
        active: Rows per token.
        kept_R: bool [R], False for rows without an expert; None if all have one.
    """

    order_R: Tensor
    active: int
    kept_R: Tensor | None


class LocalDispatcher:
    """Sorts tokens by expert on one device, and restores their order, without waiting for it."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, x_TD: Tensor, ids_TA: Tensor, scale_TA: Tensor | None = None, *, may_drop: bool = True
    ) -> tuple[Tensor, Tensor, Handle]:
        """Sort tokens by expert.

        Args:
            x_TD: Hidden states [T, D].
            ids_TA: Expert ids int64 [T, A]; -1 is none.
            scale_TA: Factors on the inputs of the experts, if any.
            may_drop: False if no id is -1, which saves the masks.

        Returns:
            Rows [R, D] sorted by expert, the end of each expert's rows [E], and the handle for
            `combine`. Rows of id -1 come after all ends.
        """
        ids_R = ids_TA.flatten()
        if may_drop:
            ids_R = torch.where(ids_R < 0, self.num_experts, ids_R)
        sorted_R, order_R = ids_R.sort(stable=True)
        ends_E = torch.searchsorted(
            sorted_R, torch.arange(self.num_experts, device=ids_R.device), right=True
        )
        rows_RD = x_TD.index_select(0, order_R // ids_TA.size(1))
        if scale_TA is not None:
            rows_RD = (rows_RD * scale_TA.flatten()[order_R, None]).to(x_TD.dtype)
        kept_R = sorted_R < self.num_experts if may_drop else None
        return _only(rows_RD, kept_R), ends_E, Handle(order_R, ids_TA.size(1), kept_R)

    def combine(self, rows_RD: Tensor, handle: Handle, weights_TA: Tensor | None = None) -> Tensor:
        """Return the sum [T, D] of every token's rows; rows of id -1 count zero.

        Args:
            rows_RD: Outputs of the experts, in the order of `dispatch`.
            handle: The handle of `dispatch`.
            weights_TA: Weights of the rows [T, A]; by default all are 1.
        """
        # The inverse permutation gathers: unlike index_add its result does not depend on thread
        # order.
        rows_RD = _only(rows_RD, handle.kept_R).index_select(0, handle.order_R.argsort())
        rows_TAD = rows_RD.unflatten(0, (-1, handle.active))
        if weights_TA is not None:
            rows_TAD = rows_TAD * weights_TA.unsqueeze(-1).to(rows_TAD.dtype)
        return rows_TAD.sum(1)


def _only(rows_RD: Tensor, kept_R: Tensor | None) -> Tensor:
    """Return the rows with zeros where not kept, for their gradients too.

    Experts leave any numbers there, also NaN.
    """
    return rows_RD if kept_R is None else rows_RD.masked_fill(~kept_R.unsqueeze(-1), 0.0)


class MoE(nn.Module):
    """Mixture of experts: a router, experts, and optionally a shared expert for every token.

    Routing follows Switch (arXiv 2101.03961), Mixtral (2401.04088), DeepSeek-V3 (2412.19437) or
    Llama 4, as `MoeArgs` says.
    """

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        assert layer.moe is not None and layer.moe.hidden_dim is not None, "LayerArgs resolves both"
        moe, hidden_dim = layer.moe, layer.moe.hidden_dim
        self.moe = moe
        self.router = Router(layer.dim, moe)
        self.experts = Experts(layer, moe, hidden_dim)
        self.shared_expert = None
        if moe.shared_expert:
            shared_dim = moe.shared_hidden_dim or hidden_dim
            self.shared_expert = FeedForward(
                layer.dim, shared_dim, layer.activation, layer.ffn_gated, layer.ffn_bias
            )
        self.dispatcher = LocalDispatcher(moe.num_experts)

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None
    ) -> tuple[Tensor, RouterStatistics]:
        """Compute the mixture of experts.

        Args:
            x_BTD: Hidden states [B, T, D].
            valid_BT: bool [B, T], False for padding, which only the shared expert computes; None if
                no token is padding.

        Returns:
            [B, T, D] in the dtype of `x_BTD`, not added to the residual stream, and the statistics
            of the router over the tokens that are not padding.
        """
        x_TD, moe, rows = x_BTD.flatten(0, 1), self.moe, x_BTD.size(0)
        chosen_TA, weights_TA, logits_TE = self.router(x_TD)
        if valid_BT is not None:
            chosen_TA = chosen_TA.masked_fill(~valid_BT.reshape(-1, 1), -1)
        ids_TA, limited = chosen_TA, self.training and moe.expert_capacity is not None
        if limited:
            ids_TA = within_capacity(chosen_TA, self.router.preference(logits_TE), rows, moe)
            if moe.overflow == "second_choice":
                weights_TA = self.router.weigh(logits_TE, ids_TA)
        scales_input = moe.routing == "sigmoid"  # Llama 4 scales the inputs of experts
        before, after = (weights_TA, None) if scales_input else (None, weights_TA)
        may_drop = limited or valid_BT is not None
        rows_RD, ends_E, handle = self.dispatcher.dispatch(x_TD, ids_TA, before, may_drop=may_drop)
        y_TD = self.dispatcher.combine(self.experts(rows_RD, ends_E), handle, after)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view_as(x_BTD), RouterStatistics(
            chosen_TA, ids_TA, logits_TE, rows, moe.routing
        )


def picked(ids_TA: Tensor, num_experts: int) -> Tensor:
    """Return bool [T, E], the experts that each token goes to, from ids [T, A]; -1 is none."""
    spots_TA = torch.where(ids_TA < 0, num_experts, ids_TA)
    none_TE = torch.zeros(len(ids_TA), num_experts + 1, dtype=torch.bool, device=ids_TA.device)
    return none_TE.scatter(1, spots_TA, True)[:, :num_experts]


@torch.no_grad()
def within_capacity(ids_TA: Tensor, preference_TE: Tensor, rows: int, moe: MoeArgs) -> Tensor:
    """Return the expert ids [T, A] that respect the capacity of each expert.

    A token that does not fit gets -1, or the best expert with room (`overflow`). Tokens are served
    in the order of their row, as in Switch (arXiv 2101.03961), so that later tokens do not matter.
    Second choices are placed after all first ones, and wait for the device.

    Args:
        ids_TA: Chosen expert ids; -1 is none.
        preference_TE: The scores that decide the choice [T, E].
        rows: Rows of the batch; each has a capacity of its own.
        moe: Arguments of the layer.
    """
    assert moe.expert_capacity is not None, "called with a capacity only"
    wanted_BTE = picked(ids_TA, moe.num_experts).unflatten(0, (rows, -1))
    tokens_B = wanted_BTE.any(-1).sum(1)
    # Rounding must not turn an integer share into the next integer.
    share_B = tokens_B.float() * (moe.expert_capacity * moe.top_k / moe.num_experts)
    limit_B11 = torch.ceil(share_B - 1e-3).clamp(min=1)[:, None, None]
    taken_BTE = wanted_BTE & (wanted_BTE.cumsum(1) <= limit_B11)
    if moe.overflow == "drop":
        return ids_TA.masked_fill(~taken_BTE.flatten(0, 1).gather(1, ids_TA.clamp(min=0)), -1)
    preference_BTE = preference_TE.view_as(wanted_BTE)
    while True:  # every round fills an expert or places every token that lacks one
        room_B1E = limit_B11 - taken_BTE.sum(1, keepdim=True)
        lacking_BT1 = taken_BTE.sum(-1, keepdim=True) < wanted_BTE.sum(-1, keepdim=True)
        open_BTE = lacking_BT1 & ~taken_BTE & (room_B1E > 0) & (preference_BTE > -torch.inf)
        if not bool(open_BTE.any()):
            break
        best_BT1 = preference_BTE.masked_fill(~open_BTE, -torch.inf).argmax(-1, keepdim=True)
        asked_BTE = torch.zeros_like(open_BTE).scatter(-1, best_BT1, True) & open_BTE
        taken_BTE = taken_BTE | (asked_BTE & (asked_BTE.cumsum(1) <= room_B1E))
    taken_TE = taken_BTE.flatten(0, 1)
    best_TA = preference_TE.masked_fill(~taken_TE, -torch.inf).topk(moe.top_k, -1).indices
    return best_TA.masked_fill(~taken_TE.gather(1, best_TA), -1)

"""Balanced experts: auxiliary losses, the bias that moves after each step, and the router's health
in numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transom.config.layer_args import MoeArgs
from transom.layers.block import TransformerBlock
from transom.layers.moe import MoE, RouterStatistics, picked, scores
from transom.models.llm import LLM


class RouterSums(NamedTuple):
    """One layer's sums over the real tokens of a call.

    By row: `picks_BE` counts what the router chose, before any capacity, `probabilities_BE` sums
    the tokens' distributions over experts (with gradient), over `tokens_B`. In all: the squared
    logsumexp of the logits (with gradient), the distribution's `entropy` in nats; `load_E` counts
    the rows experts were given, `dropped` the tokens that lost an expert to its capacity.
    """

    picks_BE: Tensor
    probabilities_BE: Tensor
    tokens_B: Tensor
    squared_logsumexp: Tensor
    entropy: Tensor
    load_E: Tensor
    dropped: Tensor


def router_sums(layer: RouterStatistics) -> RouterSums:
    """Sums of one layer; the distribution is the softmax, or sigmoids over their sum (arXiv
    2412.19437, eq. 18).
    """
    logits_TE, experts = layer.logits_TE, layer.logits_TE.size(-1)
    padding_T1 = (layer.chosen_TA < 0).all(-1, keepdim=True)
    scores_TE = scores(logits_TE, layer.routing)
    if layer.routing != "softmax":
        scores_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    probabilities_TE = scores_TE.masked_fill(padding_T1, 0.0)

    def by_row(x_T: Tensor) -> Tensor:
        return x_T.unflatten(0, (layer.rows, -1)).sum(1)

    return RouterSums(
        picks_BE=by_row(picked(layer.chosen_TA, experts)).float(),
        probabilities_BE=by_row(probabilities_TE),
        tokens_B=by_row(~padding_T1[:, 0]).float(),
        squared_logsumexp=logits_TE.logsumexp(-1).square().masked_fill(padding_T1[:, 0], 0.0).sum(),
        entropy=torch.special.entr(probabilities_TE.detach()).sum(),
        load_E=picked(layer.ids_TA, experts).sum(0).float(),
        dropped=((layer.ids_TA < 0).sum(-1) > (layer.chosen_TA < 0).sum(-1)).sum().float(),
    )


class RouterLosses(NamedTuple):
    """Means over the `tokens` of one micro-batch; `weighted` is what training adds, coefficients
    included.

    A step adds the `weighted` of each micro-batch times its `tokens` over those of all its
    micro-batches and ranks. With scope `sequence` the sum is then the same number however the rows
    were split.
    """

    aux: Tensor | None
    z: Tensor
    weighted: Tensor
    tokens: Tensor


def router_losses(router: Sequence[RouterStatistics], moe: MoeArgs) -> RouterLosses:
    """The auxiliary loss `moe` names, and the z-loss: the mean squared logsumexp (ST-MoE, arXiv
    2202.08906).
    """
    sums = [router_sums(layer) for layer in router]
    tokens = sums[0].tokens_B.sum()
    z = torch.stack([layer.squared_logsumexp for layer in sums]).mean() / tokens.clamp(min=1)
    weighted = moe.z_loss_coef * z
    if moe.balance in ("bias", "none"):
        return RouterLosses(None, z, weighted, tokens)
    aux = auxiliary_loss(sums, moe)
    return RouterLosses(aux, z, weighted + moe.aux_loss_coef * aux, tokens)


def router_parts(
    router: Sequence[RouterStatistics], moe: MoeArgs, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(what training adds, the parts to show) of one micro-batch, by its share of the `tokens` of
    the step.
    """
    losses = router_losses(router, moe)
    share = losses.tokens / tokens
    parts = {"z_loss": losses.z * share}
    if losses.aux is not None:
        parts["aux_loss"] = losses.aux * share
    return losses.weighted * share, parts


def auxiliary_loss(sums: Sequence[RouterSums], moe: MoeArgs) -> Tensor:
    """E * sum_e f_e P_e: f_e the picks of expert e per token, P_e its mean probability, over one
    pool of tokens.

    A pool is one row in one layer with scope `sequence`; with `batch` all tokens, of one layer for
    Switch (arXiv 2101.03961) and of all layers for Mixtral (hf models/mixtral). Pools are averaged
    by their tokens. Evenly used experts give top_k, and 1 with Switch, whose f_e is the share of
    all picks.
    """
    picks_LBE = torch.stack([layer.picks_BE for layer in sums])
    probabilities_LBE = torch.stack([layer.probabilities_BE for layer in sums])
    tokens_LB1 = torch.stack([layer.tokens_B for layer in sums]).unsqueeze(-1)
    pooled: tuple[int, ...] = (
        () if moe.balance_scope == "sequence" else (1,) if moe.balance == "switch" else (0, 1)
    )
    if pooled:
        picks_LBE, probabilities_LBE, tokens_LB1 = (
            x.sum(pooled, keepdim=True) for x in (picks_LBE, probabilities_LBE, tokens_LB1)
        )
    count_LB1 = tokens_LB1.clamp(min=1)
    loss_LB = picks_LBE.size(-1) * ((picks_LBE / count_LB1) * (probabilities_LBE / count_LB1)).sum(
        -1
    )
    loss = (loss_LB * tokens_LB1[..., 0]).sum() / tokens_LB1.sum().clamp(min=1)
    return loss / moe.top_k if moe.balance == "switch" else loss


@torch.no_grad()
def update_choice_biases(model: LLM, picks_LE: Tensor, rate: float) -> None:
    """After a step: b += rate * sign(mean picks - picks), from the picks [L, E] of all its
    micro-batches and ranks.

    Auxiliary-loss-free balancing (arXiv 2408.15664, DeepSeek-V3 2412.19437): an expert chosen too
    often is chosen less, and no gradient of the task is disturbed.
    """
    for module, picks_E in zip(mixtures(model), picks_LE.float(), strict=True):
        assert module.router.choice_bias is not None, "balance = 'bias' gives every router one"
        bias_E = module.router.choice_bias
        bias_E.add_(torch.sign(picks_E.mean() - picks_E).to(bias_E), alpha=rate)


def mixtures(model: LLM) -> list[MoE]:
    """The model's mixtures of experts from bottom to top: the layers L of statistics and counts."""
    blocks = (block for block in model.layers if isinstance(block, TransformerBlock))
    return [block.feed_forward for block in blocks if isinstance(block.feed_forward, MoE)]


@dataclass(frozen=True)
class RouterCounts:
    """Counts of all routers that may be summed over micro-batches and ranks, in one tensor [L, 2 E
    + 3].

    Per layer: what the router chose by expert, what each expert was given, and over how many
    tokens, their summed entropy in nats, and how many of them lost an expert to its capacity.
    """

    values_LC: Tensor

    @classmethod
    def of(cls, router: Iterable[RouterStatistics]) -> RouterCounts:
        """The counts of one forward."""
        rows = []
        for layer in map(router_sums, router):
            scalars = torch.stack((layer.tokens_B.sum(), layer.entropy.float(), layer.dropped))
            rows.append(torch.cat((layer.picks_BE.sum(0), layer.load_E, scalars)))
        return cls(torch.stack(rows).detach())

    def __add__(self, other: RouterCounts) -> RouterCounts:
        return RouterCounts(self.values_LC + other.values_LC)

    @property
    def picks_LE(self) -> Tensor:
        """How often each router chose each expert: what balancing goes by."""
        return self.values_LC[:, : self._experts]

    @property
    def load_LE(self) -> Tensor:
        """Rows that each expert computed."""
        return self.values_LC[:, self._experts : 2 * self._experts]

    @property
    def _experts(self) -> int:
        return (self.values_LC.size(1) - 3) // 2


def health_row(counts: RouterCounts) -> dict[str, Any]:
    """The state of the routers after a step, for a row of metrics.jsonl; every list has one entry
    per MoE layer.

    `expert_load` is each expert's share of the rows computed, `router_entropy` the mean over tokens
    in nats (ln E is undecided), `dead_experts` how many experts nobody chose, `dropped_tokens` the
    share of tokens that lost one.
    """
    values = counts.values_LC.double().cpu()
    counted = RouterCounts(values)
    tokens_L, entropy_L, dropped_L = values[:, -3:].unbind(1)
    load_LE, tokens_L = counted.load_LE, tokens_L.clamp(min=1)
    return {
        "expert_load": (load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)).tolist(),
        "router_entropy": (entropy_L / tokens_L).tolist(),
        "dead_experts": (counted.picks_LE == 0).sum(1).tolist(),
        "dropped_tokens": (dropped_L / tokens_L).tolist(),
    }

"""Balancing of experts: auxiliary losses, choice biases, and the state of routers in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transom.config.layer_args import MoeArgs
from transom.layers.block import TransformerBlock
from transom.layers.moe import MoE, RouterStatistics, picked, scores
from transom.models.llm import LLM


class RouterSums(NamedTuple):
    """Sums of one layer over the tokens of a call that are not padding.

    Attributes:
        picks_BE: How often the router chose each expert in each row, before any capacity.
        probabilities_BE: Sum of the tokens' distributions over experts, with gradient.
        tokens_B: Tokens of each row.
        squared_logsumexp: Sum of the squared logsumexp of the logits, with gradient.
        entropy: Sum of the entropies of the distributions, in nats.
        load_E: Rows that each expert computes.
        dropped: Tokens that lost an expert to its capacity.
    """

    picks_BE: Tensor
    probabilities_BE: Tensor
    tokens_B: Tensor
    squared_logsumexp: Tensor
    entropy: Tensor
    load_E: Tensor
    dropped: Tensor


def router_sums(layer: RouterStatistics) -> RouterSums:
    """Return the sums of one layer.

    The distribution of a token is the softmax of its logits, or sigmoids divided by their sum
    (arXiv 2412.19437, eq. 18).
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
    """Losses of one micro-batch, as means over its `tokens`.

    `weighted` is what training adds, with its coefficients. A step adds the `weighted` of each
    micro-batch times its share of the tokens of the step. With scope `sequence`, the sum does not
    depend on how the rows were divided. `sums` are those of each layer on this rank.
    """

    aux: Tensor | None
    z: Tensor
    weighted: Tensor
    tokens: Tensor
    sums: Sequence[RouterSums]


def router_losses(
    router: Sequence[RouterStatistics], moe: MoeArgs, add: Callable[[Tensor], Tensor] | None = None
) -> RouterLosses:
    """Return the auxiliary loss of `moe` and the z-loss, see `RouterLosses`.

    The z-loss is the mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906).

    Args:
        router: The statistics of each layer.
        moe: The settings of the experts.
        add: Sums a tensor over the ranks that have tokens of the same rows. `weighted` and `tokens`
            then add up over these ranks, too.
    """
    own = sums = [router_sums(layer) for layer in router]
    if add is not None:
        sums = [one._replace(picks_BE=add(one.picks_BE), tokens_B=add(one.tokens_B)) for one in own]
    tokens = sums[0].tokens_B.sum()
    z = torch.stack([layer.squared_logsumexp for layer in sums]).mean() / tokens.clamp(min=1)
    weighted = moe.z_loss_coef * z
    if moe.balance in ("bias", "none"):
        return RouterLosses(None, z, weighted, tokens, own)
    aux = auxiliary_loss(sums, moe)
    return RouterLosses(aux, z, weighted + moe.aux_loss_coef * aux, tokens, own)


def router_parts(
    router: Sequence[RouterStatistics],
    moe: MoeArgs,
    tokens: Tensor,
    add: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one micro-batch that training adds, and tensors that sum up over a step.

    These are the parts of the loss by name, and the tensors of `RouterCounts`.

    Args:
        router: The statistics of each layer.
        moe: The settings of the experts.
        tokens: Tokens of the step over all micro-batches and ranks.
        add: Sums over the ranks that have tokens of the same rows, see `router_losses`.
    """
    losses = router_losses(router, moe, add)
    share = losses.tokens / tokens
    parts = {"z_loss": losses.z * share, **RouterCounts.of(losses.sums)._asdict()}
    if losses.aux is not None:
        parts["aux_loss"] = losses.aux * share
    return losses.weighted * share, parts


def auxiliary_loss(sums: Sequence[RouterSums], moe: MoeArgs) -> Tensor:
    """Return E * sum_e f_e P_e, averaged over pools of tokens, weighted by their sizes.

    In a pool, f_e is the number of picks of expert e per token, and P_e its mean probability. A
    pool is one row in one layer with scope `sequence`. With scope `batch` it has all tokens, of one
    layer for Switch (arXiv 2101.03961) and of all layers for Mixtral (transformers,
    models/mixtral). Evenly used experts give top_k; with Switch, whose f_e is the share of all
    picks, they give 1.
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
    """Update the choice biases after a step: b += rate * sign(mean picks - picks).

    An expert that was chosen too often is chosen less, and no gradient is disturbed (arXiv
    2408.15664; DeepSeek-V3, arXiv 2412.19437).

    Args:
        model: The model.
        picks_LE: Picks of each expert in each layer, over all micro-batches and ranks.
        rate: The size of the update.
    """
    for module, picks_E in zip(mixtures(model), picks_LE.float(), strict=True):
        assert module.router.choice_bias is not None, "balance = 'bias' gives every router one"
        bias_E = module.router.choice_bias
        bias_E.add_(torch.sign(picks_E.mean() - picks_E).to(bias_E), alpha=rate)


def mixtures(model: LLM) -> list[MoE]:
    """Return the model's mixtures of experts from bottom to top: the layers L of all counts."""
    blocks = (block for block in model.layers if isinstance(block, TransformerBlock))
    return [block.feed_forward for block in blocks if isinstance(block.feed_forward, MoE)]


class RouterCounts(NamedTuple):
    """Counts of all routers, which add up over micro-batches and ranks.

    Attributes:
        picks_LE: How often each router chose each expert.
        load_LE: Rows that each expert computed.
        tokens_L: Tokens that are not padding.
        entropy_L: Sum of the entropies of their distributions, in nats.
        dropped_L: Tokens that lost an expert to its capacity.
    """

    picks_LE: Tensor
    load_LE: Tensor
    tokens_L: Tensor
    entropy_L: Tensor
    dropped_L: Tensor

    @classmethod
    def of(cls, sums: Iterable[RouterSums]) -> RouterCounts:
        """Return the counts of one forward pass from the sums of each layer."""
        layers = [
            (one.picks_BE.sum(0), one.load_E, one.tokens_B.sum(), one.entropy, one.dropped)
            for one in sums
        ]
        return cls(*(torch.stack(column).detach() for column in zip(*layers, strict=True)))


def health_row(counts: RouterCounts) -> dict[str, Any]:
    """Return the state of the routers after a step, for a row of metrics.jsonl.

    Every list has one entry per MoE layer: `expert_load`, each expert's share of the computed rows;
    `router_entropy`, the mean over tokens in nats (ln E is undecided); `dead_experts`, the number
    of experts that were not chosen; `dropped_tokens`, the share of tokens that lost an expert.
    """
    picks_LE, load_LE, tokens_L, entropy_L, dropped_L = (x.double().cpu() for x in counts)
    tokens_L = tokens_L.clamp(min=1)
    return {
        "expert_load": (load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)).tolist(),
        "router_entropy": (entropy_L / tokens_L).tolist(),
        "dead_experts": (picks_LE == 0).sum(1).tolist(),
        "dropped_tokens": (dropped_L / tokens_L).tolist(),
    }

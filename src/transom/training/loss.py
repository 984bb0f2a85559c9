"""What training minimises: summed cross-entropy, and the balancing loss of mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.data.batches import NO_TARGET
from transom.layers.moe import RouterStatistics


def cross_entropy_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of -log p(target) in float32 over positions that have a target (not -100), in nats.

    A sum, not a mean: the caller divides by the count of targets of the whole global step, so the loss does
    not depend on how the step was cut into micro-batches and ranks.
    """
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=NO_TARGET, reduction="sum"
    )


def balancing_loss(router: Sequence[RouterStatistics]) -> Tensor:
    """E * sum_e f_e P_e over the tokens of all layers pooled, as Mixtral has it; perfect balance gives top_k.

    f_e is the share of tokens that chose expert e, P_e its mean probability (hf models/mixtral).
    """
    picks_E = torch.stack([layer.picks_E for layer in router]).sum(0)
    probabilities_E = torch.stack([layer.probabilities_E for layer in router]).sum(0)
    tokens = torch.stack([layer.tokens for layer in router]).sum().clamp(min=1)
    return picks_E.numel() * ((picks_E / tokens) * (probabilities_E / tokens)).sum()


def expert_load(router: Sequence[RouterStatistics]) -> Tensor:
    """Share of all picks that each expert got, [layers, E]."""
    picks_LE = torch.stack([layer.picks_E for layer in router])
    return picks_LE / picks_LE.sum(1, keepdim=True).clamp(min=1)

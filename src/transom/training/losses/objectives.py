"""Objectives: the loss of each kind of training, and the score of its held-out items.

The loss of a micro-batch is its sum divided by the units of the whole step, so that no loss depends
on how the step was divided into micro-batches and ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transom.base.runtime import evaluating
from transom.config.layer_args import HeadArgs
from transom.data.batch import NO_TARGET, Batch
from transom.data.labelled import EncodedText
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerOutput
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import head_loss
from transom.training.losses.heads import head_loss_sum, score_head


class Objective(ABC):
    """What a run minimises. The trainer calls it without knowing which one it is.

    Attributes:
        generates: Whether `evaluate` calls the model with tokens that it has generated.
    """

    generates = False

    def prepare(self, batch: Any) -> Batch:
        """Return the batch to learn from, once per step.

        An objective whose answers are generated returns the batch with them.
        """
        return batch

    def units(self, batch: Batch) -> Tensor:
        """Return this rank's share of what the loss of a step is divided by, as a scalar.

        The default is the number of targets, or the sum of their weights.
        """
        if batch.weights is not None:
            return batch.weights.sum()
        return (batch.targets != NO_TARGET).sum()

    @abstractmethod
    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """Return the parts of the loss of one micro-batch by name, as scalars.

        Args:
            output: The output of the model for the micro-batch.
            micro: The micro-batch.
            units: The units of the step over all micro-batches and ranks. Every part is a sum
                divided by it, so that parts add up to those of the step.

        Returns:
            `loss`, which is differentiated, and other numbers that are logged.
        """

    @abstractmethod
    def evaluate(self, items: Sequence[Any]) -> Score:
        """Return the score of held-out items, see `RunData.held_out`; zeros if there are none."""


@dataclass
class NextToken(Objective):
    """Cross-entropy of the next token in nats, over the tokens that have a target.

    Args:
        model: The model.
        chunk: Tokens whose logits are computed at a time, see `head_loss`.
    """

    model: LLM
    chunk: int | None = None

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """Return the weighted sum over targets, divided by `units`."""
        total = head_loss(self.model, output.hidden_BTD, micro.targets, self.chunk, micro.weights)
        return {"loss": total / units}

    @torch.no_grad()
    def evaluate(self, items: Sequence[Batch]) -> Score:
        """Return the cross-entropy per target of held-out batches."""
        nats = weight = 0.0
        for batch in items:
            here = batch.to(self.model.device)
            with evaluating(self.model):
                hidden_BTD = self.model(replace(here.inputs(), logits="none")).hidden_BTD
            nats += float(head_loss(self.model, hidden_BTD, here.targets, self.chunk, here.weights))
            weight += float(self.units(here))
        return Score(nats, weight)


@dataclass
class HeadObjective(Objective):
    """Labels or embeddings of rows, for a model with a head.

    Args:
        model: The model.
        head: Its head.
        temperature: What similarities of embeddings are divided by.
    """

    model: LLM
    head: HeadArgs
    temperature: float

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """Return `head_loss_sum`, divided by `units`."""
        return {"loss": head_loss_sum(self.head, output, micro.targets, self.temperature) / units}

    def evaluate(self, items: Sequence[EncodedText]) -> Score:
        """Return the loss and accuracy of held-out rows."""
        return score_head(self.model, items, self.temperature)

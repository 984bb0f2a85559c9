"""What a step lowers: one objective per kind of learning, which the trainer calls without knowing
which it is.

A micro-batch's share of the loss is its sum divided by the units of the whole global step, so that
no loss depends on how the step was cut into micro-batches and ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from transom.base.runtime import evaluating
from transom.config.layer_args import HeadArgs
from transom.data.batch import NO_TARGET, Batch
from transom.data.labelled import EncodedText
from transom.layers.inputs import TransformerOutput
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import head_loss
from transom.training.losses.heads import HeadScore, head_loss_sum, score_head


class Measured(Protocol):
    """A held-out score; `loss` tells which step is the best, `key` what its rows of metrics are
    called.
    """

    key: str

    @property
    def loss(self) -> float:
        """Lower is better."""

    def __str__(self) -> str:
        """What the progress line says."""


class Objective(ABC):
    """The base of all: what most of them share."""

    held_out: Sequence[Any] = ()  # what `measure` scores

    def prepare(self, batch: Any) -> Batch:
        """Return the batch of a step. GRPO samples answers to its questions here."""
        prepared: Batch = batch
        return prepared

    def units(self, batch: Batch) -> Tensor:
        """What the loss of a step is divided by, this rank's share: the weights of its targets."""
        if batch.weights is not None:
            return batch.weights.sum()
        return (batch.targets != NO_TARGET).sum()

    @abstractmethod
    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """This micro-batch's share of the `loss`, which is differentiated, and of whatever else is
        shown.
        """

    def measure(self) -> Measured | None:
        """The held-out score, or None where nothing is held out in this objective's own form."""
        return None


@dataclass(frozen=True)
class AnswerScore:
    """Mean loss in nats over `tokens` held-out tokens that carry loss, and what its exponential is
    called.
    """

    loss: float
    perplexity: float
    tokens: int

    key = "answers"

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.3f}, perplexity {self.perplexity:.2f} over {self.tokens:,} tokens "
            f"of answers"
        )


@dataclass
class NextToken(Objective):
    """Cross-entropy of the next token in nats, over the targets that count."""

    model: LLM
    chunk: int | None = None
    held_out: Sequence[Batch] = ()

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """The sum over targets, divided."""
        total = head_loss(self.model, output.hidden_BTD, micro.targets, self.chunk, micro.weights)
        return {"loss": total / units}

    @torch.no_grad()
    def measure(self) -> AnswerScore | None:
        """Mean over the targets of held-out batches, where these are given as batches."""
        if not self.held_out:
            return None
        device = self.model.device
        nats = weight = 0.0
        for batch in self.held_out:
            here = batch.to(device)
            with evaluating(self.model):
                hidden_BTD = self.model(replace(here.inputs(), logits="none")).hidden_BTD
            nats += float(head_loss(self.model, hidden_BTD, here.targets, self.chunk, here.weights))
            weight += float(self.units(here))
        return AnswerScore(nats / weight, math.exp(min(nats / weight, 700.0)), round(weight))


@dataclass
class HeadObjective(Objective):
    """Labels or embeddings of whole rows, scored on held-out lines."""

    model: LLM
    head: HeadArgs
    temperature: float
    held_out: Sequence[EncodedText] = ()

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """As `heads.head_loss_sum`, divided."""
        return {"loss": head_loss_sum(self.head, output, micro.targets, self.temperature) / units}

    def measure(self) -> HeadScore | None:
        """Loss and accuracy of the held-out lines."""
        return score_head(self.model, self.held_out, self.temperature) if self.held_out else None

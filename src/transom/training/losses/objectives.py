"""What a step lowers: one objective per kind of learning, which the trainer calls without knowing
which it is.

A micro-batch's share of the loss is its sum divided by the units of the whole global step, so that
no loss depends on how the step was cut into micro-batches and ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from transom.base.runtime import evaluating
from transom.config.model_args import HeadArgs
from transom.data.batches import NO_TARGET
from transom.data.labelled import EncodedRow
from transom.models.llm import LLM, TransformerInput, TransformerOutput
from transom.training.losses.cross_entropy import head_loss
from transom.training.losses.heads import HeadScore, head_loss_sum, score_head


class RunBatch(Protocol):
    """What a trainer takes rows in: packed text, labelled rows, conversations, pairs of answers."""

    @property
    def tokens(self) -> Tensor:
        """Ids [B, T]."""

    @property
    def targets(self) -> Tensor:
        """What is to be predicted, NO_TARGET where nothing is."""

    @property
    def weights(self) -> Tensor | None:
        """Weight of each target; None where all count alike."""

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding."""

    @property
    def row_length(self) -> int:
        """Tokens of the longest row."""

    def inputs(self) -> TransformerInput:
        """What the model is called with."""

    def to(self, device: torch.device) -> Any:
        """The same batch on another device."""

    def micro_batches(self, count: int) -> Iterator[Any]:
        """The rows in `count` groups."""


class RunBatches(Protocol):
    """An endless run of batches, whose state is a place in it."""

    @property
    def state(self) -> dict[str, int]:
        """The place."""

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from a place."""

    def next(self) -> Any:
        """This rank's rows of the next global batch."""

    def largest(self, micro_batches: int) -> Any:
        """Return the largest of this rank's micro-batches, `micro_batches` of which make a step.

        The place stays where it is.
        """


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

    def prepare(self, batch: Any) -> Any:
        """The batch that is learnt from, once per step; the same one unless answers have to be made
        first.
        """
        return batch

    def units(self, batch: Any) -> Tensor:
        """What the loss of a step is divided by, this rank's share: the weights of its targets."""
        if batch.weights is not None:
            return batch.weights.sum()
        return (batch.targets != NO_TARGET).sum()

    @abstractmethod
    def loss(self, output: TransformerOutput, micro: Any, units: Tensor) -> dict[str, Tensor]:
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
    held_out: Sequence[RunBatch] = ()

    def loss(self, output: TransformerOutput, micro: Any, units: Tensor) -> dict[str, Tensor]:
        """The sum over targets, divided."""
        total = head_loss(self.model, output.hidden_BTD, micro.targets, self.chunk, micro.weights)
        return {"loss": total / units}

    @torch.no_grad()
    def measure(self) -> AnswerScore | None:
        """Mean over the targets of held-out batches, where these are given as batches."""
        if not self.held_out:
            return None
        device = self.model.tok_embeddings.weight.device
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
    held_out: Sequence[EncodedRow] = ()

    def loss(self, output: TransformerOutput, micro: Any, units: Tensor) -> dict[str, Tensor]:
        """As `heads.head_loss_sum`, divided."""
        return {"loss": head_loss_sum(self.head, output, micro.targets, self.temperature) / units}

    def measure(self) -> HeadScore | None:
        """Loss and accuracy of the held-out lines."""
        return score_head(self.model, self.held_out, self.temperature) if self.held_out else None

"""`Score`: a held-out score as sums, which add up over sources, batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """Sums over scored items. Scores of different items add up to the score of all of them.

    Attributes:
        loss_sum: Loss of all items, in nats unless the objective says otherwise.
        count: Number of items, or the sum of their weights.
        bytes: UTF-8 bytes of the scored text; 0 where the items are not plain text.
        unit: What is counted, such as `tokens` or `pairs`.
        sums: Other numbers by name, such as `accuracy`, each summed over all items.
    """

    loss_sum: float = 0.0
    count: float = 0
    bytes: int = 0
    unit: str = "tokens"
    sums: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Score) -> Score:
        if not self.count:
            return other
        return Score(
            self.loss_sum + other.loss_sum,
            self.count + other.count,
            self.bytes + other.bytes,
            self.unit,
            {name: total + other.sums.get(name, 0.0) for name, total in self.sums.items()},
        )

    @property
    def loss(self) -> float:
        """Loss per item; NaN without items."""
        return self.loss_sum / self.count if self.count else math.nan

    def mean(self, name: str) -> float:
        """Return the sum called `name` per item."""
        return self.sums[name] / self.count

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text, which does not depend on the tokenizer; NaN without text."""
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Perplexity per token; NaN without tokens."""
        return math.exp(min(self.loss, 700.0)) if self.count else math.nan

    @property
    def value(self) -> float:
        """The number by which the steps of a run are compared; lower is better."""
        return self.bits_per_byte if self.bytes else self.loss

    def row(self) -> dict[str, float]:
        """Return the means by name, and the number of items, for a row of metrics.jsonl."""
        out = {"bits_per_byte": self.bits_per_byte} if self.bytes else {"loss": self.loss}
        if self.unit == "tokens":
            out["perplexity"] = self.perplexity
        out |= {name: self.mean(name) for name in self.sums}
        out[self.unit] = round(self.count)
        return out | ({"bytes": self.bytes} if self.bytes else {})

    @property
    def summary(self) -> str:
        """The means in words, such as `loss 0.693, accuracy 0.500`."""
        if self.bytes:
            return f"{self.bits_per_byte:.3f} bits per byte, perplexity {self.perplexity:.1f}"
        means = {name: value for name, value in self.row().items() if name != self.unit}
        return ", ".join(f"{name} {value:.3f}" for name, value in means.items())

    def __str__(self) -> str:
        """The summary and the number of items."""
        return f"{self.summary} over {round(self.count):,} {self.unit}"

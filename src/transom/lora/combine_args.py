"""How several adapters become one change of the weights. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transom.base.errors import require
from transom.base.fields import check_seed, describe

Method = Literal["linear", "ties", "dare"]
METHODS: tuple[Method, ...] = ("linear", "ties", "dare")


@dataclass(frozen=True)
class CombineArgs:
    """`linear` adds up, TIES keeps what agrees in sign (arXiv 2306.01708), DARE drops at random
    (2311.03099).
    """

    method: Method = describe("linear", "linear, ties or dare")
    weights: tuple[float, ...] = describe((), "one factor per adapter; 1 each when empty")
    density: float = describe(0.5, "ties, dare: share of each adapter's numbers that is kept")
    seed: int = describe(0, "dare: of the draws")

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", self.method, f"expected {', '.join(METHODS)}")
        require(
            all(map(math.isfinite, self.weights)),
            "weights",
            self.weights,
            "expected finite numbers",
        )
        require(0 < self.density <= 1, "density", self.density, "expected above 0 to 1")
        check_seed(self.seed)

    def weights_of(self, count: int) -> tuple[float, ...]:
        """A weight for each of `count` adapters."""
        fits = len(self.weights) in (0, count)
        require(
            fits, "weights", self.weights, f"expected one for each of {count} adapters, or none"
        )
        return self.weights or (1.0,) * count

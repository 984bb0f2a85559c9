"""The arguments of new LoRA adapters, and of how several adapters are combined. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transom.base import fields
from transom.base.errors import expect
from transom.base.fields import SEED, check_bounds, describe

# The factor on B(A x): alpha / rank (PEFT), alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv
# 2312.03732), or alpha itself (mistral-finetune).
Scaling = Literal["alpha_over_rank", "rslora", "direct"]
ROLES = ("attention", "ffn", "experts", "shared_experts", "all-linear")
Method = Literal["linear", "ties", "dare"]
METHODS: tuple[Method, ...] = get_args(Method)


def scale_of(scaling: Scaling, alpha: float, rank: int) -> float:
    """Return the factor on B(A x)."""
    if scaling == "direct":
        return alpha
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


@dataclass(frozen=True)
class LoraArgs:
    """A low-rank adapter: y = W x + scale * B(A(dropout(x))) on every leaf of `targets`.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    rank: int = describe(16, "rows of A and columns of B", at_least=1)
    alpha: float = describe(32.0, "numerator of the scale; the scale itself with scaling direct")
    scaling: Scaling = describe(
        "alpha_over_rank", "scale: alpha / rank, alpha / sqrt(rank) (rslora) or alpha (direct)"
    )
    dropout: float = describe(
        0.0, "share of the inputs of A that is dropped in training", at_least=0, below=1
    )
    targets: tuple[str, ...] = describe(
        ("all-linear",),
        f"roles ({', '.join(ROLES)}), or regular expressions for the ends of weight names",
    )
    dora: bool = describe(
        False, "DoRA: learn the length of every row apart from its direction (arXiv 2402.09353)"
    )
    modules_to_save: tuple[str, ...] = describe(
        (), "modules that train all their weights, by the ends of their names"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        # With alpha = 0, neither A nor B would get a gradient.
        useful = math.isfinite(self.alpha) and self.alpha != 0
        expect(useful, "alpha", self.alpha, "a finite number other than 0")
        expect(
            bool(self.targets),
            "targets",
            self.targets,
            f"one or more, such as {ROLES[-1]}",
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraArgs:
        """Return the arguments that a mapping of fields describes. Raise `RequestError` for an
        unknown key or a wrong type.
        """
        return fields.read(cls, data)


@dataclass(frozen=True)
class CombineArgs:
    """How the changes of several adapters become one change of a weight."""

    method: Method = describe(
        "linear",
        "linear: weighted sum; ties: drop what disagrees in sign (arXiv 2306.01708); "
        "dare: drop at random (2311.03099)",
    )
    weights: tuple[float, ...] = describe((), "one factor per adapter; empty means 1 each")
    density: float = describe(
        0.5, "ties, dare: share of each adapter's numbers that is kept", above=0, at_most=1
    )
    seed: int = describe(0, "dare: seed of the random choice", **SEED)

    def __post_init__(self) -> None:
        check_bounds(self)
        expect(self.method in METHODS, "method", self.method, ", ".join(METHODS))
        expect(
            all(map(math.isfinite, self.weights)),
            "weights",
            self.weights,
            "finite numbers",
        )

    def weights_of(self, count: int) -> tuple[float, ...]:
        """Return a weight for each of `count` adapters. Raise `RequestError` for another number
        of weights.
        """
        expected = f"one for each of {count} adapters, or none"
        expect(len(self.weights) in (0, count), "weights", self.weights, expected)
        return self.weights or (1.0,) * count

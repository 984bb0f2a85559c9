"""What a new LoRA adapter is made of. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transom.base import fields
from transom.base.errors import require
from transom.base.fields import describe

# What B(A x) is multiplied by: alpha / rank (PEFT), alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023,
# arXiv 2312.03732), or alpha itself (mistral-finetune).
Scaling = Literal["alpha_over_rank", "rslora", "direct"]
ROLES = ("attention", "ffn", "experts", "shared_experts", "all-linear")


def scale_of(scaling: Scaling, alpha: float, rank: int) -> float:
    """The factor in front of B(A x)."""
    if scaling == "direct":
        return alpha
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


@dataclass(frozen=True)
class LoraArgs:
    """y = W x + scale * B(A(dropout(x))) on every leaf that `targets` names (Hu et al. 2021, arXiv
    2106.09685).
    """

    rank: int = describe(16, "rows of A and columns of B")
    alpha: float = describe(32.0, "numerator of the scale; the scale itself with scaling direct")
    scaling: Scaling = describe(
        "alpha_over_rank", "the scale: alpha / rank, alpha / sqrt(rank), or alpha"
    )
    dropout: float = describe(0.0, "share of the inputs of A that is dropped in training")
    targets: tuple[str, ...] = describe(
        ("all-linear",),
        f"roles ({', '.join(ROLES)}) or regular expressions for the ends of our weight names",
    )
    dora: bool = describe(
        False, "learn the length of every row apart from its direction (arXiv 2402.09353)"
    )
    modules_to_save: tuple[str, ...] = describe(
        (), "modules that are trained whole, by the ends of their names"
    )

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "expected 1 or more")
        useful = (
            math.isfinite(self.alpha) and self.alpha != 0
        )  # times 0, neither A nor B would ever get a gradient
        require(useful, "alpha", self.alpha, "expected a finite number other than 0")
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "expected from 0 to below 1")
        require(
            bool(self.targets),
            "targets",
            self.targets,
            f"expected one or more, such as {ROLES[-1]}",
        )

    @property
    def scale(self) -> float:
        """The factor in front of B(A x)."""
        return scale_of(self.scaling, self.alpha, self.rank)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraArgs:
        """Plain data, strictly read."""
        return fields.read(cls, data)

"""How the frozen weights of a model are held in four bits. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transom.base import fields
from transom.base.errors import require
from transom.base.fields import describe

Kind = Literal["nf4", "int4"]
GROUPS = (32, 64, 128)
SCALE_BLOCK = 256  # scales that share one scale of their own, with double_quant


@dataclass(frozen=True)
class QuantizeArgs:
    """Two weights per byte and a scale per group of inputs; nf4 is the format of QLoRA (arXiv
    2305.14314).
    """

    kind: Kind = describe(
        "nf4", "values of the 16 codes: quantiles of the normal distribution, or whole numbers"
    )
    group: int = describe(64, "neighbours along the inputs that share a scale", "weights")
    double_quant: bool = describe(False, "nf4: hold the scales in 8 bits, as the paper does")
    zero_points: bool = describe(
        False, "int4: give every group a zero, for weights that lie to one side"
    )
    skip: tuple[str, ...] = describe(
        ("output", "vision"),
        "modules that stay dense, by whole parts of their names; routers and embeddings always do",
    )

    def __post_init__(self) -> None:
        require(
            self.group in GROUPS, "group", self.group, f"expected {', '.join(map(str, GROUPS))}"
        )
        fits = self.kind == "nf4" or not self.double_quant
        require(fits, "double_quant", self.double_quant, "valid only with kind nf4 only")
        fits = self.kind == "int4" or not self.zero_points
        require(
            fits,
            "zero_points",
            self.zero_points,
            "valid only with kind int4 only, since nf4 has its zero",
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeArgs:
        """Plain data, strictly read."""
        return fields.read(cls, data)

    def bits_per_weight(self, scale_bits: int = 32) -> float:
        """Bits of code, scale and zero; `scale_bits` are those of the weights' dtype before, which
        scales keep.
        """
        if self.double_quant:
            return 4 + (8 + scale_bits / SCALE_BLOCK) / self.group
        return 4 + (scale_bits + 8 * self.zero_points) / self.group

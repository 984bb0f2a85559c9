"""How frozen weights are stored in four bits. This module does not import torch."""

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
    """Two weights per byte, and a scale per group of inputs.

    nf4 is the format of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        RequestError: A value does not fit the others.
    """

    kind: Kind = describe(
        "nf4", "values of the 16 codes: quantiles of the normal distribution, or integers"
    )
    group: int = describe(64, "neighbouring inputs that share a scale", "weights")
    double_quant: bool = describe(False, "nf4: store the scales in 8 bits, as the paper does")
    zero_points: bool = describe(
        False, "int4: give every group a zero point, for weights that are not symmetric"
    )
    skip: tuple[str, ...] = describe(
        ("output", "vision"),
        "modules that stay dense, by parts of their names; routers and embeddings always do",
    )

    def __post_init__(self) -> None:
        groups = ", ".join(map(str, GROUPS))
        require(self.group in GROUPS, "group", self.group, f"expected one of {groups}")
        fits = self.kind == "nf4" or not self.double_quant
        require(fits, "double_quant", self.double_quant, "expected kind nf4 with it")
        fits = self.kind == "int4" or not self.zero_points
        require(fits, "zero_points", self.zero_points, "expected kind int4 with it")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeArgs:
        """Return the arguments that plain data describes.

        Raises:
            RequestError: The data has an unknown key or a wrong type.
        """
        return fields.read(cls, data)

    def bits_per_weight(self, scale_bits: int = 32) -> float:
        """Return the bits of code, scale and zero per weight.

        `scale_bits` are the bits of a scale, which has the dtype that the weight had.
        """
        if self.double_quant:
            return 4 + (8 + scale_bits / SCALE_BLOCK) / self.group
        return 4 + (scale_bits + 8 * self.zero_points) / self.group

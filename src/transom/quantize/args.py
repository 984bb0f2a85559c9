"""How frozen weights are stored in few bits. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transom.base import fields
from transom.base.errors import require
from transom.base.fields import describe

Kind = Literal["nf4", "int4", "int8"]
GROUPS = (0, 32, 64, 128)


@dataclass(frozen=True)
class QuantizeArgs:
    """Four or eight bits per weight, and a scale per group of inputs.

    nf4 is the format of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        RequestError: A value does not fit the others.
    """

    kind: Kind = describe(
        "nf4",
        "values of the codes: 16 quantiles of the normal distribution, or integers of 4 or 8 bits",
    )
    group: int = describe(
        64, "neighbouring inputs that share a scale; 0: all inputs of an output", "weights"
    )
    double_quant: bool = describe(False, "nf4: store the scales in 8 bits, as the paper does")
    zero_points: bool = describe(
        False, "integers: give every group a zero point, for weights that are not symmetric"
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
        fits = self.kind != "nf4" or not self.zero_points
        require(fits, "zero_points", self.zero_points, "expected kind int4 or int8 with it")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeArgs:
        """Return the arguments that plain data describes.

        Raises:
            RequestError: The data has an unknown key or a wrong type.
        """
        return fields.read(cls, data)

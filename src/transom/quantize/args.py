"""How frozen weights are stored in few bits. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transom.base import fields
from transom.base.errors import expect
from transom.base.fields import check_bounds, describe

Kind = Literal["nf4", "fp4", "int4", "int8", "fp8"]
Method = Literal["rtn", "gptq", "awq"]
GROUPS = (0, 32, 64, 128)


@dataclass(frozen=True)
class QuantizeArgs:
    """Four or eight bits per weight, and a scale per group of inputs.

    nf4 and fp4 are formats of QLoRA (Dettmers et al. 2023, arXiv 2305.14314). The methods are
    round-to-nearest, GPTQ (Frantar et al. 2022, arXiv 2210.17323) and AWQ (Lin et al. 2023, arXiv
    2306.00978).

    Raises:
        RequestError: A value does not fit the others.
    """

    kind: Kind = describe(
        "nf4",
        "values of the codes: 16 quantiles of the normal distribution, floats of 4 bits, "
        "integers of 4 or 8 bits, or floats of 8 bits (e4m3)",
    )
    group: int = describe(
        64, "neighbouring inputs that share a scale; 0: all inputs of an output", "weights"
    )
    double_quant: bool = describe(False, "nf4: store the scales in 8 bits, as the paper does")
    zero_points: bool = describe(
        False, "integers: give every group a zero point, for weights that are not symmetric"
    )
    scales: Literal["weight", "float32", "float16", "bfloat16"] = describe(
        "weight", "dtype of the scales; weight: that of the weights"
    )
    skip: tuple[str, ...] = describe(
        ("output", "vision"),
        "modules that stay dense, by parts of their names; routers always do",
    )
    embeddings: bool = describe(
        False, "quantize token embeddings too, and with them an output that shares their weight"
    )
    method: Method = describe(
        "rtn",
        "rtn rounds to the nearest; gptq lets later inputs make up for the rounding of earlier "
        "ones; awq enlarges the weights of large inputs; gptq and awq read text",
    )
    fit_scales: bool = describe(
        False, "rtn: choose the scale of each group with the smallest squared error"
    )
    act_order: bool = describe(
        True, "gptq: round the weights of the largest inputs first; their groups stay neighbours"
    )
    damping: float = describe(
        0.01, "gptq: added to the squares of the inputs, relative to their mean", above=0, below=1
    )
    bits_budget: float | None = describe(
        None,
        "mean bits per quantized weight, scales included: the most sensitive leaves get smaller "
        "groups or 8 bits; reads text",
        "bits",
        above=0,
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        groups = ", ".join(map(str, GROUPS))
        expect(self.group in GROUPS, "group", self.group, f"one of {groups}")
        plain = self.method == "rtn" and not self.fit_scales
        fits = (self.kind == "nf4" and plain) or not self.double_quant
        expect(fits, "double_quant", self.double_quant, "kind nf4 and plain method rtn with it")
        fits = self.kind in ("int4", "int8") or not self.zero_points
        expect(fits, "zero_points", self.zero_points, "kind int4 or int8 with it")
        fits = self.method == "rtn" or not self.fit_scales
        expect(fits, "fit_scales", self.fit_scales, "method rtn with it; others do so")
        if self.bits_budget is not None:
            chosen = self.kind == "int4" and self.group == QuantizeArgs.group
            fits = chosen and self.method != "awq"
            expected = "kind int4, method rtn or gptq, and no group, which it chooses"
            expect(fits, "bits_budget", self.bits_budget, expected)

    @property
    def calibrated(self) -> bool:
        """Whether quantizing reads text."""
        return self.method != "rtn" or self.bits_budget is not None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeArgs:
        """Return the arguments that plain data describes.

        Raises:
            RequestError: The data has an unknown key or a wrong type.
        """
        return fields.read(cls, data)

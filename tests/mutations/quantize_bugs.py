"""Silent bugs in quantizing weights, and in reading and writing them. The registry is `bugs.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from tests.mutations.planting import Call, changed
from transom.checkpoints.quantized import folder
from transom.quantize import formats, methods
from transom.quantize.formats import Parts, WeightFormat


def shifted_groups() -> AbstractContextManager[None]:
    """The scale of a group is that of the inputs from one place before it on."""

    def make(original: Call) -> Call:
        def group_parts(groups: Tensor, *rest: Any) -> dict[str, Tensor]:
            moved = groups.flatten(-2).roll(1, -1).view_as(groups)
            parts: dict[str, Tensor] = original(moved, *rest)
            return parts

        return group_parts

    return changed(formats, "group_parts", make)


def scale_before() -> AbstractContextManager[None]:
    """A dense weight is computed with the scale of the group before."""

    def make(original: Call) -> Call:
        def scaled(values: Tensor, parts: Parts, *rest: Any) -> Tensor:
            made: Tensor = original(values, {**parts, "scales": parts["scales"].roll(1, -1)}, *rest)
            return made

        return scaled

    return changed(formats, "scaled", make)


def added_zeros() -> AbstractContextManager[None]:
    """Zero points are added instead of subtracted."""

    def make(original: Call) -> Call:
        def scaled(values: Tensor, parts: Parts, *rest: Any) -> Tensor:
            turned = {**parts, "zeros": -parts["zeros"]} if "zeros" in parts else parts
            made: Tensor = original(values, turned, *rest)
            return made

        return scaled

    return changed(formats, "scaled", make)


def stored_sign() -> AbstractContextManager[None]:
    """Zero points are written with the opposite sign."""

    def make(original: Call) -> Call:
        def written(parts: Parts, *rest: Any, **named: Any) -> dict[str, Tensor]:
            turned = {**parts, "zeros": -parts["zeros"]} if "zeros" in parts else parts
            made: dict[str, Tensor] = original(turned, *rest, **named)
            return made

        return written

    return changed(folder, "packed", make)


def plain_order() -> AbstractContextManager[None]:
    """GPTQ rounds inputs in their order although it should begin with the largest."""

    def make(original: Call) -> Call:
        def compensated(
            weight: Tensor, hessian: Tensor, format: WeightFormat, act_order: bool, *rest: Any
        ) -> dict[str, Tensor]:
            made: dict[str, Tensor] = original(weight, hessian, format, False, *rest)
            return made

        return compensated

    return changed(methods, "gptq", make)

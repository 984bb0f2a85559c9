"""Silent bugs in the products in C++. The registry is `bugs.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from tests.mutations.planting import Call, changed
from transom.ops import block, products, weights
from transom.quantize.formats import Parts, integers


def neighbouring_scale() -> AbstractContextManager[None]:
    """Every group of codes is multiplied by the scale of the group before it."""

    def make(original: Call) -> Call:
        def product(x: Tensor, bias: Tensor | None, parts: Parts, *rest: Any) -> Tensor | None:
            moved = {**parts, "scales": parts["scales"].roll(1, -1)}
            y: Tensor | None = original(x, bias, moved, *rest)
            return y

        return product

    return changed(products, "product", make)


def ignored_order() -> AbstractContextManager[None]:
    """Columns of codes in another order are multiplied by the inputs in their order."""

    def make(original: Call) -> Call:
        def coded_weight(parts: Parts, *rest: Any) -> Any:
            return original({name: parts[name] for name in parts if name != "order"}, *rest)

        return coded_weight

    return changed(products, "coded_weight", make)


def neighbouring_level() -> AbstractContextManager[None]:
    """Codes that index a table of values have the value of the code before."""

    def make(original: Call) -> Call:
        def levels(values: tuple[float, ...]) -> Any:
            table = values != integers(int(values[0]))
            return original((values[-1], *values[:-1]) if table else values)

        return levels

    return changed(weights, "_levels", make)


def unlimited_plan() -> AbstractContextManager[None]:
    """Blocks in C++ see all earlier keys that the cache has, also in layers with windows."""
    return changed(block, "SlotsArgs", lambda original: lambda **lengths: original())

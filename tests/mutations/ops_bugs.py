"""Silent bugs in the products in C++. The registry is `bugs.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from tests.mutations.planting import Call, changed
from transom.ops import block, products
from transom.quantize.formats import Parts


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


def unlimited_plan() -> AbstractContextManager[None]:
    """Blocks in C++ see all earlier keys that the cache has, also in layers with windows."""
    return changed(block, "SlotsArgs", lambda original: lambda **lengths: original())

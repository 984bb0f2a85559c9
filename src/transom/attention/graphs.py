"""Functions that torch.compile calls while tracing instead of tracing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function as torch.compiler.assume_constant_result does.

    The result of the call during tracing becomes a constant of the graph.
    """
    # torch's own decorator does the same, but imports the compiler first, which takes a second.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

"""What torch.compile must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as torch.compiler.assume_constant_result gives it: called while tracing, its
    answer kept.
    """
    # torch's decorator makes this one assignment, after importing the compiler, which takes a
    # second.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

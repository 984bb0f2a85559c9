"""A bar on standard error for work that takes a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items as they are, with a bar named `what`; none where it is empty."""
    if not what:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total=total, console=Console(stderr=True))

"""How long each part of decoding takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PARTS = ("blocks in C++", "blocks in PyTorch", "output", "sampling")
_seconds: dict[str, float] | None = None  # of each part, while somebody measures


@contextmanager
def measured_steps() -> Iterator[dict[str, float]]:
    """Yield the seconds of each of the `PARTS`, which steps of a decode plan inside add to.

    Without a plan, only `sampling` is measured: the device may still compute when a part returns.
    """
    global _seconds
    before, _seconds = _seconds, defaultdict(float)
    try:
        yield _seconds
    finally:
        _seconds = before


@contextmanager
def part(name: str) -> Iterator[None]:
    """Add the seconds of a block of code to a part, if somebody measures."""
    start = time.perf_counter()
    try:
        yield
    finally:
        if _seconds is not None:
            _seconds[name] += time.perf_counter() - start


def table(seconds: Mapping[str, float], total: float, tokens: int) -> list[str]:
    """Return one line per part: milliseconds per token, and its share of all seconds."""
    rest = {"Python and the rest": max(0.0, total - sum(seconds.values()))}
    parts = {name: seconds[name] for name in PARTS if name in seconds} | rest
    return [
        f"{name:<20} {1000 * spent / max(tokens, 1):8.3f} ms {spent / max(total, 1e-9):6.1%}"
        for name, spent in parts.items()
    ]

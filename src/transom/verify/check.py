"""What a check is, and what it finds: two numbers that should be equal, how far apart they are, and
where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest difference accepted, relative to the largest value compared with: far above the rounding
# of that dtype over a few layers, far below what one wrong key or position changes.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Finding:
    """One comparison: `error` is the largest relative difference (inf: NaN or another shape),
    `where` the case.

    `detail` says where the difference begins; it is empty while the comparison holds.
    """

    comparison: str
    where: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the two are as equal as promised."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Check:
    """A named set of comparisons; `run` finds lazily, so that a reader may stop at the first that
    fails.
    """

    name: str
    what: str
    run: Callable[[], Iterator[Finding]]


@dataclass(frozen=True)
class Line:
    """All findings of one comparison: how many cases, how many failed, the worst and the first bad
    one.
    """

    comparison: str
    cases: int
    failed: int
    worst: Finding
    first_bad: Finding | None


def difference(mine: Tensor, expected: Tensor) -> float:
    """Largest |mine - expected| over the largest |expected|; inf where one is NaN or the shapes
    differ.

    Where all that is expected is zero, anything else is infinitely wrong.
    """
    if mine.shape != expected.shape:
        return math.inf
    if not mine.numel():
        return 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    gap = (mine.detach().to(wide) - expected.detach().to(wide)).abs()
    worst, scale = float(gap.max()), float(expected.detach().abs().max())
    if worst == 0.0:
        return 0.0
    return worst / scale if math.isfinite(worst) and scale > 0 else math.inf


def in_one_line(error: Exception) -> str:
    """Return the class and the first 160 characters of an error that another library raised."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def summarize(findings: Iterable[Finding]) -> list[Line]:
    """One line per comparison, in the order of their first cases."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.comparison, []).append(finding)
    return [
        Line(
            name,
            len(group),
            sum(not one.ok for one in group),
            max(group, key=lambda one: one.error / one.tolerance if one.tolerance else one.error),
            next((one for one in group if not one.ok), None),
        )
        for name, group in groups.items()
    ]

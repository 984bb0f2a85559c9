"""The result type of every check, and how results are compared and summarized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The largest accepted difference between logits or hidden states, relative to the largest expected
# value. It is far above the rounding of a few layers in that dtype and far below the effect of one
# wrong key or position.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Finding:
    """One comparison of a measured value with an expected one.

    Attributes:
        comparison: What is compared with what. Findings of one name share a row of the table.
        case: The model, tensor, call or sizes that were compared.
        error: The largest relative difference, or the number of mismatches. It is infinite if a
            value is NaN or missing, or has another shape.
        tolerance: The largest `error` that passes.
        detail: Where a failed comparison begins to differ, or by how much.
    """

    comparison: str
    case: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the comparison passed."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Summary:
    """All findings of one comparison.

    Attributes:
        comparison: The name that the findings share.
        cases: How many findings there are.
        failed: How many of them failed.
        worst: The finding with the largest error relative to its tolerance.
        first_failure: The first finding that failed, if any.
    """

    comparison: str
    cases: int
    failed: int
    worst: Finding
    first_failure: Finding | None


def exact(
    comparison: str, case: str, mismatches: float | Sequence[object], detail: str = ""
) -> Finding:
    """Return a finding that passes only without mismatches.

    Args:
        comparison: What is compared with what.
        case: What was compared.
        mismatches: Their number, True for one, or a sequence of their places.
        detail: What differs; by default the first of the places.
    """
    if isinstance(mismatches, Sequence):
        detail = detail or "".join(f"first {place}" for place in mismatches[:1])
        mismatches = len(mismatches)
    return Finding(comparison, case, float(mismatches), 0.0, detail)


def missing(comparison: str, case: str, detail: object) -> Finding:
    """Return a finding that fails because there is nothing to compare."""
    return Finding(comparison, case, math.inf, 0.0, str(detail))


def same_bits(
    comparison: str, case: str, measured: Tensor, expected: Tensor, detail: str
) -> Finding:
    """Return a finding that passes only if dtype, shape and all bits of two tensors are equal."""
    same = same_bytes(measured.detach(), expected)
    return Finding(comparison, case, 0.0 if same else math.inf, 0.0, detail)


def close(
    comparison: str,
    case: str,
    measured: Tensor,
    expected: Tensor,
    tolerance: float,
    detail: str = "",
) -> Finding:
    """Return a finding of the `difference` between two tensors."""
    return Finding(comparison, case, difference(measured, expected), tolerance, detail)


def difference(measured: Tensor, expected: Tensor) -> float:
    """Return the largest |measured - expected| divided by the largest |expected|.

    The result is infinite if a value is NaN, if the shapes differ, or if all expected values are
    zero and a measured one isn't.
    """
    if measured.shape != expected.shape:
        return math.inf
    if not measured.numel():
        return 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    gap = (measured.detach().to(wide) - expected.detach().to(wide)).abs()
    worst, scale = float(gap.max()), float(expected.detach().abs().max())
    if worst == 0.0:
        return 0.0
    return worst / scale if math.isfinite(worst) and scale > 0 else math.inf


def first_difference(measured: Tensor, expected: Tensor, tolerance: float, dim: int) -> int:
    """Return the first index along `dim` at which two tensors differ by more than `tolerance`."""
    pairs = zip(measured.unbind(dim), expected.unbind(dim), strict=False)
    differs = [not difference(*pair) <= tolerance for pair in pairs]
    return differs.index(True) if True in differs else len(differs)


def same_bytes(measured: Tensor, expected: Tensor) -> bool:
    """Return whether dtype, shape and all bits are equal; NaN equals the same NaN."""
    if measured.dtype != expected.dtype or measured.shape != expected.shape:
        return False
    flat = (one.contiguous().view(-1).view(torch.uint8) for one in (measured, expected))
    return torch.equal(*flat)


def summarize(findings: Iterable[Finding]) -> list[Summary]:
    """Return one summary for each comparison, in the order of the first findings."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.comparison, []).append(finding)
    summaries = []
    for name, group in groups.items():
        failed = [one for one in group if not one.ok]
        worst = max(group, key=lambda one: one.error / (one.tolerance or 1.0))
        summaries.append(
            Summary(name, len(group), len(failed), worst, failed[0] if failed else None)
        )
    return summaries

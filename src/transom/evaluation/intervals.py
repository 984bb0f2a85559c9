"""95% intervals of scores, and of the difference between two models.

The unit is a document or a row. Tokens of one document depend on each other and are not units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Z = 1.959963984540054  # the normal quantile of (1 + CONFIDENCE) / 2
RESAMPLES, SEED = 2000, 0
AT_ONCE = 1 << 22  # indices drawn at a time

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Ratio:
    """A score of many units: `value(sum(parts) / sum(sizes))`.

    Attributes:
        parts: float64 [units]; 0 or 1 for a share.
        sizes: float64 [units]; 1 for a share.
        value: Function of the ratio; the ratio itself by default.
        share: Whether this is the share of units that are right.
    """

    parts: NDArray[np.float64]
    sizes: NDArray[np.float64]
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda ratio: ratio
    share: bool = False

    @classmethod
    def of_right(cls, right: Sequence[bool] | NDArray[np.bool_]) -> Ratio:
        """Return the share of units that are right."""
        return cls(np.array(right, np.float64), np.ones(len(right)), share=True)

    @property
    def score(self) -> float:
        """The score of all units."""
        return float(self.value(self.parts.sum(keepdims=True) / self.sizes.sum(keepdims=True))[0])

    def resampled(self, drawn_RN: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the score [R] of each row of drawn units [R, N]."""
        return self.value(self.parts[drawn_RN].sum(1) / self.sizes[drawn_RN].sum(1))


def interval(ratio: Ratio) -> Interval | None:
    """Return the Wilson interval of a share, or the bootstrap interval of another score."""
    if ratio.share:
        return wilson(int(ratio.parts.sum()), len(ratio.parts))
    return bootstrap(ratio)


def wilson(right: int, rows: int) -> Interval:
    """Return the score interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    share, z2 = right / rows, Z * Z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    reach = Z / (1 + z2 / rows) * np.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # Rounding would move the ends slightly away from 0 and 1.
    low = 0.0 if right == 0 else float(middle - reach)
    return low, 1.0 if right == rows else float(middle + reach)


def bootstrap(ratio: Ratio) -> Interval | None:
    """Return the percentile interval of a score over resampled units (Efron 1979).

    The draws have a fixed seed. None for a single unit.
    """
    return _percentiles([ratio.resampled(drawn) for drawn in _draws(len(ratio.parts))])


def figure(ratio: Ratio) -> dict[str, float | None]:
    """Return a score and the ends of its interval as plain data."""
    return {"value": ratio.score, **_ends(interval(ratio))}


def difference(first: Ratio, second: Ratio) -> dict[str, float | None]:
    """Return `second - first` and the ends of its interval as plain data."""
    ends = bootstrap_difference(first, second)
    return {"value": second.score - first.score, **_ends(ends)}


def _ends(interval: Interval | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else interval
    return {"low": low, "high": high}


def bootstrap_difference(first: Ratio, second: Ratio) -> Interval | None:
    """Return the interval of `second - first`. Both have the same units, drawn in pairs."""
    draws = _draws(len(first.parts))
    return _percentiles([second.resampled(drawn) - first.resampled(drawn) for drawn in draws])


def _draws(units: int) -> Iterator[NDArray[np.int64]]:
    """Yield `RESAMPLES` rows of drawn units in arrays of limited size; none for a single unit."""
    generator = np.random.default_rng(SEED)
    left = RESAMPLES if units > 1 else 0
    while left:
        rows = min(left, max(1, AT_ONCE // units))
        yield generator.integers(units, size=(rows, units))
        left -= rows


def _percentiles(pieces: list[NDArray[np.float64]]) -> Interval | None:
    if not pieces:
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(pieces), [tail, 100 - tail])
    return float(low), float(high)

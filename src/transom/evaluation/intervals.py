"""How sure a score is: 95% intervals of shares and of ratios, and of the difference between two
models.

The unit is a document or a row, which were drawn; the tokens within one depend on each other and
are no units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """A score of many units: `value(sum(parts) / sum(sizes))`, both [units]; of a `share`, 0 or 1
    and always 1.
    """

    parts: NDArray[np.float64]
    sizes: NDArray[np.float64]
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda ratio: ratio
    share: bool = False

    @classmethod
    def of_right(cls, right: NDArray[np.bool_]) -> Ratio:
        """The share of rows [N] that are right."""
        return cls(right.astype(np.float64), np.ones(len(right)), share=True)

    @property
    def score(self) -> float:
        """The score of all units."""
        return float(self.value(self.parts.sum(keepdims=True) / self.sizes.sum(keepdims=True))[0])

    def resampled(self, drawn_RN: NDArray[np.int64]) -> NDArray[np.float64]:
        """The score [R] of each row of drawn units."""
        return self.value(self.parts[drawn_RN].sum(1) / self.sizes[drawn_RN].sum(1))


def interval(ratio: Ratio) -> Interval | None:
    """Wilson's for a share, else the bootstrap's."""
    return wilson(int(ratio.parts.sum()), len(ratio.parts)) if ratio.share else bootstrap(ratio)


def wilson(right: int, rows: int) -> Interval:
    """The interval of a share of rows that were right: all shares it could well have come from
    (Wilson, 1927).
    """
    share, z2 = right / rows, Z * Z
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    reach = Z / (1 + z2 / rows) * np.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # Rounding would leave the ends a little beside 0 and 1.
    return 0.0 if right == 0 else float(middle - reach), 1.0 if right == rows else float(
        middle + reach
    )


def bootstrap(ratio: Ratio) -> Interval | None:
    """The percentile interval of a score over units drawn again, with a fixed seed; None for a
    single unit.
    """
    return _percentiles([ratio.resampled(drawn) for drawn in _draws(len(ratio.parts))])


def bootstrap_difference(first: Ratio, second: Ratio) -> Interval | None:
    """That of `second - first` where both have the same units, which are drawn in pairs."""
    draws = _draws(len(first.parts))
    return _percentiles([second.resampled(drawn) - first.resampled(drawn) for drawn in draws])


def _draws(units: int) -> Iterator[NDArray[np.int64]]:
    """`RESAMPLES` rows of as many units as there are, in pieces of bounded size; nothing for fewer
    than two.
    """
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

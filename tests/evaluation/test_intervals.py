"""Intervals against what defines them."""

import numpy as np
import pytest

from transom.evaluation.intervals import Ratio, Z, bootstrap, bootstrap_difference, wilson


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (3, 10), (10, 10), (812, 1000), (1, 1)])
def test_wilson_holds_the_shares_that_would_give_the_result(right, rows):
    # Each edge p is as far from the share as Z standard errors of a share p: that is the
    # definition.
    share = right / rows
    for edge in wilson(right, rows):
        assert abs(share - edge) == pytest.approx(Z * np.sqrt(edge * (1 - edge) / rows), abs=1e-7)
    low, high = wilson(right, rows)
    assert 0 <= low <= share <= high <= 1


def test_the_bootstrap_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    low, high = bootstrap(Ratio(values, np.ones(400)))
    reach = Z * values.std() / 20
    assert low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


def test_a_ratio_is_that_of_sums_and_is_drawn_by_unit():
    # Documents of one rate, whatever their lengths: no draw can give another score.
    sizes = np.array([1.0, 10.0, 1000.0])
    ratio = Ratio(3 * sizes, sizes, np.exp)
    assert (
        ratio.score
        == pytest.approx(np.exp(3))
        == bootstrap(ratio)[0]
        == pytest.approx(bootstrap(ratio)[1])
    )


def test_pairs_are_drawn_together():
    # Rows differ far more among each other than the two models do on each of them.
    parts = np.random.default_rng(5).normal(0.0, 50.0, size=200)
    ones = np.ones(200)
    low, high = bootstrap_difference(Ratio(parts, ones), Ratio(parts + 1.0, ones))
    assert (low, high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_one_unit_says_nothing():
    one = Ratio(np.array([2.0]), np.array([1.0]))
    assert bootstrap(one) is None and bootstrap_difference(one, one) is None


def test_the_same_data_gives_the_same_interval(monkeypatch):
    ratio = Ratio(np.arange(50.0), np.ones(50))
    whole = bootstrap(ratio)
    monkeypatch.setattr("transom.evaluation.intervals.AT_ONCE", 50 * 7)
    assert bootstrap(ratio) == whole

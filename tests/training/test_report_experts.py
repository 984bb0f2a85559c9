"""The report's part on experts: what it says is in the rows, whatever state those are in."""

from __future__ import annotations

import math
from typing import Any

import pytest

from transom.training.report.experts import DEAD_STEPS, expert_panel


def rows(count: int, **last: Any) -> list[dict[str, Any]]:
    """Steps of two layers with four experts; the last one of layer 2 is never chosen; `last`
    changes the last.
    """
    load = [[0.25, 0.25, 0.25, 0.25], [0.5, 0.3, 0.2, 0.0]]
    row = {
        "expert_load": load,
        "router_entropy": [1.3, 0.9],
        "dropped_tokens": [0.0, 0.0],
        "aux_loss": 1.02,
    }
    return [
        {"step": step, **row, **(last if step == count else {})} for step in range(1, count + 1)
    ]


def test_a_dense_run_has_no_panel():
    assert expert_panel([{"step": 1, "loss": 2.0}], []) == ""


def test_entropy_dead_experts_and_dropped_tokens_are_shown():
    load = [[0.0, 0.5, 0.25, 0.25], [0.5, 0.3, 0.2, 0.0]]
    page = expert_panel(rows(DEAD_STEPS + 50, expert_load=load, dropped_tokens=[0.125, 0.0]), [])
    for shown in (
        "ln 4 = 1.39 is undecided",
        "Dropped tokens",
        f"dead, last {DEAD_STEPS} steps",
        "<td>MoE layer 1</td><td>1 of 4</td><td>0 of 4</td><td>1.300</td><td>12.50%</td>",
        "<td>MoE layer 2</td><td>1 of 4</td><td>1 of 4</td><td>0.900</td><td>0.00%</td>",
        "<td>all layers</td><td>2 of 8</td><td>1 of 8</td><td>1.100</td><td>6.25%</td>",
    ):
        assert shown in page, shown
    assert page.count("<svg") == 2 + 2
    assert expert_panel(rows(3), []).count("<svg") == 2 + 1, "no chart of what never happened"


@pytest.mark.parametrize("broken", [None, [math.nan, None], "x", [1.0]])
def test_rows_without_usable_numbers_are_dashes(broken):
    page = expert_panel(rows(1, router_entropy=broken, dropped_tokens=broken), [])
    assert "<td>1 of 4</td><td>1 of 4</td><td>\N{EM DASH}</td>" in page
    assert "nan" not in page


def test_tokens_of_experts_are_shown_and_not_run():
    kinds = [[[["<b>", 0.5], ["\n", 0.25]], [], [["é'", 1.0]], []]] * 2
    page = expert_panel(
        rows(2), [{"step": 1, "expert_tokens": []}, {"step": 2, "expert_tokens": kinds}]
    )
    assert "step 2" in page and page.count("expert 1: was sent no token") == 2
    assert "expert 0: &#39;&lt;b&gt;&#39; 50.0%, &#39;\\n&#39; 25.0%" in page

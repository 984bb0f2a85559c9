"""The learning-rate schedules: their shape, their ends and what they refuse."""

from __future__ import annotations

import pytest

from transom.base.errors import RequestError
from transom.training.optim.schedule import ScheduleArgs, lr_scale


def scales(total_steps: int, **fields: object) -> list[float]:
    args = ScheduleArgs(**fields)
    return [lr_scale(step, total_steps, args) for step in range(total_steps)]


def test_wsd_rises_stays_and_falls_linearly() -> None:
    got = scales(10, kind="wsd", warmup=0.2, decay=0.4, final=0.2)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_linear_falls_from_the_warmup_on() -> None:
    assert scales(6, kind="linear", warmup=1 / 6, final=0.0) == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0]
    )


def test_cosine_is_half_way_in_the_middle_of_its_fall() -> None:
    got = scales(5, kind="cosine", warmup=0.2, final=0.1)
    assert got[2] == pytest.approx(0.55)
    assert got[1] - got[2] < got[2] - got[3] + 1e-12  # steepest in the middle


def test_constant_stays_at_the_peak_after_the_warmup() -> None:
    assert scales(8, kind="constant", warmup=0.5) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["wsd", "linear", "cosine"])
@pytest.mark.parametrize("total_steps", [2, 3, 40, 1000])
def test_first_step_moves_and_last_step_reaches_final(kind: str, total_steps: int) -> None:
    got = scales(total_steps, kind=kind)
    assert 0 < got[0] <= 1
    assert got[-1] == pytest.approx(0.02)
    assert max(got) == 1


def test_no_warmup_starts_at_the_peak() -> None:
    assert scales(10, kind="wsd", warmup=0.0, decay=0.5)[0] == 1


def test_a_single_step_runs_at_the_peak() -> None:
    assert scales(1) == [1]


@pytest.mark.parametrize("step", [-1, 10])
def test_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(RequestError, match=f"step: got {step}; expected 0 to 9"):
        lr_scale(step, 10, ScheduleArgs())


def test_run_without_steps_is_refused() -> None:
    with pytest.raises(RequestError, match="total_steps: got 0"):
        lr_scale(0, 0, ScheduleArgs())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "wds"}, "kind"),
        ({"warmup": -0.1}, "warmup"),
        ({"final": 1.5}, "final"),
        ({"decay": float("nan")}, "decay"),
        ({"warmup": 0.5, "decay": 0.6}, "decay"),
    ],
)
def test_bad_field_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=f"^{named}: got "):
        ScheduleArgs(**fields)


def test_warmup_and_decay_may_fill_the_whole_run() -> None:
    assert ScheduleArgs(warmup=0.3, decay=0.7).decay == 0.7
    assert ScheduleArgs(kind="linear", warmup=0.9).decay == 0.7  # decay counts for wsd only

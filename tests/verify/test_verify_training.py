"""`verify resume`, `verify step` and `verify data`: green as they are, and each part of a history
is looked at.
"""

from __future__ import annotations

import pytest
import torch

from transom.base.errors import RequestError
from transom.training.config import read_config
from transom.verify.checks import run
from transom.verify.resume import compare_histories, compare_resumed, history
from transom.verify.tiny_runs import small_run, temporary_corpus, tiny_run


def test_resume_is_bit_equal():
    findings = list(run("resume"))
    assert len(findings) == 14
    assert {one.tolerance for one in findings} == {0.0}
    assert all(one.ok for one in findings)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "llama4-scout", "data": {"batch_size": 6}, "accumulate": 3},
        {"model": {"preset": "mistral-7b-v0.1"}, "optimizer": {"name": "adamw"}, "short_rows": 0.5},
    ],
    ids=["moe, accumulated", "window, short rows"],
)
def test_a_real_runs_settings_are_resumed_in_small(fields):
    with temporary_corpus() as folder:
        args = small_run(read_config(None, base=fields), folder, steps=4)
        findings = list(compare_resumed(args, folder, 4))
    assert [one for one in findings if not one.ok] == []


def test_two_interruptions_need_three_steps():
    with pytest.raises(RequestError, match="--steps: got 2"):
        next(run("resume", steps=2))


@pytest.fixture(scope="module")
def straight():
    with temporary_corpus() as folder:
        return history(tiny_run(folder, "run", steps=2, ema_decay=0.5), folder, "straight", [2])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("losses", lambda x: {**x, "step 2": x["step 2"] + 1e-12}),
        ("gradient norms", lambda x: {**x, "step 2": x["step 2"] + 1e-12}),
        ("weights", lambda x: {**x, "norm.weight": x["norm.weight"] + 1}),
        ("averaged weights", lambda x: {**x, "norm.weight": x["norm.weight"] + 1}),
        ("optimizer state", lambda x: dict(list(x.items())[1:])),
        ("data position", lambda x: {**x, "item": x["item"] + 1}),
        ("random state", lambda x: {"of torch": x["of torch"].roll(1)}),
    ],
)
def test_every_part_of_a_history_is_compared(straight, part, change):
    other = {**straight, part: change(straight[part])}
    (bad,) = (one for one in compare_histories("c", "here", other, straight) if not one.ok)
    assert bad.case == f"{part}, here"
    assert bad.detail.startswith("first in ")


def test_a_history_depends_on_the_random_state():
    """Without it, losing the state could not be seen."""
    with temporary_corpus() as folder:
        args = tiny_run(folder, "run", steps=2)
        first = history(args, folder, "one", [1])
        assert not torch.equal(
            first["random state"]["of torch"],
            history(args, folder, "two", [2])["random state"]["of torch"],
        )


def test_step_and_data_are_green():
    assert [one for one in (*run("step"), *run("data")) if not one.ok] == []


def test_a_workshop_leaves_nothing_behind():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with temporary_corpus() as folder:
        history(tiny_run(folder, "run", steps=1), folder, "one", [1])
    assert not folder.exists()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)

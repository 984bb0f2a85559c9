"""Ranks that end, hang or fail: the others end too, and one sentence says what happened."""

import os
import random
import signal
import time
from dataclasses import replace

import pytest

from tests.distributed.processes import (
    finish,
    losses,
    ranks_of,
    run,
    start,
    wait_for_step,
    words,
)
from transom.base.errors import RequestError, WorkError
from transom.base.interrupts import Terminated
from transom.base.processes import RESTARTS
from transom.distributed.failures import End, conclude
from transom.training.loop.progress import TWICE, StopRequest

TWO = ("--nproc", "2")
FOUR = ("--nproc", "4")
CLOSED = End("closed", code=1)


def printed(err: str) -> list[str]:
    """Return the errors that a command has printed."""
    notices = ("documents", "nothing is held out", "resumed at")
    lines = [line for line in err.splitlines() if line.startswith("transom: ")]
    return [line for line in lines if not any(words in line for words in notices)]


def test_which_rank_explains_the_end(monkeypatch):
    wrong = End.of(RequestError("steps: got 0"))
    same = {rank: replace(wrong, seconds=10.0 - rank) for rank in range(3)}
    verdict = conclude(same, 3)
    assert (verdict.rank, verdict.code, verdict.alike) == (0, 2, True)

    only = {0: CLOSED, 1: CLOSED, 2: End.of(WorkError("disk full"))}
    verdict = conclude(only, 3)
    assert (verdict.rank, verdict.code, verdict.alike) == (2, 1, False)

    # What rank 0 alone does is repeated by the others with its number.
    first = {0: wrong, 1: replace(wrong, message=f"rank 0: {wrong.message}")}
    assert conclude(first, 2).alike

    stopped = {0: End.of(Terminated(signal.SIGTERM)), 1: CLOSED}
    assert (conclude(stopped, 2).rank, conclude(stopped, 2).code) == (0, 143)

    assert (conclude({0: CLOSED, 2: CLOSED}, 3).rank, conclude({0: CLOSED}, 3).missing) == (
        0,
        (1, 2),
    )
    monkeypatch.setenv(RESTARTS, "0")  # the process that has started the ranks sees which one ended
    assert conclude({0: CLOSED, 2: CLOSED}, 3).rank is None
    hangs = {0: CLOSED, 2: End("timeout", code=1)}
    assert (conclude(hangs, 3).rank, conclude(hangs, 3).missing) == (2, (1,))


def test_a_signal_that_comes_twice_at_once_stops_a_rank_after_the_step(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stop = StopRequest(alone=False)
    stop.signal = signal.SIGTERM  # another rank got it before
    stop._stop(signal.SIGTERM, None)
    stop._stop(signal.SIGTERM, None)
    assert not stop.again
    clock[0] += TWICE
    with pytest.raises(Terminated):
        stop._stop(signal.SIGTERM, None)


def test_an_unreachable_rendezvous_is_named(tmp_path):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "RANK": "1", "WORLD_SIZE": "2"}
    code, out, err = run(words(tmp_path, f"out={tmp_path}/run"), **where, TRANSOM_DIST_TIMEOUT="1")
    assert (code, out) == (1, "")
    assert "rank 1: rendezvous: got no answer from 127.0.0.1:9" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_a_restart_loses_only_steps_since_the_checkpoint(tmp_path):
    draw = random.Random()
    rank, step = draw.randrange(4), draw.randrange(4, 18)
    command = words(tmp_path, "steps=20", "save_every=3", *FOUR)
    killed = start([*command, f"out={tmp_path}/run", "--max-restarts", "1"])
    wait_for_step(killed, tmp_path / "run", step)
    os.kill(ranks_of(killed)[rank], signal.SIGKILL)
    code, _, err = finish(killed)
    assert code == 0, err
    assert printed(err) == [f"transom: rank {rank} was ended by SIGKILL; restart 1 of 1"]
    straight = run([*command, f"out={tmp_path}/straight"])
    assert straight[0] == 0, straight[2]
    assert losses(tmp_path / "run") == losses(tmp_path / "straight"), f"killed at step {step}"

    more = start([*words(tmp_path, "steps=100000", "save_every=3", *FOUR), f"out={tmp_path}/more"])
    wait_for_step(more, tmp_path / "more", 4, saved=True)
    since = time.monotonic()
    os.kill(ranks_of(more)[rank], signal.SIGKILL)
    code, _, err = finish(more)
    latest = (tmp_path / "more" / "latest").read_text().strip()
    assert code == 1
    assert printed(err) == [
        f"transom: rank {rank} was ended by SIGKILL; --resume continues it from {latest}"
    ]
    assert time.monotonic() - since < 60 or os.getloadavg()[0] > 4


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_saves_the_run(tmp_path, number, expected):
    process = start(words(tmp_path, f"out={tmp_path}/run", "steps=100000", *TWO))
    wait_for_step(process, tmp_path / "run", 2)
    os.kill(process.pid, number)
    code, _, err = finish(process)
    assert (code, printed(err)) == (expected, []), err
    steps = len(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "latest").read_text().strip() == f"step_{steps:06d}"
    assert err.count(f"saved at step {steps}; --resume continues it") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_and_a_rank_that_fails_are_named(tmp_path):
    command = words(tmp_path, "steps=100000", *TWO)
    process = start([*command, f"out={tmp_path}/hangs"], TRANSOM_DIST_TIMEOUT="8")
    wait_for_step(process, tmp_path / "hangs", 2)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    code, _, err = finish(process)
    assert code == 1
    assert printed(err) == [
        "transom: rank 1 has not answered for 8 seconds (TRANSOM_DIST_TIMEOUT)"
    ], err
    # A directory in the place of metrics.jsonl: only rank 0 writes there.
    process = start([*command, f"out={tmp_path}/fails"])
    wait_for_step(process, tmp_path / "fails", 2)
    (tmp_path / "fails" / "metrics.jsonl").unlink()
    (tmp_path / "fails" / "metrics.jsonl").mkdir()
    code, _, err = finish(process)
    assert code == 1
    (line,) = printed(err)
    assert line.startswith("transom: rank 0: ") and "could not be written" in line

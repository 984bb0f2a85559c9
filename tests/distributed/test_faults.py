"""Ranks that end, hang or fail: the others end too, and one sentence says what happened."""

import os
import random
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

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
from transom.base.interrupts import Background, Terminated
from transom.base.processes import RESTARTS, restarts
from transom.config.parallel_args import ParallelArgs
from transom.distributed.failures import End, conclude
from transom.distributed.launch import _attempt_store, _check_degrees, _outcome, joined
from transom.training.loop.progress import TWICE, StopRequest

TWO = ("--nproc", "2")
FOUR = ("--nproc", "4")
KILLED = ("steps=20", "save_every=3", "keep_last=2")  # runs that are killed on the way
CLOSED = End("closed", code=1)


def printed(err: str) -> list[str]:
    """Return the errors that a command has printed."""
    notices = ("documents", "nothing is held", "resumed at", "unfinished, removed", "waiting for")
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
    assert conclude(stopped | {2: CLOSED}, 4).rank is None  # the launcher may have stopped rank 0
    hangs = {0: CLOSED, 2: End("timeout", code=1)}
    assert (conclude(hangs, 3).rank, conclude(hangs, 3).missing) == (2, (1,))


def test_a_killed_rank_explains_why_the_launcher_stopped_the_others():
    stopped = End.of(Terminated(signal.SIGTERM))
    assert _outcome([stopped], {1: -signal.SIGKILL}, 1) == (1, "rank 1 was ended by SIGKILL")
    by_term = (143, "rank 1 was ended by SIGTERM")
    assert _outcome([stopped], {1: -signal.SIGTERM}, 1) == by_term
    assert _outcome([stopped, replace(stopped, code=129)], {}, 1) == by_term
    assert _outcome([replace(stopped, printed=True)], {1: 143}, 1) == (143, None)
    assert _outcome([], {0: 143}, 0) == (143, None)  # it has printed that itself


def test_restarted_ranks_share_no_keys_with_those_before_and_must_have_equal_degrees(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.HashStore()

    def joined_by_two(first, second):
        other = Background(lambda: _attempt_store(store, 1, 2, ParallelArgs(tensor=second)))
        parts = _attempt_store(store, 0, 2, ParallelArgs(tensor=first)), other.result(20)
        assert not parts[0].check(["key"])
        parts[1].set("key", "")
        assert parts[0].check(["key"])
        return parts[1]

    _check_degrees(joined_by_two(1, 1))
    assert restarts() == 0
    with pytest.raises(RequestError, match=r"parallel.tensor: got 1 on rank 0 and 2 on rank 1"):
        _check_degrees(joined_by_two(1, 2))
    assert restarts() == 1


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "MASTER_PORT"])
def test_numbers_of_the_environment_are_checked(monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    with pytest.raises(RequestError, match=f"{name}: got 'abc'; expected"), joined(ParallelArgs()):
        pass


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
def test_another_program_at_the_rendezvous_is_named(tmp_path):
    where = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "TRANSOM_DIST_TIMEOUT": "3"}
    with socket.create_server(("127.0.0.1", 0)) as other:  # accepts connections, and is no store
        where["MASTER_PORT"] = str(other.getsockname()[1])
        command = words(tmp_path, f"out={tmp_path}/run")
        ranks = [start(command, **where, RANK=rank) for rank in "01"]
        (first, _, taken), (second, _, silent) = map(finish, ranks)
    assert first == second == 1
    assert f"rank 0: rendezvous: got port {where['MASTER_PORT']}, which another program" in taken
    assert f"rank 1: rendezvous: got no answer from 127.0.0.1:{where['MASTER_PORT']}" in silent


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the losses of an uninterrupted run on four ranks."""
    folder = tmp_path_factory.mktemp("straight")
    code, _, err = run(words(folder, *KILLED, *FOUR, f"out={folder}/run"))
    assert code == 0, err
    return losses(folder / "run")


@pytest.fixture
def draw():
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201 - shown if the test fails
    return random.Random(seed)


@pytest.mark.slow
def test_a_restart_after_a_killed_rank_loses_only_steps_since_the_checkpoint(
    straight, draw, tmp_path
):
    rank, step = draw.randrange(4), draw.randrange(4, 18)
    command = words(tmp_path, *KILLED, *FOUR, f"out={tmp_path}/run", "--max-restarts", "1")
    killed = start(command)
    wait_for_step(killed, tmp_path / "run", step)
    os.kill(ranks_of(killed)[rank], signal.SIGKILL)
    code, _, err = finish(killed)
    assert code == 0, err
    assert printed(err) == [f"transom: rank {rank} was ended by SIGKILL; restart 1 of 1"]
    assert losses(tmp_path / "run") == straight, f"killed at step {step}"


@pytest.mark.slow
def test_a_job_killed_on_four_ranks_resumes_on_two_with_the_same_losses(straight, draw, tmp_path):
    config, path = tmp_path / "config.yaml", tmp_path / "run"
    fields = [word.split("=", 1) for word in words(tmp_path, *KILLED, f"out={path}")[1:]]
    config.write_text("".join(f"{name}: {value}\n" for name, value in fields if "." not in name))
    dotted = [f"{name}={value}" for name, value in fields if "." in name]

    rank, step = draw.randrange(4), draw.randrange(4, 16)
    job = start(["train", str(config), *dotted, *FOUR])
    wait_for_step(job, path, step, saved=True)
    os.kill(ranks_of(job)[rank], signal.SIGKILL)
    code, _, err = finish(job)
    left = f"--resume continues it from {(path / 'latest').read_text().strip()}"
    assert code == 1
    assert printed(err) == [f"transom: rank {rank} was ended by SIGKILL; {left}"]

    job = start(["train", str(path), *TWO, "--resume"])
    wait_for_step(job, path, len(losses(path)) + 1)
    for process in (job.pid, *ranks_of(job).values()):  # at any moment, such as during a save
        os.kill(process, signal.SIGKILL)
    assert finish(job)[0] == -signal.SIGKILL

    code, _, err = run(["train", str(path), *TWO, "--resume", "parallel.tensor=2"])
    assert code == 0, err
    assert f"transom: {path}: parallel.tensor: 1 -> 2" in err.splitlines()
    assert losses(path) == pytest.approx(straight, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_signal_to_the_launcher_saves_the_run(tmp_path, number, expected):
    process = start(words(tmp_path, f"out={tmp_path}/run", "steps=100000", *TWO))
    wait_for_step(process, tmp_path / "run", 2)
    ranks, end = (
        [Path(f"/proc/{one}") for one in ranks_of(process).values()],
        time.monotonic() + 100,
    )
    os.kill(process.pid, number)
    while any(one.exists() for one in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    for one in ranks:  # that have lost the launcher and go on
        if one.exists():
            os.kill(int(one.name), signal.SIGKILL)
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

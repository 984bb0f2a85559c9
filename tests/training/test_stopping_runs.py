"""A signal ends a run within seconds wherever it comes, and `--resume` goes on as if nothing had
happened.
"""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.training.finetune.runs import base_folder, run_args, solved
from tests.training.runs import losses, tiny_args, tiny_config
from transom.base.interrupts import Background, Terminated, handling, raise_stop
from transom.cli.main import main
from transom.distributed.ranks import Ranks
from transom.training.loop import run_parts as subject
from transom.training.loop import setup
from transom.training.loop.monitor import Monitor
from transom.training.loop.setup import open_run
from transom.training.loop.trainer import Trainer
from transom.training.losses import objectives
from transom.training.rl.policy import PolicyGradient

CONFIG = {"eval_every": 3, "sample_every": 3, "save_every": 4, "sample_tokens": 4}


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def write_config(folder: Path) -> Path:
    config = tiny_config(folder, **CONFIG)
    config["data"]["sources"] = [{"path": str(folder / "corpus"), "name": "corpus"}]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.fixture
def train(tmp_path):
    """`transom train` of one config; the words are added, the exit code is returned."""
    config = write_config(tmp_path)
    return lambda *words: main(["train", str(config), *words])


@pytest.fixture
def signals(monkeypatch):
    """Make the n-th call of a function send a signal to this process, once."""

    def patch(owner: object, name: str, nth: int = 1, number: int = signal.SIGTERM) -> None:
        real, calls = getattr(owner, name), []

        def patched(*args, **kwargs):
            calls.append(name)
            if len(calls) == nth:
                send(number)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, patched)

    return patch


def rows(run: Path, key: str) -> list:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in found if key in row]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The same run, which nothing has interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(["train", str(write_config(folder))]) == 0
    return folder / "run"


@pytest.fixture
def assert_as_if_uninterrupted(tmp_path, train, straight):
    """Resume the run, and compare it with `straight`."""

    def compare() -> None:
        run = tmp_path / "run"
        assert train("--resume") == 0
        for key in ("held_out", "samples", "final"):
            assert rows(run, key) == rows(straight, key), key
        assert losses(run) == losses(straight)
        assert (run / "best").read_text() == (straight / "best").read_text()

    return compare


def step_of(run: Path) -> str | None:
    return (run / "latest").read_text().strip() if (run / "latest").exists() else None


# Where the signal comes: the function that is being called, which call of it, and the step that is
# saved then.
MOMENTS = {
    "in a forward pass": (objectives, "head_loss", 6, 4),  # the first call is the dry run's
    "while held-out text is scored": (Monitor, "scores", 2, 6),
    "while samples are drawn": (Monitor, "sample", 2, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_during_work_that_can_be_done_again(
    tmp_path, train, signals, moment, assert_as_if_uninterrupted
):
    owner, name, nth, step = MOMENTS[moment]
    signals(owner, name, nth)
    assert train() == 143
    assert step_of(tmp_path / "run") == f"step_{step:06d}"
    assert_as_if_uninterrupted()


BEGINNINGS = {
    "while the tokenizer is trained": (subject, "byte_tokenizer"),
    "during the dry run": (Trainer, "dry_run"),
    "between run.json and the first checkpoint": (setup, "write_run"),
}


@pytest.mark.parametrize("moment", BEGINNINGS)
def test_a_signal_before_anything_is_saved(
    tmp_path, train, signals, moment, capsys, assert_as_if_uninterrupted
):
    signals(*BEGINNINGS[moment])
    assert train() == 143
    assert "--resume continues" in capsys.readouterr().err
    assert step_of(tmp_path / "run") is None
    assert_as_if_uninterrupted()


def test_a_signal_before_anything_is_overwritten_does_not_offer_to_resume_the_former_run(
    train, signals, capsys
):
    assert train() == 0
    signals(Trainer, "dry_run")
    assert train("--overwrite") == 143
    assert "the same command starts it again" in capsys.readouterr().err


def test_a_signal_during_the_last_scoring_leaves_a_finished_run(
    tmp_path, train, signals, capsys, assert_as_if_uninterrupted
):
    signals(Monitor, "scores", 4)
    assert train() == 0
    assert "the run is finished" in capsys.readouterr().err
    assert step_of(tmp_path / "run") == "step_000012"
    assert (tmp_path / "run" / "report.html").exists() and not rows(tmp_path / "run", "final")
    assert_as_if_uninterrupted()


def test_a_signal_while_the_report_is_written(tmp_path, train, signals, capsys):
    from transom.training.report import report

    signals(report, "read_metrics")
    assert train() == 143
    assert "only its report is missing" in capsys.readouterr().err
    assert train("--resume") == 0
    assert (tmp_path / "run" / "report.html").exists()
    assert len(rows(tmp_path / "run", "final")) == 1, (
        "a finished run is scored again, and has one score"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_run_at_once(
    tmp_path, train, signals, number, code, assert_as_if_uninterrupted
):
    signals(Trainer, "log", 6, number)
    signals(Trainer, "save", 3, number)  # the first two were the record of step 3 and after step 4
    assert train() == code
    assert step_of(tmp_path / "run") == "step_000004"
    assert not list((tmp_path / "run").glob("*.tmp-*"))
    assert_as_if_uninterrupted()


def test_a_hangup_ends_a_run_unless_it_was_started_to_ignore_it(tmp_path, train, signals):
    signals(Trainer, "log", 5, signal.SIGHUP)
    assert train() == 129
    assert step_of(tmp_path / "run") == "step_000005"
    signals(Trainer, "log", 2, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train("--resume") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_call_in_the_background_can_be_interrupted():
    release = threading.Event()
    call = Background(lambda: release.wait(60))
    timer = threading.Timer(0.1, send)
    timer.start()
    with handling(raise_stop), pytest.raises(Terminated):
        call.result()
    release.set()
    assert call.result() is True


def test_an_error_in_the_background_is_raised():
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 // 0).result()


def test_a_step_folder_without_a_pointer_is_gone_on_from(tmp_path, train):
    assert train("steps=4") == 0
    (tmp_path / "run" / "latest").unlink()
    assert train("steps=4", "--resume") == 0
    assert step_of(tmp_path / "run") == "step_000004"


def test_nothing_but_a_run_is_emptied_by_resume(tmp_path, train, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("five years of work")
    assert train("--resume") == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_signal_while_ranks_ask_for_signals_is_not_lost(tmp_path, signals):
    signals(Ranks, "largest", 3)
    trainer = open_run(tiny_args(tmp_path), quiet=True)
    trainer.fit()
    assert trainer.stop.signal == signal.SIGTERM
    assert trainer.progress.step < trainer.args.steps


def test_a_signal_while_answers_are_drawn(tmp_path, signals):
    words = (
        "finetune.answer_tokens=4",
        "finetune.group=2",
        "steps=4",
        "save_every=9",
        "finetune.scores=0",
    )
    args = run_args(
        tmp_path,
        base_folder(tmp_path / "model"),
        solved(tmp_path / "rows.jsonl"),
        *words,
        objective="grpo",
    )
    signals(PolicyGradient, "_answers", 3)
    first = open_run(args, quiet=True)
    first.fit()
    assert first.stop.signal == signal.SIGTERM
    assert step_of(tmp_path / "run") == "step_000002"
    open_run(args, resume=True, quiet=True).fit()
    open_run(replace(args, out=str(tmp_path / "straight")), quiet=True).fit()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")

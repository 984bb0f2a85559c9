"""The order of a run: steps, the scores, samples and checkpoints between them, and its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transom.base.interrupts import STOPS, raise_stop
from transom.base.runtime import synchronize
from transom.evaluation.bits import HeldOut

if TYPE_CHECKING:
    from transom.training.loop.trainer import Trainer


def run_course(trainer: Trainer) -> HeldOut:
    """Take the remaining steps, and return the final held-out score, which is empty after a
    signal.
    """
    try:
        _take_steps(trainer)
        if trainer.stop.signal is None:
            return _finish(trainer)
    except STOPS:  # after a first signal the run is saved; a second one ends it at once
        if trainer.stop.signal is None or trainer.stop.again:
            raise
    _end_early(trainer)
    return HeldOut()


def _take_steps(trainer: Trainer) -> None:
    progress, clock, trace = trainer.progress, trainer.clock, trainer.run.path / "trace.json"
    try:
        if progress.unmeasured:
            score_and_save(trainer)
        while not trainer.finished and not _asked_to_stop(trainer):
            clock.before_step()
            started = time.perf_counter()
            result = trainer.step()
            synchronize(trainer.device)
            seconds = time.perf_counter() - started
            progress.seconds += seconds
            trainer.log(result, seconds)
            if table := clock.after_step(trace):
                trainer.line.say(table)
            score_and_save(trainer)
    finally:
        if table := clock.close(trace):
            trainer.line.say(table)
    if trainer.finished and progress.step < trainer.args.steps:
        patience = trainer.args.patience
        trainer.line.say(
            f"step {progress.step}: no better score in {patience} measurements, stopping early"
        )


def _asked_to_stop(trainer: Trainer) -> bool:
    """Return whether any rank has caught a signal.

    All ranks have to stop at the same step, or some would wait for the others forever.
    """
    trainer.stop.signal = trainer.ranks.largest(trainer.stop.signal or 0) or None
    return trainer.stop.signal is not None


@contextmanager
def _again_on_resume(trainer: Trainer) -> Iterator[None]:
    """Let a signal end scores and samples at once, on all ranks together; a resumed run makes them
    again.
    """
    stop = trainer.stop
    try:
        with stop.at_once(apart=True):
            yield
    except STOPS:
        if stop.signal is None or stop.again:
            raise
    if _asked_to_stop(trainer):
        raise_stop(stop.signal or 0)


def score_and_save(trainer: Trainer) -> None:
    """Score, sample and save after a step, each if it is due; `_finish` scores the last step."""
    args, progress = trainer.args, trainer.progress
    if progress.step == args.steps:
        return
    scores = args.eval_every > 0 and progress.step % args.eval_every == 0
    samples = args.sample_every > 0 and progress.step % args.sample_every == 0
    measured = None
    progress.unmeasured = (
        True  # in a checkpoint that is written after a signal: the resumed run does it again
    )
    with _again_on_resume(trainer):
        if scores:
            measured = trainer.evaluate(args.eval_tokens)
        if samples:
            trainer.sample()
    progress.unmeasured = False
    record = trainer.monitor.is_record(measured)
    if scores:
        progress.stale = 0 if record else progress.stale + 1
    if progress.step % args.save_every == 0 or record:
        trainer.save(measured)


def _finish(trainer: Trainer) -> HeldOut:
    """Save the last step and score all held-out text."""
    args = trainer.args
    trainer.save(None)  # before scoring, so that a kill meanwhile does not lose the last steps
    if trainer.data.held_out or trainer.objective.held_out:
        trainer.line.say("scoring held-out text ...")
    with _again_on_resume(trainer):
        # The best step is chosen by scores over the same documents: the first `eval_tokens`.
        limited = (
            args.eval_every > 0 and args.eval_tokens is not None and bool(trainer.data.held_out)
        )
        measured = trainer.evaluate(args.eval_tokens) if limited else None
        final = trainer.evaluate(None, key="final" if limited else "held_out")
        trainer.experts()
    trainer.save(measured or final)
    return final if isinstance(final, HeldOut) else HeldOut()


def _end_early(trainer: Trainer) -> None:
    """Save the latest step after a signal."""
    step = trainer.progress.step
    if not trainer.finished:
        trainer.line.say(f"stopping at step {step}; a second signal stops at once")
    trainer.save(None)
    if trainer.finished:
        trainer.line.say(
            f"step {step}: the run is finished and saved; --resume computes its final score"
        )

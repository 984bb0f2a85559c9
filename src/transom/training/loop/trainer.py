"""The training loop of all kinds of runs, which differ in data, objective and trained weights."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from transom.base.errors import notice
from transom.base.interrupts import STOPS, raise_stop
from transom.base.runtime import matmul_peak
from transom.distributed.checkpoint import Checkpoint, Saver, between_steps, read_state
from transom.evaluation.score import Score
from transom.training.loop.monitor import Monitor
from transom.training.loop.random_states import random_states, take_random_states
from transom.training.loop.run_folder import write_step
from transom.training.loop.step import Stepper, StepResult


class Trainer(Stepper):
    """Takes the steps of a run, and scores, samples and saves between them.

    Attributes:
        saver: Writes checkpoints if ranks divide the model; made before the first step or save.
    """

    saver: Saver | None = None

    @functools.cached_property
    def monitor(self) -> Monitor:
        """Logs the run."""
        return Monitor(self.args, self.parts, self.run, self.line, self.progress, self.ranks)

    def fit(self) -> Score:
        """Train to the last step, and return the final held-out score.

        SIGINT, SIGTERM and SIGHUP (see `stop.signal`) end the run early: at once during work that
        can be repeated, otherwise after the step. The run is then saved, `resume` continues it,
        and the returned score is empty.

        Raises:
            WorkError: If a loss, gradient or score is not finite, memory is exhausted, or a
                checkpoint cannot be written.
        """
        if self.ranks.rank == 0:
            self.run.lock()
        matmul_peak(self.device.type, self.dtype)  # measured now and not during a step
        if self.ranks.divided:  # now, since the store that it needs may end with its process
            self.saver = self.saver or Saver(self.ranks)
        with self.stop.listening():
            try:
                with self.monitor.board_open():
                    score = self._run()
                    if self.saver is not None:
                        self.saver.wait()
                return score
            finally:
                if self.saver is not None and not self.stop.again:  # of a run that has failed
                    self.saver.end()
                self.run.release()

    def _run(self) -> Score:
        try:
            self._take_steps()
            if not self._asked_to_stop():
                return self._finish()
        except STOPS:  # a first signal saves the run, and a second one ends it at once
            if self.stop.signal is None or self.stop.again:
                raise
        step = self.progress.step
        if not self.finished:
            self.line.say(f"stopping at step {step}; a second signal stops at once")
        self.save(None)
        if self.finished:
            self.line.say(f"step {step}: the run is finished; --resume computes its final score")
        return Score()

    def _take_steps(self) -> None:
        progress, trace = self.progress, self.run.path / "trace.json"
        try:
            if progress.unmeasured:
                self.score_and_save()
            while not self.finished and not self._asked_to_stop():
                self.clock.before_step()
                started = time.perf_counter()
                result = self.step()  # a GPU may still work on the update
                seconds = time.perf_counter() - started
                progress.seconds += seconds
                self.log(result, seconds)
                self.line.say(self.clock.after_step(trace))
                self.score_and_save()
        finally:
            self.line.say(self.clock.close(trace))
        if self.finished and progress.step < self.args.steps:
            patience = self.args.patience
            self.line.say(
                f"step {progress.step}: no better score in {patience} measurements, stopping early"
            )

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or `patience` scores were no better than the best one."""
        patience = self.args.patience
        early = patience is not None and self.progress.stale >= patience
        return early or self.progress.step >= self.args.steps

    def _asked_to_stop(self) -> bool:
        """Return whether any rank has received a signal, so that all ranks stop at one step."""
        heard = self.ranks.largest(self.stop.signal or 0)
        if heard:  # else a signal that came during the call would be lost
            self.stop.signal = heard
        return heard > 0

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let a signal end work without communication at once, on all ranks.

        A resumed run repeats the work, because `progress.unmeasured` is stored. Ranks that call the
        model together finish the work first.
        """
        if self.ranks.divided:
            yield
            return
        try:
            with self.stop.at_once(apart=True):
                yield
        except STOPS:
            if self.stop.signal is None or self.stop.again:
                raise
        if self._asked_to_stop():
            raise_stop(self.stop.signal or 0)

    def score_and_save(self) -> None:
        """Score, sample and save after a step if each is due; `_finish` handles the last step."""
        args, progress = self.args, self.progress
        if progress.step == args.steps:
            return
        scores = args.eval_every > 0 and progress.step % args.eval_every == 0
        progress.unmeasured = True
        score = self.evaluate(args.eval_tokens) if scores else Score()
        if args.sample_every > 0 and progress.step % args.sample_every == 0:
            self.sample()
        progress.unmeasured = False
        record = self.monitor.is_record(score)
        if scores:
            progress.stale = 0 if record else progress.stale + 1
        if progress.step % args.save_every == 0 or record:
            self.save(score)

    def _finish(self) -> Score:
        """Save the last step, and score all held-out items."""
        args, held_out = self.args, self.data.held_out
        is_text = isinstance(held_out, Mapping)
        self.save(None)  # before scoring, so that a kill meanwhile does not lose the last steps
        if held_out:
            self.line.say("scoring held-out text ...")
        # The best step is chosen by scores of the same documents: the first `eval_tokens`.
        limited = args.eval_every > 0 and args.eval_tokens is not None and is_text
        score = self.evaluate(args.eval_tokens) if limited else None
        final = self.evaluate(None, key="final" if limited else "held_out")
        with self._interruptible(), self._as_saved():
            self.monitor.experts()
        self.save(score or final)
        return final

    def evaluate(self, max_tokens: int | None, key: str = "held_out") -> Score:
        """Score held-out items, and log and print the score.

        Args:
            max_tokens: Score the first documents of each text source with about this many tokens;
                None scores all. It has no effect on other data.
            key: Name of the score in metrics.jsonl.

        Returns:
            The score over all sources and ranks, which is empty if nothing is held out.
        """
        # Text is scored in the precision of the weights, as `transom eval` does.
        autocast = self._autocast() if self.args.finetune else contextlib.nullcontext()
        scores: dict[str, Score] = {}
        with self._interruptible(), self._as_saved(), autocast:
            scores = self.monitor.scores(max_tokens)
        shares = self.ranks.gathered(scores)
        named = {name: sum((share[name] for share in shares), Score()) for name in scores}
        return self.monitor.log_scores(named, key)

    def sample(self) -> None:
        """Continue the prompts of the config, and log and print the texts."""
        with self._interruptible(), self._as_saved(), self._autocast():
            self.monitor.sample()

    @contextlib.contextmanager
    def _as_saved(self) -> Iterator[None]:
        """Let the model be as a checkpoint stores it: with averaged weights and uncompiled."""
        with self._eager(), contextlib.nullcontext() if self.ema is None else self.ema.swapped():
            try:
                yield
            finally:
                between_steps(self.model)

    def log(self, result: StepResult, seconds: float) -> None:
        """Log a step that took `seconds`."""
        more: dict[str, Any] = {"learning_rates": self.optimizers.learning_rates()}
        if self.scaler.is_enabled():
            more["skipped_steps"] = self.progress.skipped_steps
        peak = self.ranks.world_size * matmul_peak(self.device.type, self.dtype)
        self.monitor.log(result, seconds, peak, more)

    def save(self, score: Score | None) -> None:
        """Write a checkpoint, which becomes the best one if `score` is the best of the run.

        Ranks that divide the model begin to write it, and the next save waits for its end.

        Raises:
            WorkError: If this checkpoint or the one before could not be written, on every rank.
        """
        best, keep = self.monitor.is_record(score), self.args.keep_last
        if best and score is not None:
            self.progress.best = score.value
        random, writer = random_states(self.ranks), self.parts.writer
        state = {
            "progress": vars(self.progress),
            "data": self.batches.state,
            "scaler": self.scaler.state_dict(),
        }
        new_step = self.run.new_step(self.progress.step, best=best, keep_last=keep)
        text = json.dumps(state, indent=2)
        with self._as_saved():
            tensors = {**self._state_tensors(), **random}
            if self.ranks.divided:
                self.saver = self.saver or Saver(self.ranks)
                self.saver.start(
                    Checkpoint(new_step, writer.write, writer.weights(), tensors, text)
                )
                return

            def write() -> None:
                with new_step as folder:
                    if folder is not None:
                        write_step(folder, writer.write, tensors, text)

            self.ranks.on_first(write)

    def _state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a resumed run needs beside the model and random states."""
        averages = {} if self.ema is None else self.ema.state_tensors()
        return {**self.optimizers.state_tensors(), **self.parts.writer.tensors(), **averages}

    def resume(self) -> None:
        """Continue from the run's latest step: weights, optimizer, data position, random state.

        Raises:
            RequestError: If a file of the step is missing, altered or of another model.
        """
        ranks = self.ranks
        share = ranks.rank, ranks.world_size
        folder, state = ranks.together(lambda: self.run.read_step(share))[ranks.rank]
        own = self._state_tensors()
        known = {name for names in ranks.each([*own]) for name in names}

        def restore() -> None:
            tensors = read_state(folder, own, known)
            take_random_states(ranks, tensors, self.args.seed, state["progress"]["step"])
            self.parts.writer.restore(folder, tensors)
            if self.ema is not None:
                self.ema.load_state_tensors(tensors)
            self.optimizers.load_state_tensors(tensors)

        ranks.together(restore)
        vars(self.progress).update(state["progress"])  # the monitor refers to the same object
        step = self.progress.step
        self.batches.load_state(state["data"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ranks.rank == 0:
            repeat = self.progress.unmeasured or step == self.args.steps
            self.run.cut_metrics(step, unmeasured=repeat)
            notice(f"{folder}: resumed at step {step} of {self.args.steps}")
        self.monitor.write({"event": "resumed"})

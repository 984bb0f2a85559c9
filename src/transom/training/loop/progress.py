"""The progress of a run, the line that shows it, and the signals that end a run early."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from transom.base.interrupts import handling, raise_stop

TWICE = 2.0  # seconds


@dataclass
class Progress:
    """What a run has done so far, which every checkpoint stores.

    Attributes:
        step: Optimizer steps.
        tokens: Trained tokens that are not padding.
        seconds: Seconds of training steps.
        best: The lowest held-out score, see `Score.value`.
        skipped_steps: Steps that changed no weight since float16 gradients overflowed.
        stale: Scores since the best one.
        unmeasured: Whether a signal came before the scores and samples of this step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    skipped_steps: int = 0
    stale: int = 0
    unmeasured: bool = False


class ProgressLine:
    """A line on standard error that is rewritten; without a terminal, a new line now and then."""

    def __init__(self, quiet: bool = False, every_seconds: float = 5.0) -> None:
        self.quiet, self.every_seconds = quiet, every_seconds
        self.terminal = sys.stderr.isatty()
        self._last = 0.0
        self._width = 0

    def show(self, text: str, *, final: bool = False) -> None:
        """Show `text` if the last one is old enough. A `final` text is always shown, and stays."""
        now = time.monotonic()
        wait = 0.1 if self.terminal else self.every_seconds
        if self.quiet or (now - self._last < wait and not final):
            return
        self._last = now
        if self.terminal:
            sys.stderr.write("\r" + text.ljust(self._width) + ("\n" if final else ""))
            self._width = 0 if final else len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def say(self, text: str | None) -> None:
        """Print a line above the progress line, if there is a text."""
        if self.quiet or not text:
            return
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        self._width = 0


def duration(seconds: float) -> str:
    """Return a duration such as `1h02m`, `3m20s` or `12s`."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class StopRequest:
    """Whether SIGINT, SIGTERM or SIGHUP has asked the run to end.

    After the first signal the trainer ends the run at the end of the step; inside `at_once` the
    signal raises KeyboardInterrupt or Terminated. The second signal always raises. One of several
    ranks may get a signal twice, from a scheduler and from the agent that has started it, so that
    a second one within `TWICE` seconds counts as the first one.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.signal: int | None = None
        self.again = False  # a second signal has come
        self._since: float | None = None  # when this process got the first signal
        self._alone = alone  # one of several ranks must not stop before the others
        self._at_once = False

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Catch the signals inside the block."""
        return handling(self._stop)

    @contextlib.contextmanager
    def at_once(self, *, apart: bool = False) -> Iterator[None]:
        """Let a signal end work that can be repeated immediately, also a signal that came before.

        With several ranks a signal does so only in work that each rank does `apart`, without
        waiting for others.
        """
        self._at_once = self._alone or apart
        try:
            if self._at_once and self.signal is not None:
                raise_stop(self.signal)
            yield
        finally:
            self._at_once = False

    def _stop(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        first, self._since = self._since, self._since or now
        if first is not None and not self._alone and now - first < TWICE:
            return
        self.again = first is not None
        self.signal = self.signal or number
        if self.again or self._at_once:
            raise_stop(number)
        # Nothing is printed here: the handler may have interrupted a write to the terminal.

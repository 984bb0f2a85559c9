"""The progress line, and the signals that end a run early."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from transom.base.interrupts import handling, raise_stop


class ProgressLine:
    """One line on standard error that renews itself; without a terminal, a new line every few
    seconds.
    """

    def __init__(self, quiet: bool = False, every_seconds: float = 5.0) -> None:
        self.quiet, self.every_seconds = quiet, every_seconds
        self.terminal = sys.stderr.isatty()
        self._last = 0.0
        self._width = 0

    def show(self, text: str, *, final: bool = False) -> None:
        """Show `text` if it is time; the `final` one always, and it stays."""
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

    def say(self, text: str) -> None:
        """A line of its own, above the progress line."""
        if self.quiet:
            return
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        self._width = 0


def duration(seconds: float) -> str:
    """`1h02m`, `3m20s` or `12s`."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class StopRequest:
    """Whether SIGINT, SIGTERM or SIGHUP has asked the run to end.

    After the first signal the trainer ends the run at the end of the step; inside `at_once` the
    signal raises KeyboardInterrupt or Terminated. The second signal always raises.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.signal: int | None = None
        self.again = False  # a second signal has come
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
        self.again = self.signal is not None
        self.signal = self.signal or number
        if self.again or self._at_once:
            raise_stop(number)
        # Nothing is printed here: the handler may have interrupted a write to the terminal.

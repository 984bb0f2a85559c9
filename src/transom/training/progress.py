"""The progress line, and the signals that end a run early."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class ProgressLine:
    """One line on standard error that renews itself; without a terminal, a new line every few seconds."""

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
    """Whether SIGINT or SIGTERM has asked the run to end; the second one ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch both signals inside the block; outside the main thread signals are somebody else's."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = {number: signal.signal(number, self._stop) for number in numbers}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number  # nothing else: a handler may have interrupted a write to the terminal

"""Signals that end a command, and calls that must not delay its end. No torch."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

T = TypeVar("T")

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Terminated(BaseException):
    """Raised by SIGTERM and SIGHUP in the main thread, as KeyboardInterrupt by SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


STOPS = (KeyboardInterrupt, Terminated)


def raise_stop(number: int, _frame: object = None) -> NoReturn:
    """Raise KeyboardInterrupt or `Terminated` for a signal. This is a signal handler."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)


def exit_code(stop: BaseException) -> int:
    """Return 128 plus the number of the signal that raised `stop`, as shells do."""
    return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def handling(
    handler: Callable[[int, Any], None], signals: tuple[int, ...] = STOP_SIGNALS
) -> Iterator[None]:
    """Call `handler` for the stop signals inside the block.

    A signal that this process was started to ignore (`nohup`) stays ignored. Outside the main
    thread, where signals cannot be handled, the block runs without the handler.
    """
    before: dict[int, Any] = {}
    try:
        for number in signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)


class Background(Generic[T]):
    """A call that runs in its own thread, such as a native one that does not return to Python.

    The main thread can be interrupted while it waits for the `result`.
    """

    _running: ClassVar[set[Background[Any]]] = set()

    def __init__(self, call: Callable[[], T]) -> None:
        self._future: Future[T] = Future()
        self._running.add(self)
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._future.set_result(call())
        except BaseException as error:
            self._future.set_exception(error)
        finally:
            self._running.discard(self)

    def result(self, seconds: float = math.inf) -> T:
        """Wait for the call and return its value, or raise its error.

        Raises:
            TimeoutError: If it takes longer than `seconds`.
        """
        end = time.monotonic() + seconds
        while not self._future.done():
            if time.monotonic() > end:
                raise TimeoutError
            wait([self._future], timeout=0.1)  # without a limit, some systems cannot interrupt it
        return self._future.result()


def leave_background_calls(code: int) -> None:
    """End the process at once if a background call is still running.

    A regular exit could abort inside the call.
    """
    if Background._running:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

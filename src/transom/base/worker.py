"""A child process that answers JSON requests in bounded time and memory. No torch.

A limit inside the calling process cannot stop a computation in C, and signals need the main thread.
The child process is ended by an alarm whose default action needs no Python, and has a limit on its
address space.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from transom.base.errors import WorkError


class Worker:
    """A child process that runs a module whose `main` calls `serve`.

    The process starts with the first request, and again after a request that ended it. Any thread
    may call `ask`, and a forked process starts a child of its own.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def ask(self, request: Any, seconds: float) -> Any:
        """Return the answer to a request.

        Args:
            request: Data that JSON can represent.
            seconds: The time after which the process is ended.

        Returns:
            The answer, or None if a signal ended the process before, such as its alarm.

        Raises:
            WorkError: If the process ended by itself, such as for a missing library.
        """
        with self._lock:
            line = ""
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps([seconds, request]) + "\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                code = 0 if line.endswith("\n") else process.wait()
            finally:
                if not line.endswith(
                    "\n"
                ):  # also after an interrupt: no later request may read this answer
                    self.close()
        if code > 0:
            raise WorkError(f"the process {self._module} ended with exit code {code}")
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError), self._process:
                self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps modules of the working directory from replacing those of the standard library.
        command = [sys.executable, "-P", "-m", self._module]
        paths = os.pathsep.join(map(os.path.abspath, sys.path))
        # Ctrl-C is for the parent, which may still need answers while it stops.
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,
        )

    def _forget(self) -> None:
        self._lock, self._process = threading.Lock(), None


def serve(answer: Callable[[Any], Any], memory_bytes: int) -> None:
    """Answer the requests of a `Worker` until its input ends. This runs in the child process.

    An answer that takes too long ends the process. One that needs more memory raises `MemoryError`,
    except on systems that do not enforce the limit (macOS).
    """
    with contextlib.suppress(ValueError, OSError):  # not enforced here, or a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for line in sys.stdin:
        seconds, request = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply = json.dumps(answer(request))
        except MemoryError:  # outside of what `answer` catches
            signal.raise_signal(signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()

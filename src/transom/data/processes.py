"""Work on many items in several processes, with results in the order of the items.

The processes are started by a command of their own, not by `multiprocessing`, because that would
run the user's script again, or copy the threads and locks of torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any, TypeVar

from transom.base.errors import WorkError

WORKER = "from transom.data.processes import serve; serve()"
T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() or 1 if affinity is None else len(affinity(0))


def mapped(work: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """Yield `work(item)` for each item, in order.

    Each process has at most one item, so the items are read as they are needed.

    Args:
        work: A function that can be pickled. With one process it is called in this one.
        items: Items that can be pickled.
        processes: How many processes work, 1 or more.

    Raises:
        WorkError: A process ended.
    """
    if processes == 1:
        yield from map(work, items)
        return
    command = [sys.executable, "-P", "-c", WORKER]
    # Libraries of tokenizers would start a thread for each core in each process.
    env = {**os.environ, "RAYON_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": env}
    workers = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    try:
        for worker in workers:
            _send(worker, work)
        busy: deque[Any] = deque()
        for worker, item in zip(cycle(workers), items, strict=False):
            if len(busy) == processes:
                yield _receive(busy.popleft())
            _send(worker, item)
            busy.append(worker)
        while busy:
            yield _receive(busy.popleft())
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _send(worker: Any, value: object) -> None:
    with contextlib.suppress(BrokenPipeError):  # `_receive` reports that the process has ended
        pickle.dump(value, worker.stdin)
        worker.stdin.flush()


def _receive(worker: Any) -> Any:
    try:
        return pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError):
        message = f"a process that encodes examples ended with status {worker.wait()}"
        raise WorkError(message) from None


def serve() -> None:
    """Read a function and items from standard input, and write the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write into the pipe
    work = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(EOFError):
        while True:
            item = pickle.load(sys.stdin.buffer)
            with contextlib.redirect_stderr(io.StringIO()):  # the parent prints the notices
                result = work(item)
            pickle.dump(result, out)
            out.flush()

"""Processes on this machine that communicate through gloo, in bounded time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from transom.base.errors import WorkError

SECONDS = 300  # within which all ranks must have finished
AFTER_FAILURE = 30  # seconds that ranks have to end after one has failed


def run_ranks(work: Callable[..., object], ranks: int, folder: Path, *args: Any) -> None:
    """Call `work(rank, *args)` on each rank of a process group.

    On Linux the processes are forked, so that nothing is imported again. Each computes on one
    thread, since a pool of threads does not survive a fork.

    Args:
        work: The function. Its results are what it writes.
        ranks: Number of processes.
        folder: An empty folder for the store of the process group and for errors.
        *args: Further arguments.

    Raises:
        WorkError: If a rank fails or does not finish. Ranks that wait for it are then ended.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [
        context.Process(target=_rank, args=(work, rank, ranks, folder, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end, running = time.monotonic() + SECONDS, list(processes)
    try:
        while running and (left := end - time.monotonic()) > 0:
            multiprocessing.connection.wait([process.sentinel for process in running], left)
            running = [process for process in running if process.exitcode is None]
            if any(process.exitcode for process in processes):
                end = min(end, time.monotonic() + AFTER_FAILURE)
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [path for path in folder.glob("error*") if path.read_text()]
    if errors:  # the others have lost the first rank that failed
        first = min(errors, key=lambda path: path.stat().st_mtime_ns)
        raise WorkError(f"rank {first.name.removeprefix('error')}: {first.read_text()}")
    codes = [process.exitcode for process in processes]  # -9 did not finish in time
    if any(codes):
        raise WorkError(f"ranks: ended with the exit codes {codes}")


def _rank(
    work: Callable[..., object], rank: int, ranks: int, folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        work(rank, *args)
        dist.barrier()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    dist.destroy_process_group()

"""Runs a function on several ranks, which are processes that communicate through gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 240  # within which all ranks must have finished


def run_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """Return what `work(*args)` returns on each rank.

    Processes are forked, so that nothing is imported again. Each computes on one thread, since a
    pool of threads does not survive a fork.
    """
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(work, rank, ranks, folder, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert not errors, errors[0]
    assert not any(process.exitcode for process in processes), "a rank died or was too slow"
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(ranks)]


def _rank(work: Callable[..., Any], rank: int, ranks: int, folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        (folder / f"rank{rank}").write_bytes(pickle.dumps(work(*args)))
        dist.barrier()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    dist.destroy_process_group()

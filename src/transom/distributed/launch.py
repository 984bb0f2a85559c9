"""How processes become the ranks of one run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from transom.config.parallel_args import ParallelArgs
from transom.distributed.mesh import Meshes

TIMEOUT = timedelta(minutes=10)  # of one call that waits for the other ranks


@contextlib.contextmanager
def joined(args: ParallelArgs, device: torch.device) -> Iterator[Meshes | None]:
    """Join the process group that the environment of torchrun describes.

    Args:
        args: How the ranks share the model.
        device: Device of this rank.

    Yields:
        The ranks, or None if this process was started alone.

    Raises:
        RequestError: If the degrees do not multiply out to the number of ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        args.resolved(1)
        yield None
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Meshes.make(args, device.type)
    finally:
        dist.destroy_process_group()

"""Copies between the host and a device that work through a queue, without waiting for the queue.

A copy is queued from or into page-locked memory. The host waits for an event only when it reads
the numbers. On the CPU there is no queue, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def runs_ahead(device: torch.device) -> bool:
    """Return whether a device works through a queue while the host goes on."""
    return device.type == "cuda"


def to_host(ids_B: Tensor) -> Callable[[], list[int]]:
    """Start to copy integers [B] to the host, and return a function that waits for them."""
    if not ids_B.is_cuda:
        return ids_B.tolist
    host_B = torch.empty_like(ids_B, device="cpu", pin_memory=True)
    host_B.copy_(ids_B, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return host_B.tolist()

    return wait


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A tensor of the host goes to a GPU without waiting for it."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

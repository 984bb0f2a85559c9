"""How much memory a device has taken."""

import torch

from transom.base import runtime


def test_mps_tells_the_most_that_was_seen(monkeypatch):
    seen = iter([3, 9, 4, 5])
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: next(seen))
    mps = torch.device("mps")
    runtime.reset_peak_memory(mps)
    assert [runtime.memory_bytes(mps) for _ in range(3)] == [3, 9, 9]
    runtime.reset_peak_memory(mps)
    assert runtime.memory_bytes(mps) == 5
    runtime.reset_peak_memory(mps)


def test_a_gpu_counts_its_peak_anew(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    runtime.reset_peak_memory(torch.device("cuda", 1))
    runtime.reset_peak_memory(torch.device("cpu"))
    assert reset == [torch.device("cuda", 1)]

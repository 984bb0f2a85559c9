"""How much memory a device has taken."""

import sys
import textwrap

import pytest
import torch

from tests.helpers import run_python
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


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_a_process_counts_neither_its_parent_nor_what_was_before_a_reset():
    code = """
        import torch
        from transom.base.runtime import memory_bytes, reset_peak_memory
        cpu = torch.device("cpu")
        print(memory_bytes(cpu))
        torch.ones(1 << 26)
        print(memory_bytes(cpu))
        reset_peak_memory(cpu)
        print(memory_bytes(cpu))
    """
    large = torch.ones(1 << 27)
    first, most, last = map(int, run_python(textwrap.dedent(code)).split())
    assert first < large.nbytes
    assert last + (1 << 27) < most < first + (1 << 29)

"""The time of each part of a step, as a table and as a trace for a timeline viewer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from transom.base.runtime import synchronize


class StepClock:
    """Measures the parts of the first `profile_steps` steps; 0 measures nothing.

    It waits for the device at the end of each part, but only while it measures.
    """

    PARTS = ("data", "prepare", "forward", "loss", "backward", "optimizer")

    def __init__(self, device: torch.device, profile_steps: int = 0) -> None:
        self.device, self.profile_steps = device, profile_steps
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        self.steps = 0
        # It records from the first step on: what runs before does not count.
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`, and label it in the trace."""
        if self._profiler is None:
            yield
            return
        synchronize(self.device)
        start = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start

    def before_step(self) -> None:
        """Start recording at the first step."""
        if self.profile_steps and self.steps == 0:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def after_step(self, trace: Path) -> str | None:
        """Count a step. After the last profiled one, write the trace and return the table."""
        self.steps += 1
        return self.close(trace) if self.steps >= self.profile_steps else None

    def close(self, trace: Path) -> str | None:
        """Write the trace and return the table; None if there is none, or it was written before."""
        if self._profiler is None or self.steps == 0:
            return None
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(trace))
        self._profiler = None
        return f"{self.table()}\ntrace: {trace} (open in Perfetto or chrome://tracing)"

    def table(self) -> str:
        """Return a table of the mean milliseconds and the share of each part."""
        total = sum(self.seconds.values()) or 1.0
        rows = [
            f"  {name:10} {1000 * seconds / max(1, self.steps):9.2f} ms  {seconds / total:6.1%}"
            for name, seconds in self.seconds.items()
        ]
        return "\n".join([f"mean of {self.steps} steps:", *rows])

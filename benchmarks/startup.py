"""Seconds of a complete process: what a user waits before anything happens."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import torch

CASES = {
    "transom --help": ([sys.executable, "-m", "transom", "--help"], 0.3),
    "import transom": ([sys.executable, "-c", "import transom"], 0.2),
    "transom inspect llama3-8b": ([sys.executable, "-m", "transom", "inspect", "llama3-8b"], 1.0),
    "python -c pass": ([sys.executable, "-c", "pass"], None),
}


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return the median of seven interleaved runs each; the last row is Python's own start."""
    del device
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(7):
        for name, (command, _) in CASES.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "benchmark": "start-up",
            "case": name,
            "seconds": round(statistics.median(seconds[name]), 3),
            "target": limit and f"at most {limit} s",
        }
        for name, (_, limit) in CASES.items()
    ]

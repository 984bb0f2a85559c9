"""Interleaved timing, and rows that state where they were measured."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from transom import __version__
from transom.base.runtime import machine, synchronize

# Of the instructions of a CPU, those that decide on the speed of products.
INSTRUCTIONS = ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon")
ROWS = Path(__file__).parent / "rows.jsonl"


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, float]:
    """Return the median seconds of each case.

    Every round calls each case once, so that a change of the machine's speed affects all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        # Every other round in reverse: who comes second finds memory that the first has just given
        # back.
        for name, call in list(cases.items())[:: 1 if turn % 2 else -1]:
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def stamp(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with machine, versions, commit and date."""
    where = machine()
    known = torch.cpu.get_capabilities()
    processor = ", ".join((str(where["processor"]), *(n for n in INSTRUCTIONS if known.get(n))))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        **row,
        "transom": __version__,
        "torch": where["torch"],
        "processor": where["gpu"] or processor,
        "threads": where["threads"],
        "commit": commit or None,
        "date": datetime.now(UTC).date().isoformat(),
    }

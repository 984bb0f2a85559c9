"""Speed of Muon's orthogonalisation against the float32 matrix product, measured in turn in one run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from transom.training.muon import matrices_per_batch, orthogonalize, orthogonalize_flops

STEPS = 4
REPEATS = 9
PEAK_SIZES = (1024, 1536, 2048)
# (case, matrices of that shape in the model, out, in)
CASES = (
    ("demo attention", 16, 128, 128),
    ("demo up", 12, 512, 128),
    ("demo down", 12, 128, 512),
    ("110m attention", 24, 768, 768),
    ("110m up", 24, 2048, 768),
    ("110m down", 12, 768, 2048),
)


def rows() -> list[dict[str, Any]]:
    """One row per shape: seconds and GFLOP/s of one batch as the optimizer forms it, and the ratio."""
    return [_row(*case) for case in CASES]


def _row(case: str, matrices: int, out_features: int, in_features: int) -> dict[str, Any]:
    count = min(matrices, matrices_per_batch(out_features * in_features, "cpu"))
    flops = count * orthogonalize_flops(out_features, in_features, STEPS, torch.float32)
    x_NOI = torch.randn(count, out_features, in_features)
    squares = [torch.randn(size, size) for size in PEAK_SIZES]
    # Short cases are repeated, so that one time covers as much work as one of the products does.
    calls = max(1, 2 * PEAK_SIZES[0] ** 3 // flops)
    # The best of each: other work on the machine only ever adds time, and adds most to short products.
    seconds, peak = math.inf, 0.0
    for _ in range(REPEATS):
        seconds = min(seconds, _seconds(lambda: orthogonalize(x_NOI, STEPS), calls))
        for square in squares:
            rate = 2 * len(square) ** 3 / _seconds(lambda square=square: square @ square, 1)
            peak = max(peak, rate)
    return {
        "benchmark": "muon",
        "case": f"{case} {count} x [{out_features}, {in_features}]",
        "seconds": seconds,
        "gflops": flops / seconds / 1e9,
        "peak_gflops": peak / 1e9,
        "ratio": flops / seconds / peak,
    }


def _seconds(work: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))

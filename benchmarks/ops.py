"""Products of few rows in C++ against PyTorch's, with the share of the memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved
from transom.base.runtime import bfloat16_is_fast, read_bandwidth
from transom.ops.products import multiply
from transom.ops.weights import Weight, coded_weight, dense_weight
from transom.quantize import ggml
from transom.verify.ops import random_parts

# Outputs and inputs: a projection of a 1b model, and one and the output of SmolLM2.
SHAPES = ((5632, 2048), (1536, 576), (49152, 576))
ROWS = (1, 8, 32)
KINDS = ("bfloat16", "Q8_0", "Q4_0")
TOGETHER = 3  # weights of one call, as queries, keys and values are
READ = 96 << 20  # bytes of all copies of a weight, more than the caches have


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per kind of weight, shape and number of rows.

    x is bfloat16 where the processor is fast at it, and otherwise float32.
    """
    dtype = torch.bfloat16 if bfloat16_is_fast(device.type) else torch.float32
    bandwidth = read_bandwidth(device.type)
    return [
        row
        for outputs, inputs in SHAPES
        for count in ROWS
        for row in _rows(outputs, inputs, torch.randn(count, inputs).to(dtype), bandwidth)
    ]


def _rows(outputs: int, inputs: int, x: torch.Tensor, bandwidth: float) -> list[dict[str, Any]]:
    calls, sizes = {}, {}
    for kind in KINDS:
        one, size = _native(kind, outputs, inputs)
        copies = [_native(kind, outputs, inputs)[0] for _ in range(READ // size)] + [one]
        groups = [copies[i : i + TOGETHER] for i in range(0, len(copies), TOGETHER)]
        calls[kind] = _over([lambda some=some: multiply(x, some) for some in groups])
        sizes[kind] = size
    for dtype in (torch.float32, torch.bfloat16):
        size = outputs * inputs * dtype.itemsize
        dense = [torch.randn(outputs, inputs).to(dtype) for _ in range(READ // size + 1)]
        of_x = x.to(dtype)
        name = f"PyTorch {str(dtype).removeprefix('torch.')}"
        calls[name] = _over([lambda weight=one, of_x=of_x: F.linear(of_x, weight) for one in dense])
        sizes[name] = size
    device = torch.device("cpu")
    passes = interleaved(calls, device, rounds=7)
    seconds = {name: passes[name] / (READ // sizes[name] + 1) for name in calls}
    peers = [name for name in calls if name not in KINDS]
    return [
        {
            "benchmark": "products of few rows",
            "case": f"{kind}, {outputs} x {inputs}, {len(x)} rows",
            "microseconds": round(seconds[kind] * 1e6, 1),
            **{f"ratio to {peer}": round(seconds[peer] / seconds[kind], 2) for peer in peers},
            "GB/s": round(sizes[kind] / seconds[kind] / 1e9, 1),
            "share of bandwidth": round(sizes[kind] / seconds[kind] / bandwidth, 2),
            "GFLOP/s": round(2 * outputs * inputs * len(x) / seconds[kind] / 1e9, 1),
        }
        for kind in KINDS
    ]


def _native(kind: str, outputs: int, inputs: int) -> tuple[Weight, int]:
    """Return a random weight and its bytes."""
    if kind == "bfloat16":
        made = dense_weight(torch.randn(outputs, inputs).bfloat16(), None)
        assert made is not None, "its dtype is covered"
        return made, 2 * outputs * inputs
    format = ggml.TYPES[kind].format
    parts = random_parts((outputs, inputs), format)
    made = coded_weight(parts, format.levels, format.scales, format.block, None, torch.bfloat16)
    assert made is not None, "its format is covered"
    return made, sum(part.nbytes for part in parts.values())


def _over(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """Return a function that calls all of them, so that no weight stays in the caches."""

    def run() -> None:
        for call in calls:
            call()

    return run

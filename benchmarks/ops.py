"""Products of few rows in C++ against PyTorch's, with the share of the memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved
from transom.base.runtime import bfloat16_is_fast, read_bandwidth
from transom.ops.products import multiply
from transom.ops.weights import Weight, coded_weight, dense_weight
from transom.quantize import ggml
from transom.quantize.tiles import fits_tiles, in_tiles
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
    return [
        row
        for outputs, inputs in SHAPES
        for row in _rows(outputs, inputs, dtype, read_bandwidth(device.type))
    ]


def _rows(
    outputs: int, inputs: int, dtype: torch.dtype, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shape."""
    native = {kind: _copies(kind, outputs, inputs) for kind in KINDS}
    dense = {}
    for of in (torch.float32, torch.bfloat16):
        number = READ // (outputs * inputs * of.itemsize) + 1
        one = torch.randn(outputs, inputs).to(of)
        dense[f"PyTorch {str(of).removeprefix('torch.')}"] = [one.clone() for _ in range(number)]
    for count in ROWS:
        x = torch.randn(count, inputs).to(dtype)
        calls: dict[str, Callable[[], object]] = {}
        for kind, (weights, _) in native.items():
            calls[kind] = partial(_multiply, x, weights)
        for name, tensors in dense.items():
            calls[name] = partial(_linear, x.to(tensors[0].dtype), tensors)
        passes = interleaved(calls, torch.device("cpu"))
        numbers = {name: len(tensors) for name, tensors in dense.items()}
        numbers |= {kind: len(weights) for kind, (weights, _) in native.items()}
        seconds = {name: passes[name] / numbers[name] for name in calls}
        for kind, (_, size) in native.items():
            rate = size / seconds[kind]
            yield {
                "benchmark": "products of few rows",
                "case": f"{kind}, {outputs} x {inputs}, rows: {count}",
                "microseconds": round(seconds[kind] * 1e6, 1),
                **{f"ratio to {peer}": round(seconds[peer] / seconds[kind], 2) for peer in dense},
                "GB/s": round(rate / 1e9, 1),
                "share of bandwidth": round(rate / bandwidth, 2),
                "GFLOP/s": round(2 * outputs * inputs * count / seconds[kind] / 1e9, 1),
            }


def _copies(kind: str, outputs: int, inputs: int) -> tuple[list[Weight], int]:
    """Return copies of a random weight, too large together for the caches, and bytes of one."""
    if kind == "bfloat16":
        tensor = torch.randn(outputs, inputs).bfloat16()
        size = tensor.nbytes
        made = [dense_weight(tensor.clone(), None) for _ in range(READ // size + 1)]
    else:
        format = ggml.TYPES[kind].format
        kept = format.levels, format.scales, format.block, None, torch.bfloat16
        parts = random_parts((outputs, inputs), format)
        size = sum(part.nbytes for part in parts.values())
        made = []
        for _ in range(READ // size + 1):
            own = {name: part.clone() for name, part in parts.items()}
            # As a decode plan does.
            made.append(
                coded_weight(in_tiles(own, format) if fits_tiles(own, format) else own, *kept)
            )
    return [one for one in made if one is not None], size


def _multiply(x: torch.Tensor, weights: list[Weight]) -> None:
    for first in range(0, len(weights), TOGETHER):
        multiply(x, weights[first : first + TOGETHER])


def _linear(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)

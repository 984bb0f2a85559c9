"""Speed of Muon's orthogonalization against float32 matrix products of the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import interleaved
from transom.base.runtime import synchronize
from transom.config.presets import preset
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning.counts import flops_per_token
from transom.training.losses.cross_entropy import cross_entropy_sum
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.muon import (
    Muon,
    default_compute_dtype,
    matrices_per_batch,
    orthogonalize,
)
from transom.training.optim.optimizers import build_optimizer

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


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per shape, and Muon's share of a training step of the demo."""
    return [*(_row(device, *case) for case in CASES), _share(device)]


def _row(
    device: torch.device, case: str, matrices: int, out_features: int, in_features: int
) -> dict[str, Any]:
    count = min(matrices, matrices_per_batch(out_features * in_features, device.type))
    dtype = default_compute_dtype(device)
    flops = count * orthogonalize_flops(out_features, in_features, STEPS, dtype)
    x_NOI = torch.randn(count, out_features, in_features, device=device)
    squares = [torch.randn(size, size, device=device, dtype=dtype) for size in PEAK_SIZES]
    # Short cases are repeated, so that one time covers as much work as one of the products does.
    calls = max(1, 2 * PEAK_SIZES[0] ** 3 // flops)
    # The best of each: other work on the machine only ever adds time, and adds most to short
    # products.
    seconds, peak = math.inf, 0.0
    for _ in range(REPEATS):
        seconds = min(seconds, _seconds(lambda: orthogonalize(x_NOI, STEPS, dtype), calls, device))
        for square in squares:
            rate = 2 * len(square) ** 3 / _seconds(lambda square=square: square @ square, 1, device)
            peak = max(peak, rate)
    return {
        "benchmark": "muon",
        "case": f"{case} {count} x [{out_features}, {in_features}]",
        "peer": "square matrix products",
        "milliseconds": round(1e3 * seconds, 3),
        "gflops": round(flops / seconds / 1e9, 1),
        "peak_gflops": round(peak / 1e9, 1),
        "ratio": round(flops / seconds / peak, 3),
        "target": 0.6,
    }


def orthogonalize_flops(out_features: int, in_features: int, steps: int, dtype: torch.dtype) -> int:
    """Return the floating-point operations of the products of `orthogonalize` for one matrix."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(1, out_features, in_features, device="meta"), steps, dtype)
    return counter.get_total_flops()


def _share(device: torch.device) -> dict[str, Any]:
    """Return Muon's share of the time and the arithmetic of a demo step on 1,024 tokens."""
    model = LLM(preset("demo"))
    model.init_weights()
    model.to(device)
    optimizers = build_optimizer(model, OptimizerArgs(name="muon"), device_type=device.type)
    tokens = torch.randint(model.args.vocab_size, (4, 257), device=device)

    def forward_backward() -> None:
        optimizers.zero_grad()
        logits = model(TransformerInput(tokens[:, :-1].contiguous())).logits
        (cross_entropy_sum(logits, tokens[:, 1:]) / 1024).backward()

    (muon,) = (one for one in optimizers.all if isinstance(one, Muon))
    others = [one for one in optimizers.all if one is not muon]
    forward_backward()
    cases = {
        "muon": muon.step,
        "adamw": lambda: [one.step() for one in others],
        "forward and backward": forward_backward,
    }
    seconds = interleaved(cases, device, rounds=REPEATS)
    dtype = default_compute_dtype(device)
    own = sum(
        orthogonalize_flops(*weight.shape[-2:], STEPS, dtype)
        for name, weight in model.named_parameters()
        if name.startswith("layers.") and weight.ndim == 2
    )
    step = 1024 * flops_per_token(model.args, 256, training=True)
    return {
        "benchmark": "muon",
        "case": "share of a demo step, 1,024 tokens",
        "milliseconds": round(1e3 * seconds["muon"], 3),
        "share_of_time": round(seconds["muon"] / sum(seconds.values()), 3),
        "share_of_arithmetic": round(own / (own + step), 3),
    }


def _seconds(work: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls

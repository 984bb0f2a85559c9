"""Decoding SmolLM2-135M with weights in each format that Transom writes, in C++ and in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import interleaved
from transom.base.runtime import bfloat16_is_fast, read_bandwidth
from transom.cache.model_cache import ModelCache
from transom.checkpoints.load import load
from transom.inference.decode_plan import decode_plan
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM, Runner
from transom.ops.build import SWITCH
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import dequantize_model, quantized_leaves, replace_weight
from transom.quantize.methods import quantize_model

ORDERED = "int4, act-order"
CASES = {
    "int4": QuantizeArgs(kind="int4"),
    "int4, zero points": QuantizeArgs(kind="int4", zero_points=True),
    ORDERED: QuantizeArgs(kind="int4"),
    "nf4": QuantizeArgs(kind="nf4"),
    "fp4": QuantizeArgs(kind="fp4"),
    "int8": QuantizeArgs(kind="int8"),
    "int8, one scale per output": QuantizeArgs(kind="int8", group=0),
    "fp8": QuantizeArgs(kind="fp8"),
    "fp8, one scale per output": QuantizeArgs(kind="fp8", group=0),
}
CACHED = 64  # tokens in the cache
STEPS = {"C++": 16, "PyTorch": 2}  # of a measurement


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per format: tokens per second in C++, and its ratios. The output is dense."""
    dtype = "bfloat16" if bfloat16_is_fast(device.type) else "float32"
    calls: dict[str, dict[str, Callable[[], object]]] = {path: {} for path in STEPS}
    sizes = {}
    for case, args in CASES.items():
        for path, count in STEPS.items():
            model = load("smollm2", str(device), dtype)
            quantize_model(model, args)
            if case == ORDERED:
                _reorder(model)
            sizes[case] = sum(part.nbytes for part in model.parameters())
            cache, tokens = model.make_cache(1), torch.arange(CACHED, device=device)[None] + 1000
            model(TransformerInput(tokens), cache, inference=True)
            runner = decode_plan(model) if path == "C++" else None
            calls[path][case] = partial(_steps, model, cache, runner, count)
    seconds = {path: interleaved(calls[path], device) for path in STEPS}
    ours, peers = ({case: STEPS[path] / seconds[path][case] for case in CASES} for path in STEPS)
    bandwidth = read_bandwidth(device.type)
    return [
        {
            "benchmark": "generation: formats of weights",
            "case": case,
            "tokens/s": round(ours[case], 1),
            "ratio to int4": round(ours[case] / ours["int4"], 2),
            "ratio to PyTorch": round(ours[case] / peers[case], 1),
            "share of bandwidth": round(ours[case] * sizes[case] / bandwidth, 2),
        }
        for case in CASES
    ]


def _steps(model: LLM, cache: ModelCache, runner: Runner | None, count: int) -> None:
    """Decode some tokens, in PyTorch without a runner, and take them back."""
    one = torch.full((1, 1), 1000, device=model.device)
    before = os.environ.get(SWITCH, "1")
    os.environ[SWITCH] = "0" if runner is None else "1"
    try:
        for _ in range(count):
            model(TransformerInput(one, logits="last"), cache, inference=True, runner=runner)
    finally:
        os.environ[SWITCH] = before
    cache.rollback(count, at_most=count)


@torch.no_grad()
def _reorder(model: LLM) -> None:
    """Put the columns of the codes in another order, as GPTQ with act-order leaves them."""
    for leaf in quantized_leaves(model).values():
        order = torch.randperm(leaf.shape[-1], generator=torch.Generator().manual_seed(0))
        form, parts = replace(leaf.format, ordered=True), {**leaf.parts, "order": order.int()}
        replace_weight(dequantize_model(leaf), parts, form)  # type: ignore[arg-type]

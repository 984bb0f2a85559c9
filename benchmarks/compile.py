"""A training step with compiled blocks against the same step without compilation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleaved
from benchmarks.training_step import BATCH, LENGTH, SHAPES
from transom.base.runtime import pick_dtype
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.training.loop.blocks import arrange_blocks
from transom.training.losses.cross_entropy import head_loss
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer

# Packed rows whose documents differ from step to step, as in training: no lengths may be compiled
# in.
PACKINGS = (((200, 312), (512,)), ((100, 100, 312), (256, 256)), ((511, 1), (17, 495)))


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return rows for the 110m shape in the dtype that a run would choose here, and in float32."""
    picked = pick_dtype("auto", device)
    others = [] if picked == torch.float32 or device.type == "cuda" else [torch.float32]
    return [_case(dtype, dtype == picked, device) for dtype in (picked, *others)]


def _case(dtype: torch.dtype, picked: bool, device: torch.device) -> dict[str, Any]:
    torch.compiler.reset()
    batch = BATCH * (8 if device.type == "cuda" else 1)
    steps = {name: _step(name == "ours", batch, dtype, device) for name in ("ours", "peer")}
    start = time.perf_counter()
    for _ in PACKINGS:
        steps["ours"]()
    first = time.perf_counter() - start
    seconds = interleaved(steps, device, rounds=5, warmup=2)
    return {
        "benchmark": "compile",
        "case": f"110m, {batch} x {LENGTH}, packed, {str(dtype).removeprefix('torch.')}",
        "peer": "the same step, not compiled",
        "seconds": round(seconds["ours"], 3),
        "peer_seconds": round(seconds["peer"], 3),
        "ratio": round(seconds["peer"] / seconds["ours"], 3),
        "target": 1.05
        if picked
        else None,  # in float32 on a CPU nearly all of a step is matrix products
        "seconds_of_the_first_three_steps": round(first, 1),
    }


def _step(
    compiled: bool, batch: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    args = ModelArgs.from_dict(SHAPES["110m"])
    model = LLM(args)
    model.init_weights(0)
    model.to(device).train()
    arrange_blocks(model, compiled=compiled)
    optimizers = build_optimizer(model, OptimizerArgs(), device_type=device.type)
    tokens = torch.randint(args.vocab_size, (batch, LENGTH + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    half = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    turn = 0

    def step() -> None:
        nonlocal turn
        sizes = PACKINGS[turn % len(PACKINGS)] * (batch // 2)
        turn += 1
        with half:
            hidden = model(TransformerInput(inputs, sizes=sizes, logits="none")).hidden_BTD
            loss = head_loss(model, hidden, targets) / targets.numel()
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()

    return step

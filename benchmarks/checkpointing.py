"""Activation checkpointing: memory and time of a forward and backward for every choice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleaved
from benchmarks.head_loss import cuda_peak_mib, resident_peak_mib, subprocess_peak_mib
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.training.loop.blocks import OFFLOAD_MIN_BYTES, arrange_blocks
from transom.training.losses.cross_entropy import head_loss

SHAPE: dict[str, Any] = {
    "dim": 512,
    "n_layers": 12,
    "n_heads": 8,
    "n_kv_heads": 4,
    "hidden_dim": 1408,
    "vocab_size": 4096,
    "max_seq_len": 1024,
}
BATCH, LENGTH = 2, 1024
CHOICES = ("none", "selective", "every-2", "full")
OFFLOADED = ("none, offloaded", "full, offloaded")


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per choice: memory above weights and gradients, and seconds."""
    choices = CHOICES + OFFLOADED * (device.type == "cuda")
    calls = {choice: _step(choice, device) for choice in choices}
    seconds = interleaved(calls, device, rounds=5)
    if device.type == "cuda":
        mib = {choice: cuda_peak_mib(call) for choice, call in calls.items()}
    else:
        del calls
        mib = {
            choice: subprocess_peak_mib("benchmarks.checkpointing", choice) for choice in choices
        }
    return [
        {
            "benchmark": "activation checkpointing",
            "case": choice,
            "peer": f"none; {SHAPE['n_layers']} layers, dim {SHAPE['dim']}, {BATCH} x {LENGTH:,} "
            f"tokens",
            "mib": mib[choice],
            "memory_share": round(mib[choice] / mib["none"], 2),
            "seconds": round(seconds[choice], 3),
            "ratio": round(seconds["none"] / seconds[choice], 2),
        }
        for choice in choices
    ]


def _step(choice: str, device: torch.device) -> Callable[[], None]:
    """Return a forward and backward that adds to existing gradients, as in accumulation."""
    model = LLM(ModelArgs(**SHAPE))
    model.init_weights(0)
    model.to(device).train()
    how, _, offloaded = choice.partition(", ")
    arrange_blocks(
        model, checkpointing=how, offload_min_bytes=OFFLOAD_MIN_BYTES if offloaded else None
    )
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight).fill_(0.0)
    tokens = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH), device=device)
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    def step() -> None:
        with half:
            hidden = model(TransformerInput(tokens, logits="none")).hidden_BTD
            loss = head_loss(model, hidden, tokens)
        loss.backward()

    return step


if __name__ == "__main__":
    print(json.dumps(resident_peak_mib(_step(sys.argv[1], torch.device("cpu")))))

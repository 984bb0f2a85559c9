"""Training steps of models of 1B parameters on a GPU: dense, with experts, and in 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleaved
from transom.base.runtime import matmul_peak
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning.counts import flops_per_token, parameters
from transom.quantize import scaled
from transom.training.loop.blocks import arrange_blocks
from transom.training.loop.float8 import use_float8
from transom.training.losses.cross_entropy import head_loss
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer

DENSE = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 16,
    "n_kv_heads": 8,
    "hidden_dim": 8192,
    "vocab_size": 32_000,
    "max_seq_len": 4096,
    "rope_layout": "halves",
}
# Two of eight experts with half the hidden features each: as many active parameters as the dense.
EXPERTS = {"num_experts": 8, "top_k": 2, "hidden_dim": 4096}
ROWS, LENGTH = 4, 2048


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per kind of step, with the step of the dense model as its peer."""
    if device.type != "cuda":
        return []
    cases = {"dense": _step(device), "experts": _step(device, moe_args=EXPERTS)}
    if scaled.works(device):
        cases["float8"] = _step(device, float8=True)
    seconds = interleaved(cases, device, rounds=5, warmup=3)
    args, tokens = ModelArgs.from_dict(DENSE), ROWS * LENGTH
    flops = flops_per_token(args, LENGTH, training=True) * tokens
    peak = matmul_peak(device.type, torch.bfloat16)
    return [
        {
            "benchmark": "training step of 1B",
            "case": case,
            "peer": "dense, bfloat16",
            "parameters": parameters(args),
            "tokens_per_second": round(tokens / took, 1),
            "ratio": round(seconds["dense"] / took, 3),
            "mfu": round(flops / took / peak, 3),
            "target": {"dense": 0.45, "experts": 0.8}.get(case),
        }
        for case, took in seconds.items()
    ]


def _step(device: torch.device, float8: bool = False, **changes: Any) -> Callable[[], object]:
    """Return a training step of a compiled model under autocast, with AdamW."""
    model = LLM(ModelArgs.from_dict({**DENSE, **changes})).to(device)
    if float8:
        use_float8(model, device, torch.bfloat16)
    arrange_blocks(model, compiled=True)
    optimizers = build_optimizer(model, OptimizerArgs(), device_type=device.type)
    tokens = torch.randint(model.args.vocab_size, (ROWS, LENGTH + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            hidden_BTD = model(TransformerInput(inputs, logits="none")).hidden_BTD
            loss = head_loss(model, hidden_BTD, targets) / targets.numel()
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()

    return step

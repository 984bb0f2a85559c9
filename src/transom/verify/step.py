"""A training step that is split into micro-batches equals the step in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from transom.training.config import TrainArgs
from transom.training.loop.setup import open_run
from transom.verify.findings import Finding, close
from transom.verify.tiny_runs import in_folder, quiet, temporary_corpus, tiny_run

MICRO_BATCHES = (2, 4)
# The same sums in another order, in float32: 1e-7. A mean of the means of the parts differs by
# 1e-3.
TOLERANCE = 1e-5


def check() -> Iterator[Finding]:
    """Compare loss and gradient norm of two steps, of a dense model and of one with experts."""
    experts = {"moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 16}}
    with temporary_corpus() as folder:
        args = tiny_run(folder, "run")
        assert isinstance(args.model, dict), "tiny_run gives the fields of its model"
        for name, fields in (("dense", {}), ("experts", experts)):
            run = replace(args, model={**args.model, **fields})
            expected = _two_steps(run, folder, f"{name}-1", 1)
            for count in MICRO_BATCHES:
                measured = _two_steps(run, folder, f"{name}-{count}", count)
                for what, value in measured.items():
                    case = f"{name}, {what}, {count} micro-batches"
                    detail = f"{value.tolist()} instead of {expected[what].tolist()}"
                    yield close(
                        "micro-batches = one batch", case, value, expected[what], TOLERANCE, detail
                    )


def _two_steps(args: TrainArgs, folder: Path, name: str, count: int) -> dict[str, Tensor]:
    """Return the loss and the gradient norm of two steps in `count` micro-batches, [2] each."""
    with quiet():
        trainer = open_run(replace(in_folder(args, folder, name), accumulate=count), quiet=True)
        # Initial weights give every token the same loss, and then every mean is the same.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        results = [trainer.step() for _ in range(2)]
    losses, norms = ([one.loss for one in results], [one.grad_norm for one in results])
    return {"loss": torch.tensor(losses), "gradient norm": torch.tensor(norms)}

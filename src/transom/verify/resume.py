"""A run that is interrupted and resumed equals a run without interruptions, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.base.errors import expect
from transom.base.files import read_json
from transom.training.config import TrainArgs
from transom.training.loop.setup import open_run
from transom.training.loop.trainer import Trainer
from transom.verify.findings import Finding, difference, exact
from transom.verify.targets import run_args
from transom.verify.tiny_runs import in_folder, quiet, small_run, temporary_corpus, tiny_run

STEPS = 6
DROPOUT = 0.1

# All that the next step of a run depends on: part, then name, then value.
History = Mapping[str, Mapping[str, Tensor]]


def check(model: str | None = None, *, steps: int = STEPS) -> Iterator[Finding]:
    """Compare a small copy of a run or model, or a built-in run without one.

    Args:
        model: A run folder or config, or the name of a model for a run with default settings.
        steps: The steps of each run.

    Raises:
        RequestError: If the run is one of fine-tuning, or if there are fewer than three steps.
    """
    expected = "3 or more, since two interruptions need a step before and after each"
    expect(steps >= 3, "--steps", steps, expected)
    args = None if model is None else run_args(model)
    if args is not None:
        expected = "a run that trains a model; `verify finetune` resumes fine-tuning"
        expect(args.finetune is None, "finetune", "settings", expected)
    with temporary_corpus() as folder:
        built_in = tiny_run(folder, "run", steps=steps, ema_decay=0.9)
        run = built_in if args is None else small_run(args, folder, steps)
        yield from compare_resumed(run, folder, steps)


def compare_resumed(args: TrainArgs, folder: Path, steps: int) -> Iterator[Finding]:
    """Compare runs of `steps` steps with one and with two interruptions to one without."""
    with quiet():
        straight = history(args, folder, "straight", [steps])
    # `dtype: auto` times a step of each new run, and may choose another dtype for the next run.
    args = replace(args, dtype=read_json(folder / "straight" / "run.json")["dtype"])
    half, third = steps // 2, steps // 3
    for name, parts in (
        ("one interruption", [half, steps - half]),
        ("two interruptions", [third, third, steps - 2 * third]),
    ):
        with quiet():
            resumed = history(args, folder, name.replace(" ", "-"), parts)
        case = f"{' + '.join(map(str, parts))} steps"
        yield from compare_histories(f"{name} = none", case, resumed, straight)


def history(args: TrainArgs, folder: Path, name: str, parts: list[int]) -> History:
    """Train a run, and save and resume it between the parts.

    The model drops features at random, so that the steps depend on the random state.

    Args:
        args: The settings of the run.
        folder: A folder with a corpus.
        name: The name of the run's folder.
        parts: The steps of each part.
    """
    losses: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for index, steps in enumerate(parts):
        trainer = open_run(in_folder(args, folder, name), resume=index > 0, quiet=True)
        trainer.model.norm.register_forward_pre_hook(_dropout)
        for _ in range(steps):
            result, step = trainer.step(), f"step {len(losses) + 1}"
            losses[step] = torch.tensor(result.loss, dtype=torch.float64)
            norms[step] = torch.tensor(result.grad_norm, dtype=torch.float64)
        trainer.save(None)
    averages: dict[str, Tensor] = {}
    if trainer.ema is not None:
        with trainer.ema.swapped():
            averages = _weights(trainer)
    optimizer = {name: x.clone() for name, x in trainer.optimizers.state_tensors().items()}
    position = {name: torch.tensor(value) for name, value in trainer.batches.state.items()}
    return {
        "losses": losses,
        "gradient norms": norms,
        "weights": _weights(trainer),
        "averaged weights": averages,
        "optimizer state": optimizer,
        "data position": position,
        "random state": {"of torch": torch.get_rng_state()},
    }


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def _dropout(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (F.dropout(inputs[0], DROPOUT, module.training), *inputs[1:])


def compare_histories(
    comparison: str, case: str, resumed: History, straight: History
) -> Iterator[Finding]:
    """Yield one finding for each part of two histories."""
    for part, expected in straight.items():
        measured = resumed[part]
        errors = {
            name: difference(measured[name], expected[name])
            if name in measured and name in expected
            else math.inf
            for name in {**expected, **measured}
        }
        first = next((name for name, error in errors.items() if error), "")
        error = max(errors.values(), default=0.0)
        yield exact(comparison, f"{part}, {case}", error, f"first in {first}")

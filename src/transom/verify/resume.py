"""An interrupted run equals a straight one, bit for bit; a step cut into pieces equals one in one
piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.base.errors import require
from transom.base.files import read_json
from transom.training.config import TrainArgs
from transom.training.loop.setup import open_run
from transom.training.loop.trainer import Trainer
from transom.verify.findings import Finding, difference
from transom.verify.tiny_runs import in_folder, quiet, small_run, temporary_corpus, tiny_run

STEPS = 6
PIECES = (2, 4)
# The same sums in another order, float32: measured 1e-7; a mean per micro-batch is off by 1e-3.
STEP_TOLERANCE = 1e-5
NOISE = 0.1  # share of features dropped, so that a step depends on the random state


@dataclass(frozen=True)
class History:
    """What a run was and became: losses and gradient norms by step, then all its state."""

    losses: Tensor
    grad_norms: Tensor
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]  # empty without ema_decay
    optimizer: dict[str, Tensor]
    data: dict[str, int]
    random: Tensor


def check_resume() -> Iterator[Finding]:
    """The built-in run."""
    with temporary_corpus() as folder:
        yield from compare_resumed(
            tiny_run(folder, "run", steps=STEPS, ema_decay=0.9), folder, STEPS
        )


def compare_resumed_run(args: TrainArgs, steps: int) -> Iterator[Finding]:
    """A shrunken copy of a real run."""
    require(
        steps >= 3,
        "--steps",
        steps,
        "expected 3 or more: two interruptions need a step on either side",
    )
    with temporary_corpus() as folder:
        yield from compare_resumed(small_run(args, folder, steps), folder, steps)


def compare_resumed(args: TrainArgs, folder: Path, steps: int) -> Iterator[Finding]:
    """`steps` straight, against one and two interruptions: everything bit-equal, so every tolerance
    is 0.
    """
    third = max(1, steps // 3)
    with quiet():
        straight = history(args, folder, "straight", [steps])
    # `dtype: auto` times a step of each new run, and may choose differently for the next one.
    args = replace(args, dtype=read_json(folder / "straight" / "run.json")["dtype"])
    for name, parts in (
        ("one interruption", [steps // 2, steps - steps // 2]),
        ("two interruptions", [third, third, steps - 2 * third]),
    ):
        with quiet():
            mine = history(args, folder, name.replace(" ", "-"), parts)
        where = f"{' + '.join(map(str, parts))} steps"
        yield from judge(f"{name} = none", where, mine, straight)


def history(args: TrainArgs, folder: Path, name: str, parts: list[int]) -> History:
    """Train in as many sittings as there are `parts`; each ends with a checkpoint and forgets
    everything else.
    """
    losses: list[float] = []
    norms: list[float] = []
    trainer = None
    for sitting, steps in enumerate(parts):
        trainer = open_run(in_folder(args, folder, name), resume=sitting > 0, quiet=True)
        trainer.model.norm.register_forward_pre_hook(_noise)
        for _ in range(steps):
            result = trainer.step()
            losses.append(result.loss)
            norms.append(result.grad_norm)
        trainer.save(None)
    assert trainer is not None, "a history has one sitting or more"
    return state_of(trainer, losses, norms)


def state_of(trainer: Trainer, losses: list[float], norms: list[float]) -> History:
    """Copies of all that the next step would depend on."""

    def weights() -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}

    averages: dict[str, Tensor] = {}
    if trainer.ema is not None:
        with trainer.ema.swapped():
            averages = weights()
    return History(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(norms, dtype=torch.float64),
        weights(),
        averages,
        {name: x.clone() for name, x in trainer.optimizers.state_tensors().items()},
        dict(trainer.batches.state),
        torch.get_rng_state(),
    )


def judge(comparison: str, where: str, mine: History, expected: History) -> Iterator[Finding]:
    """One finding for each part of what a run was and became."""

    def finding(what: str, error: float, detail: str) -> Finding:
        return Finding(comparison, f"{what}, {where}", error, 0.0, detail if error else "")

    for what, x, y in (
        ("losses", mine.losses, expected.losses),
        ("gradient norms", mine.grad_norms, expected.grad_norms),
    ):
        bad = (x != y).nonzero()
        yield finding(what, difference(x, y), f"first at step {int(bad[0]) + 1 if len(bad) else 0}")
    for what, ours, theirs in (
        ("weights", mine.weights, expected.weights),
        ("averaged weights", mine.averages, expected.averages),
        ("optimizer state", mine.optimizer, expected.optimizer),
    ):
        missing = sorted(set(ours) ^ set(theirs))
        gaps = {name: difference(ours[name], theirs[name]) for name in ours if name in theirs}
        worst = max(gaps, key=gaps.__getitem__, default="")
        error = float("inf") if missing else gaps.get(worst, 0.0)
        yield finding(what, error, f"{missing[0] if missing else worst} differs most")
    moved = float(mine.data != expected.data)
    yield finding("data position", moved, f"{mine.data} instead of {expected.data}")
    drawn = float(not torch.equal(mine.random, expected.random))
    yield finding("random state", drawn, "another state of torch's generator")


def _noise(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Dropout in front of the last norm: stands for all that draws at random in training."""
    return (F.dropout(inputs[0], NOISE, module.training), *inputs[1:])


def check_step() -> Iterator[Finding]:
    """Two steps in one piece against the same rows in micro-batches, with and without experts."""
    with temporary_corpus() as folder:
        args = tiny_run(folder, "run")
        assert isinstance(args.model, dict), "tiny_run writes it out"
        moe = {"num_experts": 4, "top_k": 2, "hidden_dim": 16}
        for name, model in (("dense", args.model), ("experts", {**args.model, "moe_args": moe})):
            yield from compare_pieces(replace(args, model=model), folder, name)


def compare_pieces(args: TrainArgs, folder: Path, name: str) -> Iterator[Finding]:
    """Losses and gradient norms, which hold the balancing loss of experts too."""
    with quiet():
        whole = pieces(args, folder, f"{name}-1", 1)
    for count in PIECES:
        with quiet():
            mine = pieces(args, folder, f"{name}-{count}", count)
        for what, x, y in zip(("loss", "gradient norm"), mine, whole, strict=True):
            error = difference(x, y)
            detail = "" if error <= STEP_TOLERANCE else f"{x.tolist()} instead of {y.tolist()}"
            where = f"{name}, {what}, {count} pieces"
            yield Finding("micro-batches = one batch", where, error, STEP_TOLERANCE, detail)


def pieces(args: TrainArgs, folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    """(losses, gradient norms) of two steps cut into `count` micro-batches."""
    trainer = open_run(replace(in_folder(args, folder, name), accumulate=count), quiet=True)
    with (
        torch.no_grad()
    ):  # initial weights predict every token alike, and any mean of equal losses is the same
        generator = torch.Generator().manual_seed(1)
        for weight in trainer.model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    results = [trainer.step() for _ in range(2)]
    return torch.tensor([one.loss for one in results]), torch.tensor(
        [one.grad_norm for one in results]
    )

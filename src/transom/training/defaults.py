"""Rows per step, packing and epochs that a config leaves open, chosen by the rows of the run. No
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import require
from transom.data.chat.packing import first_fit_decreasing
from transom.training.config import DEFAULT_ROWS, TrainArgs
from transom.training.finetune.args import FinetuneArgs

ENOUGH_STEPS = 100  # batches become larger only while a run has this many steps
FEW_STEPS = 30  # a run with fewer gets a warning
PASSES, MOST_PASSES = 3.0, 10.0  # over the rows by default, and at most for a small set
MOST_ROWS = 16
MOST_QUESTIONS = 8  # of grpo, which draws a group of answers for each
PACKABLE = ("sft", "distill")
# The fewest items per step that an objective learns well from. Preferences and rewards compare
# items, and kto estimates from a step how far the policy has moved.
FEWEST = {"dpo": 2, "ipo": 2, "orpo": 2, "grpo": 2, "kto": 4}


@dataclass(frozen=True)
class RowChoice:
    """How the examples of a run are laid into steps.

    Attributes:
        batch_size: Rows of one step over all ranks.
        packs: The examples of each row if several share one, otherwise None.
        rows: Rows of one epoch.
        epochs: Passes over the rows; None if the config has a number of steps.
        steps: Optimizer steps.
        reason: One line on what was chosen; None if the config decides everything.
        fill: The share of the packed rows that has tokens.
    """

    batch_size: int
    packs: Sequence[Sequence[int]] | None
    rows: int
    epochs: float | None
    steps: int
    reason: str | None
    fill: float = 1.0

    @property
    def packing(self) -> bool:
        """Return whether examples share a row."""
        return self.packs is not None


def choose_rows(
    lengths: Sequence[int] | NDArray[np.int64],
    *,
    seq_len: int,
    objective: str = "sft",
    epochs: float | Literal["auto"] | None = None,
    steps: int = 1000,
    batch_size: int | None = None,
    packing: bool | None = None,
    shares: int = 1,
    seed: int = 0,
) -> RowChoice:
    """Return how the examples with these lengths in tokens are laid into steps.

    Packing and large batches make steps efficient, and few. Both are chosen only where the run
    still has `ENOUGH_STEPS` (or its given `steps`); a small set gets rows of one example and small
    batches. A `batch_size` or `packing` that is given stays as it is, except that no step takes
    more rows than there are. `epochs: auto` are 3, or more for a set so small that these would be
    too few steps. `shares` is ranks times micro-batches: the batch is a multiple of it.
    """
    fewest, open_epochs = FEWEST.get(objective, 1), epochs == "auto"
    if epochs == "auto":
        needed = -(-ENOUGH_STEPS * fewest // max(len(lengths), 1))
        epochs = min(max(PASSES, float(needed)), MOST_PASSES)
    passes, wanted = (epochs, ENOUGH_STEPS) if epochs is not None else (PASSES, steps)
    most = MOST_QUESTIONS if objective == "grpo" else MOST_ROWS
    packs: list[list[int]] | None = None
    if objective in PACKABLE and packing is not False:
        packs = first_fit_decreasing(lengths, seq_len, seed)
        if packing is None and passes * len(packs) / (batch_size or most) < wanted:
            packs = None
    packed = packs is not None
    rows = len(lengths) if packs is None else len(packs)
    fits = max(rows // shares, 1) * shares
    chosen = batch_size
    if chosen is None:
        chosen = power_of_two_below(passes * rows / wanted)
        chosen = min(max(chosen, fewest), most)
        chosen = -(-chosen // shares) * shares
    size = min(chosen, fits)
    steps = steps if epochs is None else steps_of(rows, size, epochs)
    parts = []
    if batch_size is None or size != batch_size:
        parts.append(f"data.batch_size = {size}")
    if packing is None and objective in PACKABLE:
        parts.append(f"finetune.packing = {str(packed).lower()}")
    if open_epochs:
        parts.append(f"finetune.epochs = {epochs:g}")
    reason = None
    if parts:
        laid = f"{len(lengths):,} examples" + (f" in {rows:,} packed rows" if packed else "")
        count = f"{steps:,} steps" + (" as given" if epochs is None else "")
        asked = (
            f"; {batch_size} rows were asked for"
            if batch_size is not None and size != batch_size
            else ""
        )
        reason = f"chosen: {', '.join(parts)} for {laid}, {count}{asked}"
    fill = sum(lengths) / (rows * seq_len) if packed else 1.0
    return RowChoice(size, packs, rows, epochs, steps, reason, fill)


def finetune_rows(
    lengths: Sequence[int] | NDArray[np.int64], args: TrainArgs, finetune: FinetuneArgs, ranks: int
) -> RowChoice:
    """Return `choose_rows` of a config."""
    return choose_rows(
        lengths,
        seq_len=args.data.seq_len,
        objective=finetune.objective,
        epochs=finetune.epochs,
        steps=args.steps,
        batch_size=args.data.batch_size,
        packing=finetune.packing,
        shares=ranks * args.accumulate,
        seed=args.seed,
    )


def require_comparable(choice: RowChoice, objective: str, ranks: int) -> None:
    """Refuse batches of one row for kto, which compares every answer with that of another row."""
    if objective == "kto":
        expected = "valid only for kto are 2 or more of each rank"
        require(choice.batch_size >= 2 * ranks, "data.batch_size", choice.batch_size, expected)


def head_rows(
    rows: int, kind: Literal["classification", "embedding"], given: int | None, shares: int
) -> int:
    """Return the labelled lines of a step: as given, or the usual number or all that there are.

    Lines of an embedding are compared with the others of their step, so that there have to be more.
    """
    if given is not None:
        return given
    usual = DEFAULT_ROWS if kind == "classification" else 4 * DEFAULT_ROWS
    return max(min(usual, rows) // shares, 1) * shares


def steps_of(rows: int, batch_size: int, epochs: float) -> int:
    """Return the optimizer steps of so many passes over `rows`."""
    return max(1, -int(-epochs * rows // batch_size))


def power_of_two_below(number: float) -> int:
    """Return the largest power of two that is at most `number`, and at least 1."""
    return 1 << max(int(number).bit_length() - 1, 0)


def few_steps_warning(steps: int) -> str | None:
    """Return a line about a run that is too short to learn much, or None."""
    if steps >= FEW_STEPS:
        return None
    return (
        f"{steps} optimizer steps: models rarely learn from fewer than about {FEW_STEPS}; more "
        f"finetune.epochs or steps, a smaller data.batch_size or finetune.packing = false give more"
    )

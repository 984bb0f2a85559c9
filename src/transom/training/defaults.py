"""Rows per step, packing and epochs, chosen by the data if a config leaves them open. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import expect
from transom.data.chat.packing import first_fit_decreasing
from transom.planning.tables import counted
from transom.training.config import DEFAULT_ROWS, TrainArgs

ENOUGH_STEPS = 100  # batches become larger only while a run has this many steps
FEW_STEPS = 30  # a run with fewer gets a warning
PASSES, MOST_PASSES = 3.0, 10.0  # default epochs, and at most for a small set
MOST_ROWS = 16  # of a step
MOST_QUESTIONS = 8  # of a step of grpo, which generates a group of answers for each
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
    lengths: Sequence[int] | NDArray[np.int64], args: TrainArgs, ranks: int = 1
) -> RowChoice:
    """Return how the examples of a fine-tuning run are laid into steps.

    Packing and large batches make steps efficient but few. Both are chosen only if the run still
    has `ENOUGH_STEPS` (or its given `steps`). A small set gets rows of one example and small
    batches. Epochs `auto` are 3, or more for a set so small that these would be too few steps. A
    step takes no more rows than there are, and a multiple of ranks times micro-batches.

    Args:
        lengths: Tokens of each example.
        args: The config of the run.
        ranks: Number of ranks.

    Raises:
        RequestError: If a step of kto has a single row.
    """
    finetune, seq_len, batch_size = args.finetune_settings, args.data.seq_len, args.data.batch_size
    objective, packing, epochs = finetune.objective, finetune.packing, finetune.epochs
    shares = ranks * args.accumulate
    fewest, is_auto = FEWEST.get(objective, 1), epochs == "auto"
    if epochs == "auto":
        needed = -(-ENOUGH_STEPS * fewest // max(len(lengths), 1))
        epochs = min(max(PASSES, float(needed)), MOST_PASSES)
    passes, wanted = (epochs, ENOUGH_STEPS) if epochs is not None else (PASSES, args.steps)
    most = MOST_QUESTIONS if objective == "grpo" else MOST_ROWS
    packs: list[list[int]] | None = None
    if objective in PACKABLE and packing is not False:
        packs = first_fit_decreasing(lengths, seq_len, args.seed)
        if packing is None and passes * len(packs) / (batch_size or most) < wanted:
            packs = None
    rows = len(lengths) if packs is None else len(packs)
    size = batch_size
    if size is None:
        size = min(max(_power_of_two(passes * rows / wanted), fewest), most)
        size = -(-size // shares) * shares
    size = min(size, max(rows // shares, 1) * shares)
    # kto compares every answer with that of another row.
    expect(objective != "kto" or size > 1, "data.batch_size", size, "2 or more with kto")
    steps = args.steps if epochs is None else steps_of(rows, size, epochs)
    chosen = {
        f"data.batch_size = {size}": size != batch_size,
        f"finetune.packing = {str(packs is not None).lower()}": packing is None
        and objective in PACKABLE,
        f"finetune.epochs = {epochs}".removesuffix(".0"): is_auto,
    }
    reason = ", ".join(words for words, is_chosen in chosen.items() if is_chosen)
    if reason:
        packed = "" if packs is None else f" in {counted(rows, 'packed row')}"
        given = " as given" if epochs is None else ""
        sizes = f"{counted(len(lengths), 'example')}{packed}, {counted(steps, 'step')}{given}"
        reason = f"chosen: {reason} for {sizes}"
        if batch_size not in (None, size):
            reason += f"; {batch_size} rows were asked for"
    fill = 1.0 if packs is None else sum(lengths) / (rows * seq_len)
    return RowChoice(size, packs, rows, epochs, steps, reason or None, fill)


def head_rows(
    rows: int, kind: Literal["classification", "embedding"], given: int | None, shares: int
) -> int:
    """Return the labelled lines of a step: as given, or a default, or all if there are fewer.

    The default is larger for an embedding, whose lines are compared with the others of their step.
    """
    if given is not None:
        return given
    usual = DEFAULT_ROWS if kind == "classification" else 4 * DEFAULT_ROWS
    return max(min(usual, rows) // shares, 1) * shares


def steps_of(rows: int, batch_size: int, epochs: float) -> int:
    """Return the optimizer steps of `epochs` passes over `rows`."""
    return max(1, -int(-epochs * rows // batch_size))


def _power_of_two(number: float) -> int:
    """Return the largest power of two that is at most `number`, and at least 1."""
    return 1 << max(int(number).bit_length() - 1, 0)


def few_steps_warning(steps: int) -> str | None:
    """Return a line about a run that is too short to learn much, or None."""
    if steps >= FEW_STEPS:
        return None
    return (
        f"{steps} optimizer steps: models rarely learn from fewer than about {FEW_STEPS}; raise "
        f"finetune.epochs or steps, lower data.batch_size or set finetune.packing = false"
    )

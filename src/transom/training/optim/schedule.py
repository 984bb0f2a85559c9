"""Learning-rate schedules: the fraction of the peak rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transom.base.errors import require
from transom.base.fields import describe


@dataclass(frozen=True)
class ScheduleArgs:
    """How the learning rate moves; `wsd` is warmup, stable, linear decay (Hu et al. 2024,
    MiniCPM).
    """

    kind: Literal["wsd", "linear", "cosine", "constant"] = describe(
        "wsd", "shape after the warm-up"
    )
    warmup: float = describe(0.03, "linear rise to the peak", "fraction of the steps")
    decay: float = describe(0.7, "length of the final decay; wsd only", "fraction of the steps")
    final: float = describe(
        0.02, "rate of the last step; not used by constant", "fraction of the peak"
    )

    def __post_init__(self) -> None:
        kinds = ("wsd", "linear", "cosine", "constant")
        require(self.kind in kinds, "kind", self.kind, f"expected one of {', '.join(kinds)}")
        for name in ("warmup", "decay", "final"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "expected a number from 0 to 1")
        if self.kind == "wsd":
            room = 1 - self.warmup
            # The slack admits pairs such as 0.3 and 0.7, whose sum is above 1 by rounding only.
            expected = (
                f"expected at most {room:g}, what warmup = {self.warmup:g} leaves of the steps"
            )
            require(self.decay <= room + 1e-9, "decay", self.decay, expected)


def lr_scale(step: int, total_steps: int, args: ScheduleArgs) -> float:
    """Fraction of the peak rate at `step`, counted from 0 to `total_steps` - 1; outside:
    `RequestError`.
    """
    require(total_steps >= 1, "total_steps", total_steps, "expected a whole number from 1")
    require(0 <= step < total_steps, "step", step, f"expected 0 to {total_steps - 1}")
    warmup_steps = max(1, round(args.warmup * total_steps)) if args.warmup > 0 else 0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = _decay_steps(total_steps, warmup_steps, args)
    decayed = step + 1 - (total_steps - decay_steps)
    if decayed <= 0:
        return 1.0
    done = decayed / decay_steps
    if args.kind == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return (1 - done) + done * args.final


def _decay_steps(total_steps: int, warmup_steps: int, args: ScheduleArgs) -> int:
    after_warmup = total_steps - warmup_steps
    if args.kind == "constant":
        return 0
    if args.kind == "wsd":
        return min(round(args.decay * total_steps), after_warmup)
    return after_warmup

"""Learning-rate schedules: the fraction of the peak rate as a function of the step. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transom.base.errors import expect
from transom.base.fields import check_bounds, describe

Kind = Literal["wsd", "linear", "cosine", "constant"]
_SHARE: dict[str, Any] = {"at_least": 0.0, "at_most": 1.0}


@dataclass(frozen=True)
class ScheduleArgs:
    """How the learning rate changes.

    `wsd` is a warm-up, a stable phase and a linear decay (Hu et al. 2024, MiniCPM).
    """

    kind: Kind = describe("wsd", "shape after the warm-up")
    warmup: float = describe(0.03, "linear rise to the peak", "fraction of the steps", **_SHARE)
    decay: float = describe(
        0.7, "length of the final decay; wsd only", "fraction of the steps", **_SHARE
    )
    final: float = describe(
        0.02, "rate of the last step; not used by constant", "fraction of the peak", **_SHARE
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        kinds = get_args(Kind)
        expect(self.kind in kinds, "kind", self.kind, f"one of {', '.join(kinds)}")
        room = 1 - self.warmup
        # The slack admits pairs such as 0.3 and 0.7, whose sum is above 1 by rounding only.
        fits = self.kind != "wsd" or self.decay <= room + 1e-9
        expected = f"at most {room:g}, the steps after warmup = {self.warmup:g}"
        expect(fits, "decay", self.decay, expected)


def lr_scale(step: int, total_steps: int, args: ScheduleArgs) -> float:
    """Return the fraction of the peak rate at `step`, counted from 0.

    Raises:
        RequestError: If `step` is not between 0 and `total_steps` - 1.
    """
    expect(total_steps >= 1, "total_steps", total_steps, "1 or more")
    expect(0 <= step < total_steps, "step", step, f"0 to {total_steps - 1}")
    warmup_steps = max(1, round(args.warmup * total_steps)) if args.warmup > 0 else 0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = total_steps - warmup_steps
    if args.kind == "wsd":
        decay_steps = min(round(args.decay * total_steps), decay_steps)
    decayed = step + 1 - (total_steps - decay_steps)
    if args.kind == "constant" or decayed <= 0:
        return 1.0
    done = decayed / decay_steps
    if args.kind == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return (1 - done) + done * args.final

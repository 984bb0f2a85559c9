"""Settings of the optimizer. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from transom.base.errors import expect
from transom.base.fields import check_bounds, describe

_RATE: dict[str, Any] = {"above": 0.0, "below": math.inf}
_FRACTION: dict[str, Any] = {"at_least": 0.0, "below": 1.0}


@dataclass(frozen=True)
class OptimizerArgs:
    """Which optimizer trains which parameters, and at which peak learning rates."""

    name: Literal["adamw", "muon"] = describe(
        "adamw", "optimizer of the matrices of blocks; AdamW trains all other parameters"
    )
    lr: float = describe(3e-4, "peak learning rate of AdamW", **_RATE)
    betas: tuple[float, float] = describe(
        (0.9, 0.95), "AdamW: decay of the two running means", **_FRACTION
    )
    eps: float = describe(1e-8, "AdamW: added to the denominator", **_RATE)
    weight_decay: float = describe(
        0.1,
        "decoupled decay of everything but vectors",
        "per unit of learning rate",
        at_least=0.0,
        below=math.inf,
    )
    muon_lr: float = describe(0.02, "peak learning rate of Muon", **_RATE)
    muon_momentum: float = describe(0.95, "Muon: decay of the running mean", **_FRACTION)
    muon_steps: int = describe(
        4,
        "Muon: orthogonalisation steps; 4 is cheap, 7 nearly exact",
        "steps",
        at_least=1,
        at_most=7,
    )
    embedding_lr: float | None = describe(
        None, "peak learning rate of tok_embeddings; null: lr", **_RATE
    )
    output_lr: float | None = describe(
        None, "peak learning rate of an untied output matrix; null: lr", **_RATE
    )
    norm_lr: float | None = describe(
        None, "peak learning rate of norms, biases and scalars; null: lr", **_RATE
    )
    max_grad_norm: float | None = describe(
        1.0, "clip gradients to this global norm; null: no clipping", **_RATE
    )
    state_bits: Literal[32, 8] = describe(
        32, "AdamW: bits of a running mean; with 8, embeddings and small weights keep 32"
    )
    in_backward: bool = describe(
        False, "update each weight as soon as it has its gradient, which is then freed; no clipping"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        expect(self.name in ("adamw", "muon"), "name", self.name, "adamw or muon")
        expect(self.state_bits in (32, 8), "state_bits", self.state_bits, "32 or 8")

    def check_in_backward(
        self, accumulate: int = 1, *, ranks: int = 1, scaled: bool = False
    ) -> None:
        """Refuse `in_backward` together with what needs all gradients at once.

        Args:
            accumulate: Micro-batches of a step.
            ranks: Number of ranks.
            scaled: Whether float16 gradients are scaled.
        """
        needs = {
            "max_grad_norm = null": self.max_grad_norm is not None,
            "accumulate = 1": accumulate != 1,
            "one rank": ranks != 1,
            "a dtype other than float16": scaled,
        }
        expected = " and ".join(words for words, wrong in needs.items() if wrong)
        refused = self.in_backward and bool(expected)
        expect(not refused, "optimizer.in_backward", self.in_backward, f"with {expected}")

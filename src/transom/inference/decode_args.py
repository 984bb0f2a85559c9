"""How a model runs while it generates.

Every field of `DecodeArgs` is an argument of `generate()` and a flag of `transom generate` and
`transom chat`. This module does not import torch, so that flags are read quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from transom.base.fields import check_bounds, describe


@dataclass(frozen=True)
class DecodeArgs:
    """How a model runs while it generates. No field changes which tokens are likely.

    Raises:
        RequestError: A value is out of its bounds.
    """

    prefill_step_size: int = describe(
        512,
        "prompt tokens per forward call; it limits memory, not the result",
        "tokens",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_bounds(self)


DEFAULT = DecodeArgs()

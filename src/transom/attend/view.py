"""What a layer's attention reads: keys and values with the absolute position of every slot."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """How raw query-key products become attention scores; `scale` None means head_dim ** -0.5."""

    scale: float | None = None


@dataclass(frozen=True)
class CacheView:
    """Slots a query may be compared with: `states` (k, v) each [B, S, K, H], and their positions [B, S].

    Position -1 marks an empty slot. `new_at` is the slot from which the call's own tokens stand in order,
    or None when they stand anywhere (a ring that has been written through).
    """

    states: tuple[Tensor, ...]
    positions_BS: Tensor
    segments_BS: Tensor | None = None
    new_at: int | None = None

    def dense(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The states as plain tensors, and the positions of their slots."""
        return self.states, self.positions_BS

    @property
    def only_new(self) -> bool:
        """Whether the view holds the call's own tokens and nothing else."""
        return self.new_at == 0

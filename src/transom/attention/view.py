"""What a layer's attention reads: keys and values with the absolute position of every slot."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScoreArgs:
    """How raw query-key products become attention scores; `scale` None means head_dim ** -0.5.

    `softcap` turns a scaled score s into cap * tanh(s / cap) before the mask (Gemma 2). `sinks_N`
    is one logit per query head that joins the softmax as an extra key without a value, neither
    scaled nor capped (gpt-oss).
    """

    scale: float | None = None
    softcap: float | None = None
    sinks_N: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scores are scaled products and nothing else."""
        return self.softcap is None and self.sinks_N is None

    def scale_for(self, head_dim: int) -> float:
        """The factor on raw products: `scale`, or head_dim ** -0.5 where none was given."""
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class CacheView:
    """Slots a query may be compared with: `states` (k, v) each [B, S, K, H], and their positions
    [B, S].

    Position -1 marks an empty slot. `new_at` is the slot from which the call's own tokens stand in
    order, or None when they stand anywhere (a ring that has been written through).
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

"""What the attention of a layer reads: scores, and keys and values with their positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScoreArgs:
    """How products of queries and keys become attention scores.

    Attributes:
        scale: The factor on products; None is head_dim ** -0.5.
        softcap: A scaled score s becomes cap * tanh(s / cap) before the mask (Gemma 2,
            arXiv 2408.00118).
        sinks_N: One logit [N] per query head that joins the softmax as a key without a value. It is
            neither scaled nor capped (gpt-oss, arXiv 2508.10925).
    """

    scale: float | None = None
    softcap: float | None = None
    sinks_N: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scores are scaled products, without a soft cap and sinks."""
        return self.softcap is None and self.sinks_N is None

    def scale_for(self, head_dim: int) -> float:
        """Return the factor on products of this head dim."""
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class CacheView:
    """The slots that the queries of a call may attend to.

    Attributes:
        states: (keys, values), each [B, S, K, H].
        positions_BS: int64 [B, S], the absolute position of every slot; -1 marks an empty one.
        segments_BS: int [B, S], the document of every slot, where rows are packed.
        new_at: The slot from which the tokens of the call itself follow in order. None if they are
            elsewhere, as in a ring.
    """

    states: tuple[Tensor, ...]
    positions_BS: Tensor
    segments_BS: Tensor | None = None
    new_at: int | None = None

    def dense(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the states as plain tensors, and the positions of their slots."""
        return self.states, self.positions_BS

    @property
    def only_new(self) -> bool:
        """Whether the view consists of the tokens of the call itself."""
        return self.new_at == 0

"""What one forward call shares between layers. The model builds it once, and all blocks read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from transom.attention.backends import Attend
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView
from transom.config.layer_args import LayerRule, RopeArgs, TemperatureArgs


@dataclass(frozen=True)
class Context:
    """What cross-attention reads.

    Attributes:
        states_BSC: States [B, S, C].
        positions_BS: Their positions int64 [B, S]; -1 is padding.
    """

    states_BSC: Tensor
    positions_BS: Tensor


@dataclass(frozen=True)
class Step:
    """The positions of one call and everything derived from them.

    Layers look up their entries by their arguments, so equal layers share them.

    Attributes:
        positions_BT: int64 [B, T]; -1 is padding.
        valid_BT: bool [B, T], False for padding; None if no token is padding.
        rope: (cos, sin) of every distinct `RopeArgs`.
        temperature: The query scale of every distinct `TemperatureArgs`.
        masks: The mask spec of every distinct rule.
        attend: The attention backend.
        context: What cross-attention reads, if anything.
        context_mask: The mask spec of cross-attention.
    """

    positions_BT: Tensor
    valid_BT: Tensor | None
    rope: dict[RopeArgs, tuple[Tensor, Tensor]]
    temperature: dict[TemperatureArgs, Tensor]
    masks: dict[LayerRule, MaskSpec]
    attend: Attend
    context: Context | None = None
    context_mask: MaskSpec | None = None


class LayerCacheLike(Protocol):
    """What a block needs of a cache; see `cache.store.LayerCache`."""

    @property
    def context(self) -> CacheView | None: ...

    def update(self, states: tuple[Tensor, ...], /) -> CacheView: ...

    def keep_context(self, states: tuple[Tensor, ...], positions_BS: Tensor, /) -> CacheView: ...

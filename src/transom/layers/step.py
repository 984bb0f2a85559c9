"""What one forward call tells every layer; built once by the model, read by all blocks."""

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
    """What cross-attention looks at: `states` [B, S, C], their positions [B, S] (-1 padding)."""

    states_BSC: Tensor
    positions_BS: Tensor


@dataclass(frozen=True)
class Step:
    """Positions [B, T] (int64, -1 padding) and everything derived from them, shared by equal
    layers.
    """

    positions_BT: Tensor
    valid_BT: Tensor | None  # None: every token is real
    rope: dict[RopeArgs, tuple[Tensor, Tensor]]
    temperature: dict[TemperatureArgs, Tensor]
    masks: dict[LayerRule, MaskSpec]
    attend: Attend
    context: Context | None = None
    context_mask: MaskSpec | None = None


class LayerCacheLike(Protocol):
    """What a block needs of a cache: hand over this call's states, get back all that may be
    seen.
    """

    @property
    def context(self) -> CacheView | None: ...

    def update(self, states: tuple[Tensor, ...], /) -> CacheView: ...

    def keep_context(self, states: tuple[Tensor, ...], positions_BS: Tensor, /) -> CacheView: ...

"""What one forward call tells every layer; built once by the model, read by all blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from transom.args import LayerRule, RopeArgs, TemperatureArgs
from transom.attend.attend import Attend
from transom.attend.mask import MaskSpec


@dataclass(frozen=True)
class Step:
    """Positions [B, T] (int64, -1 padding) and everything derived from them, shared by equal layers."""

    positions_BT: Tensor
    valid_BT: Tensor | None  # None: every token is real
    rope: dict[RopeArgs, tuple[Tensor, Tensor]]
    temperature: dict[TemperatureArgs, Tensor]
    masks: dict[LayerRule, MaskSpec]
    attend: Attend

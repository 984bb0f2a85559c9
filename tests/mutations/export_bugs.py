"""Silent bugs in exported programs and in the plan of memory. The registry is `bugs.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from tests.mutations.planting import Call, changed
from transom.checkpoints.exported import TensorCache
from transom.config.layer_args import LayerArgs
from transom.planning import counts


def late_positions() -> AbstractContextManager[None]:
    """Every call of an exported program begins one position late."""

    def make(original: Call) -> Call:
        def load(self: TensorCache, tensors: dict[str, Tensor]) -> None:
            original(self, {**tensors, "lengths": tensors["lengths"] + 1})

        return load

    return changed(TensorCache, "load", make)


def uncounted_scales() -> AbstractContextManager[None]:
    """The scales of a KV cache in 8 bits are left out of the plan."""

    def make(original: Call) -> Call:
        def bytes_per_token(layer: LayerArgs, bytes_per_value: int = 4) -> int:
            return layer.kv_values_per_token * bytes_per_value

        return bytes_per_token

    return changed(counts, "kv_bytes_per_token", make)

"""Codes of weights in tiles of 16 outputs, as tiles.h describes them, and their numbers."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from transom.ops.build import library, loaded
from transom.ops.weights import Weight

OUTPUTS = 16  # of a tile


def has_tiles() -> bool:
    """Return whether there are products of tiles: a library, and a CPU with AVX-512 VNNI."""
    native = library()
    return native is not None and bool(native.transom_has_tiles())


def to_tiles(codes: Tensor, *, four: bool) -> None:
    """Bring codes into tiles, in place, where there are products of tiles.

    Args:
        codes: [..., out, bytes of a row] on the CPU, without gaps. The outputs are a multiple of
            16, and the bytes one of 4.
        four: Whether a byte has two codes of 4 bits, the first in the high half.
    """
    native = loaded()
    assert native is not None, "as `has_tiles` found"
    rows, width = codes.numel() // codes.size(-1), codes.size(-1)
    address = ctypes.c_void_p(codes.data_ptr())
    native.transom_to_tiles(
        address, ctypes.c_int64(rows), ctypes.c_int64(width), int(four), torch.get_num_threads()
    )


def dense_rows(weight: Weight, rows: Tensor) -> Tensor:
    """Return rows [R, in] of a weight in tiles, in float32, as `quantize.formats.dequantize` does.

    Args:
        weight: A weight of `coded_weight`, in tiles.
        rows: int64 [R].
    """
    native = loaded()
    assert native is not None, "this library has made the tiles"
    numbers = torch.empty(len(rows), weight.inputs)
    native.transom_rows(
        ctypes.byref(weight),
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(len(rows)),
        ctypes.c_void_p(numbers.data_ptr()),
        torch.get_num_threads(),
    )
    return numbers

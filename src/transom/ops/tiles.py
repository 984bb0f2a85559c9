"""Codes of weights in tiles of 16 outputs, as tiles.h describes them, and back in rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from transom.ops.build import library, loaded

OUTPUTS = 16  # of a tile


def to_tiles(codes: Tensor, *, four: bool) -> bool:
    """Bring codes into tiles, in place; return False where products of tiles don't exist.

    Args:
        codes: [..., out, bytes of a row] on the CPU, without gaps. The outputs are a multiple of
            16, and the bytes one of 4.
        four: Whether a byte has two codes of 4 bits, the first in the high half.
    """
    native = library()
    rows, width = codes.numel() // codes.size(-1), codes.size(-1)
    address = ctypes.c_void_p(codes.data_ptr())
    return native is not None and bool(
        native.transom_to_tiles(address, ctypes.c_int64(rows), ctypes.c_int64(width), int(four))
    )


def from_tiles(tiles: Tensor, rows: Tensor, *, four: bool) -> Tensor:
    """Return some rows [R, bytes of a row] of codes in tiles.

    Args:
        tiles: What `to_tiles` has written, [..., out, bytes of a row].
        rows: int64 [R], counted through all leading dimensions.
        four: As it was for `to_tiles`.
    """
    native, width = loaded(), tiles.size(-1)
    assert native is not None, "this library has made the tiles"
    codes = torch.empty(len(rows), width, dtype=tiles.dtype)
    native.transom_from_tiles(
        ctypes.c_void_p(tiles.data_ptr()),
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(len(rows)),
        ctypes.c_int64(width),
        int(four),
        ctypes.c_void_p(codes.data_ptr()),
        torch.get_num_threads(),
    )
    return codes

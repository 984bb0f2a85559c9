"""Parts of quantized weights in tiles of 16 outputs, as the products in C++ read them fastest.

A weight [out, in] (or [E, out, in]) in tiles has `tiles` in place of `codes`, with the bytes of
16 outputs side by side (`ops.tiles`), and its scales, zeros, minimums and super scales are ordered
by tile, group and output. Parts in tiles exist in memory only, as long as the model generates on a
CPU that multiplies them; `formats.in_rows` brings them back.
"""

from __future__ import annotations

from torch import Tensor

from transom.ops.tiles import OUTPUTS, has_tiles, to_tiles
from transom.quantize.formats import FLOAT8, Parts, WeightFormat, integers, shape_of


def fits_tiles(parts: Parts, format: WeightFormat) -> bool:
    """Return whether parts in rows can be brought into tiles, and this CPU multiplies them.

    The outputs are a multiple of 16, the inputs one of 32, and a group has 16 inputs or a multiple
    of 32.
    """
    outputs, groups = parts["scales"].shape[-2:]
    inputs = shape_of(parts, format)[-1]
    group = inputs // groups
    fits = outputs % OUTPUTS == 0 and inputs % 32 == 0 and (group == 16 or group % 32 == 0)
    fits = fits and (multiplies_bytes(format) or format.offset == "none")
    fits = fits and not format.centered and (not format.block or groups % format.block == 0)
    return fits and parts["codes"].device.type == "cpu" and has_tiles()


def multiplies_bytes(format: WeightFormat) -> bool:
    """Return whether products of tiles multiply codes as bytes: their values are integers in a row.

    Floats of 8 bits and values of a table are multiplied in float32.
    """
    levels = format.levels
    return format.codes is not FLOAT8 if levels is None else levels == integers(int(levels[0]))


def in_tiles(parts: Parts, format: WeightFormat) -> dict[str, Tensor]:
    """Return parts that fit tiles in tiles. Codes are rearranged in place, others are copied."""
    codes = parts["codes"].contiguous()
    tiles, outputs = {}, codes.size(-2)
    for name, part in parts.items():
        if name == "order":
            tiles[name] = part
        elif name == "codes" and codes.dtype is not FLOAT8:
            to_tiles(codes, four=format.levels is not None)
            tiles["tiles"] = codes
        else:
            of_rows = part.unflatten(-1, (outputs, -1)) if name.startswith("super") else part
            by_tile = of_rows.unflatten(-2, (-1, OUTPUTS)).transpose(-1, -2)
            tiles["tiles" if name == "codes" else name] = by_tile.contiguous().view_as(part)
    return tiles

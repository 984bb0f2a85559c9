"""Parts of quantized weights in tiles of 16 outputs, as the products in C++ read them fastest.

A weight [out, in] (or [E, out, in]) in tiles has `tiles` in place of `codes`, with the bytes of
16 outputs side by side (`ops.tiles`), and its scales, zeros, minimums and super scales are ordered
by tile, group and output. Parts in tiles exist in memory only, as long as the model generates on a
CPU that multiplies them; `formats.in_rows` brings them back.
"""

from __future__ import annotations

from torch import Tensor

from transom.ops.tiles import OUTPUTS, has_tiles, to_tiles
from transom.quantize.formats import Parts, WeightFormat, integers, shape_of


def fits_tiles(parts: Parts, format: WeightFormat) -> bool:
    """Return whether parts in rows can be brought into tiles, and this CPU multiplies them.

    The outputs are a multiple of 16, the inputs one of 32, a group has 16 inputs or a multiple of
    32, and the values of codes are integers in a row.
    """
    (outputs, groups), levels = parts["scales"].shape[-2:], format.levels
    inputs = shape_of(parts, format)[-1]
    group = inputs // groups
    fits = outputs % OUTPUTS == 0 and inputs % 32 == 0 and (group == 16 or group % 32 == 0)
    fits = fits and (levels is None or levels == integers(int(levels[0])))
    fits = fits and not format.centered and (not format.block or groups % format.block == 0)
    fits = fits and not parts["codes"].is_floating_point()
    return fits and parts["codes"].device.type == "cpu" and has_tiles()


def in_tiles(parts: Parts, format: WeightFormat) -> dict[str, Tensor]:
    """Return parts that fit tiles in tiles. Codes are rearranged in place, others are copied."""
    codes = parts["codes"].contiguous()
    to_tiles(codes, four=format.levels is not None)
    outputs = codes.size(-2)
    tiles = {"tiles": codes}
    for name, part in parts.items():
        if name == "order":
            tiles[name] = part
        elif name != "codes":
            of_rows = part.unflatten(-1, (outputs, -1)) if name.startswith("super") else part
            by_tile = of_rows.unflatten(-2, (-1, OUTPUTS)).transpose(-1, -2)
            tiles[name] = by_tile.contiguous().view_as(part)
    return tiles

"""Parts of quantized weights in tiles of 16 outputs, as the products in C++ read them fastest.

A weight [out, in] (or [E, out, in]) in tiles has `tiles` in place of `codes`, with the bytes of
16 outputs side by side (`ops.tiles`), and its scales, zeros, minimums and super scales are ordered
by tile, group and output. Parts in tiles exist in memory only, as long as the model generates on a
CPU that multiplies them; `formats.in_rows` brings them back.
"""

from __future__ import annotations

from torch import Tensor

from transom.ops.tiles import OUTPUTS, to_tiles
from transom.quantize.formats import Parts, WeightFormat, integers


def in_tiles(parts: Parts, format: WeightFormat) -> dict[str, Tensor] | None:
    """Return the parts in tiles, or None if they don't fit or this CPU doesn't multiply them.

    They fit if the outputs are a multiple of 16, the inputs one of 32, a group has 16 inputs or a
    multiple of 32, and the values of codes are integers in a row. Codes are rearranged in place.
    """
    codes, scales, levels = parts["codes"], parts["scales"], format.levels
    outputs, groups = scales.shape[-2:]
    inputs = codes.size(-1) * (1 if levels is None else 2)
    group = inputs // groups
    fits = outputs % OUTPUTS == 0 and inputs % 32 == 0 and (group == 16 or group % 32 == 0)
    fits = fits and (levels is None or levels == integers(int(levels[0])))
    fits = fits and not format.centered and (not format.block or groups % format.block == 0)
    if not fits or codes.device.type != "cpu":
        return None
    codes = codes.contiguous()
    if not to_tiles(codes, four=levels is not None):
        return None
    tiles = {"tiles": codes}
    for name, part in parts.items():
        if name == "order":
            tiles[name] = part
        elif name != "codes":
            of_rows = part.unflatten(-1, (outputs, -1)) if name.startswith("super") else part
            by_tile = of_rows.unflatten(-2, (-1, OUTPUTS)).transpose(-1, -2)
            tiles[name] = by_tile.contiguous().view_as(part)
    return tiles

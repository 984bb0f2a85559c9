"""Quantized weights as pure functions: a weight to named parts, and back.

A weight [out, in] (or [E, out, in]) has these parts. n is the number of groups of a row: `in /
group`. `WeightFormat` says which parts there are.

- `codes`: of 4 bits, uint8 [out, in / 2] with the first of two codes in the high half of a byte; of
  8 bits, int8 or float8_e4m3fn [out, in].
- `scales` [out, n]: multiply the values of the codes.
- `zeros` int8 [out, n]: values that stand for 0. They are subtracted before the scale multiplies.
- `minimums` [out, n]: added after the scale has multiplied.
- `super_scales`, `super_minimums` [out * n / block]: if `scales` and `minimums` are the bits of
  8-bit codes, int8, one factor for each `block` of them, counted through all rows.
- `scale_mean` [1]: added to scales that are codes.
- `order` int32 [in]: the input of each column of the codes, if neighbours in the codes are not
  neighbours in the weight (act-order of GPTQ).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import expect
from transom.ops.tiles import OUTPUTS, dense_rows
from transom.ops.weights import coded_weight
from transom.quantize.args import QuantizeArgs

Parts = Mapping[str, Tensor]
Levels = tuple[float, ...]


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored: `weight = scale * (value of the code - zero) + minimum`.

    Attributes:
        levels: The values of the 16 codes of 4 bits. None: codes of 8 bits, which are their values.
        group: Neighbouring inputs that share a scale; 0 for all inputs of an output.
        offset: Which offset every group has.
        scales: The dtype of the scales and minimums.
        block: Groups that share a factor. `scales` is then float8_e4m3fn or int8, and the parts
            have the bits of these codes. 0: scales are not codes.
        super_scales: The dtype of these factors.
        centered: Whether the codes are scales less their mean.
        ordered: Whether the columns of the codes are in another order than the inputs.
        codes: The dtype of codes of 8 bits: int8, or float8_e4m3fn.
    """

    levels: Levels | None
    group: int
    offset: Literal["none", "zeros", "minimums"] = "none"
    scales: torch.dtype = torch.float32
    block: int = 0
    super_scales: torch.dtype = torch.float32
    centered: bool = False
    ordered: bool = False
    codes: torch.dtype = torch.int8


def integers(first: int) -> Levels:
    """Return the levels of 4-bit codes for 16 integers in a row."""
    return tuple(float(value) for value in range(first, first + 16))


# Quantiles of the normal distribution, 0 among them, divided by the largest: appendix E of arXiv
# 2305.14314, in float32 as bitsandbytes has them (functional.py, get_4bit_type).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Floats with 2 bits of exponent and 1 of fraction, in the order of their bits, less a tiny one in
# place of 0.5 ulp: functional.py of bitsandbytes, get_4bit_type.
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = (*_FP4, *(-value for value in _FP4))
INT4 = integers(-8)
FLOAT8 = torch.float8_e4m3fn
# The largest values of 8-bit codes. -128 is used with zero points only.
LARGEST = {torch.int8: 127, FLOAT8: 448}


def requested(args: QuantizeArgs, dtype: torch.dtype) -> WeightFormat:
    """Return the format that a user asks for, with scales in the dtype of the weight."""
    levels = {"nf4": NF4, "fp4": FP4, "int4": INT4}.get(args.kind)
    if args.scales != "weight":
        dtype = getattr(torch, args.scales)
    if args.double_quant:
        # The 8-bit floats are those of hardware. bitsandbytes uses its dynamic tree, of similar
        # precision. The block is that of section 3 of QLoRA.
        return WeightFormat(levels, args.group, "none", FLOAT8, 256, dtype, centered=True)
    offset: Literal["none", "zeros"] = "zeros" if args.zero_points else "none"
    codes = FLOAT8 if args.kind == "fp8" else torch.int8
    return WeightFormat(levels, args.group, offset, dtype, codes=codes)


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: WeightFormat,
    fit: Callable[[Tensor, WeightFormat], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the parts of a weight, each value rounded to the nearest that its group has.

    Args:
        weight: [out, in] or [E, out, in] of any floating dtype.
        format: A format without minimums.
        fit: Returns the scales and zeros of groups [out, n, group]; `group_parts` by default.

    Raises:
        RequestError: The inputs are not a multiple of the group.
    """
    inputs = weight.size(-1)
    group = format.group or inputs
    expect(inputs % group == 0, "group", group, f"a divisor of the {inputs} inputs")
    if weight.ndim == 3:
        experts = [quantize(one, format, fit) for one in weight]
        return {name: torch.stack([parts[name] for parts in experts]) for name in experts[0]}
    groups = weight.float().unflatten(-1, (-1, group))
    stored = group_parts(groups, format) if fit is None else fit(groups, format)
    return {"codes": encode(groups, stored, format), **stored}


def group_parts(groups: Tensor, format: WeightFormat, shrink: float = 1.0) -> dict[str, Tensor]:
    """Return the scales and zeros of groups float32 [out, n, group] by their largest weights.

    `shrink` multiplies the range. A weight outside it gets the nearest value of the range.
    """
    zeros: dict[str, Tensor] = {}
    if format.offset == "zeros":
        lowest, steps = (-128, 255) if format.levels is None else (int(format.levels[0]), 15)
        # The range reaches 0, so that a weight of 0 stays one.
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) * shrink / steps
        units = -low * shrink / not_zero(scales)
        zeros = {"zeros": (units.round() + lowest).to(torch.int8)}
    else:
        scales = _symmetric_scales(groups, format) * shrink
    stored = _code_scales(scales, format) if format.block else {"scales": scales.to(format.scales)}
    return {**stored, **zeros}


def encode(groups: Tensor, parts: Parts, format: WeightFormat) -> Tensor:
    """Return the codes of groups float32 [out, n, group], as `parts` has them."""
    codes = nearest_codes(in_units(groups, parts, format).flatten(-2), format)
    return codes if format.levels is None else pack(codes)


def in_units(groups: Tensor, parts: Parts, format: WeightFormat) -> Tensor:
    """Return groups float32 [..., n, group] as numbers to be rounded to values of codes."""
    units = groups / not_zero(wide_scales(parts, "scales", format, slice(None))).unsqueeze(-1)
    if format.offset == "zeros":
        units += parts["zeros"].float().unsqueeze(-1)
    return units


def nearest_codes(units: Tensor, format: WeightFormat) -> Tensor:
    """Return the codes of the values nearest to some numbers: int8, or uint8 below 16."""
    if format.levels is None:
        largest = LARGEST[format.codes]
        if format.codes is FLOAT8:  # a larger number would become NaN
            return units.clamp(-largest, largest).to(FLOAT8)
        return units.round().clamp_(-128, largest).to(torch.int8)
    levels = format.levels
    if levels == integers(round(levels[0])):  # half of a step rounds down, as `_nearest` does
        return (units - (levels[0] + 0.5)).ceil_().clamp_(0, 15).to(torch.uint8)
    order = sorted(range(16), key=lambda code: (levels[code], math.copysign(1, levels[code])))
    codes = _nearest(units, torch.tensor([levels[code] for code in order]))
    if order == list(range(16)):
        return codes
    return torch.tensor(order, dtype=torch.uint8, device=units.device)[codes.int()]


def dequantize(parts: Parts, format: WeightFormat, rows: slice | Tensor = slice(None)) -> Tensor:
    """Return the weight that the parts stand for, in float32.

    Args:
        parts: The parts of a weight [out, in] or [E, out, in].
        format: Their format.
        rows: The outputs to compute: a slice, or indices [R] of a weight [out, in]. All by default.

    Returns:
        [R, in] or [E, R, in]. Products and sums are rounded one after the other, in the order of
        `WeightFormat`.

    Raises:
        IndexError: An index is not a row.
    """
    if "tiles" in parts:
        values = _tiled_rows(parts, format, rows)
    else:
        values = scaled(_values(_at(parts["codes"], rows), format), parts, format, rows)
    if "order" not in parts:
        return values
    places = parts["order"].long().unsqueeze(-2).expand_as(values)
    return torch.empty_like(values).scatter_(-1, places, values)


def _tiled_rows(parts: Parts, format: WeightFormat, rows: slice | Tensor) -> Tensor:
    """Return the weight of parts in tiles like `dequantize`, without regard to `order`."""
    *leading, outputs, _ = parts["tiles"].shape
    chosen = torch.arange(outputs)[rows] if isinstance(rows, slice) else rows
    if not bool(((chosen >= 0) & (chosen < outputs)).all()):
        raise IndexError(f"rows: got {chosen.tolist()[:8]}; expected 0 to {outputs - 1}")
    first = torch.arange(math.prod(leading)).unsqueeze(1) * outputs
    # Experts are as the rows of one weight.
    own = {
        name: part.flatten() if name.startswith("super") else part.reshape(-1, part.size(-1))
        for name, part in parts.items()
        if name != "order"
    }
    weight = coded_weight(own, format.levels, format.scales, format.block, None, torch.float32)
    assert weight is not None, "formats in tiles are those of products"
    return dense_rows(weight, (first + chosen).flatten()).view(*leading, -1, weight.inputs)


def in_rows(parts: Parts, format: WeightFormat) -> dict[str, Tensor]:
    """Return parts in tiles, which `quantize.tiles` has made, as this module describes them."""
    outputs = parts["tiles"].size(-2)
    found = {}
    for name, part in parts.items():
        if name == "order":
            found[name] = part
            continue
        # [..., tile, number, output, size]: the output comes second, as in rows.
        together = 4 if name == "tiles" and format.codes is not FLOAT8 else 1
        shape = outputs // OUTPUTS, -1, OUTPUTS, together
        leading = parts["tiles"].shape[:-2]
        numbers = part.reshape(*leading, *shape).transpose(-3, -2)
        if together == 1:
            found["codes" if name == "tiles" else name] = numbers.reshape(part.shape)
            continue
        bytes_ = numbers.flatten(-4, -3)
        if format.levels is None:
            found["codes"] = (bytes_ ^ -128).flatten(-2)
        else:
            found["codes"] = pack(torch.cat([bytes_ & 15, bytes_ >> 4], -1).flatten(-2))
    return found


def _values(codes: Tensor, format: WeightFormat) -> Tensor:
    """Return the values of codes in float32, flat for codes of 4 bits."""
    if format.levels is None:
        return codes.float()
    kept = codes.is_cuda and type(codes) is Tensor  # a copy to a GPU would wait for it
    pairs = (_pairs if kept else _pairs.__wrapped__)(format.levels, codes.device)
    return pairs.index_select(0, codes.flatten().int()).view(torch.float32)


@functools.cache
def _pairs(levels: Levels, device: torch.device) -> Tensor:
    """Return the values of the two codes of every byte, as one number int64 [256].

    A byte finds both at once: twice as fast as two look-ups.
    """
    with torch.inference_mode(False):
        row = torch.tensor(levels, device=device)
        return torch.cartesian_prod(row, row).view(torch.int64).flatten()


def scaled(
    values: Tensor, parts: Parts, format: WeightFormat, rows: slice | Tensor = slice(None)
) -> Tensor:
    """Return the weight of values of codes in float32, [R, in] or [E, R, in], which may change."""
    scales = wide_scales(parts, "scales", format, rows)
    groups = values.view(*scales.shape, -1)
    if format.offset == "zeros":
        groups -= _at(parts["zeros"], rows).float().unsqueeze(-1)
    groups *= scales.unsqueeze(-1)
    if format.offset == "minimums":
        groups += wide_scales(parts, "minimums", format, rows).unsqueeze(-1)
    return groups.flatten(-2)


def empty_parts(
    shape: torch.Size | tuple[int, ...], format: WeightFormat, device: torch.device | str
) -> dict[str, Tensor]:
    """Return parts of a weight of this shape, to be filled from a file."""
    *leading, outputs, inputs = shape
    groups = inputs // (format.group or inputs)
    code, width = (format.codes, inputs) if format.levels is None else (torch.uint8, inputs // 2)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"codes": (code, (outputs, width))}
    scales = torch.int8 if format.block else format.scales
    parts["scales"] = scales, (outputs, groups)
    if format.offset != "none":
        kind = torch.int8 if format.offset == "zeros" else scales
        parts[format.offset] = kind, (outputs, groups)
    if format.block:
        blocks = (-(-outputs * groups // format.block),)
        parts["super_scales"] = format.super_scales, blocks
        if format.offset == "minimums":
            parts["super_minimums"] = format.super_scales, blocks
    if format.centered:
        parts["scale_mean"] = format.super_scales, (1,)
    if format.ordered:
        parts["order"] = torch.int32, (inputs,)
    return {
        name: torch.empty(*leading, *own, dtype=dtype, device=device)
        for name, (dtype, own) in parts.items()
    }


def shape_of(parts: Parts, format: WeightFormat) -> tuple[int, ...]:
    """Return the shape of the weight."""
    *leading, width = parts["tiles" if "tiles" in parts else "codes"].shape
    return (*leading, width if format.levels is None else 2 * width)


def pack(codes: Tensor) -> Tensor:
    """Return 4-bit codes uint8 [..., in] as bytes [..., in / 2], the first in the high half."""
    # As numbers of two bytes, of which the first is the low one: a third of the time.
    pairs = codes.view(torch.int16)
    return (pairs << 4 | pairs >> 8).to(torch.uint8)


def unpack(pairs: Tensor) -> Tensor:
    """Return the codes uint8 [..., in] of bytes [..., in / 2]."""
    wide = pairs.to(torch.int16)
    return (wide >> 4 | (wide & 15) << 8).view(torch.uint8)


def _at(part: Tensor, rows: slice | Tensor) -> Tensor:
    return part[..., rows, :] if isinstance(rows, slice) else part.index_select(-2, rows)


def wide_scales(parts: Parts, name: str, format: WeightFormat, rows: slice | Tensor) -> Tensor:
    """Return the scales or minimums [..., R, n] of rows in float32."""
    stored = _at(parts[name], rows)
    if not format.block:
        return stored.float()
    stored = stored.view(format.scales).float()
    factors, (outputs, groups) = parts[f"super_{name}"], parts[name].shape[-2:]
    if groups % format.block == 0:
        of_rows = _at(factors.unflatten(-1, (outputs, -1)), rows).float()
        stored = (stored.unflatten(-1, (-1, format.block)) * of_rows.unsqueeze(-1)).flatten(-2)
    else:  # a block reaches into the next row
        first = torch.arange(outputs, device=stored.device)[rows].unsqueeze(-1) * groups
        places = first + torch.arange(groups, device=stored.device)
        stored *= factors[..., places // format.block].float()
    if format.centered:
        stored += parts["scale_mean"].float().unsqueeze(-1)
    return stored


def _symmetric_scales(groups: Tensor, format: WeightFormat) -> Tensor:
    """Return the scale of each group with which its largest weight has a value of its own."""
    levels = format.levels
    if levels is None:
        return groups.abs().amax(-1) / LARGEST[format.codes]
    if -min(levels) == max(levels):
        return groups.abs().amax(-1) / max(levels)
    # The largest takes the first code, the only one with a value of this size: the scale has its
    # sign (as Q4_0 of ggml).
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return largest.squeeze(-1) / levels[0]


def _nearest(units: Tensor, levels: Tensor) -> Tensor:
    """Return the code of the level nearest to each value: the number of midpoints below it."""
    codes = torch.zeros_like(units, dtype=torch.uint8)
    for middle in ((levels[1:] + levels[:-1]) / 2).tolist():  # half the time of `torch.bucketize`
        codes += (units > middle).view(torch.uint8)
    return codes


def not_zero(scales: Tensor) -> Tensor:
    """Return the scales with 1 in place of 0, to divide a group of zeros by."""
    return torch.where(scales == 0, 1.0, scales)


def _code_scales(scales: Tensor, format: WeightFormat) -> dict[str, Tensor]:
    """Return scales [out, n] as 8-bit floats around their mean (section 3 of QLoRA)."""
    mean = scales.mean().view(1).to(format.super_scales)
    rest = (scales - mean.float()).flatten()
    blocks = F.pad(rest, (0, -len(rest) % format.block)).view(-1, format.block)
    largest = torch.finfo(format.scales).max
    factors = (blocks.abs().amax(1) / largest).to(format.super_scales)
    # Clamped: its own rounding may leave the largest above what 8 bits hold.
    units = (blocks / not_zero(factors.float()).unsqueeze(1)).clamp(-largest, largest)
    codes = units.flatten()[: len(rest)].view_as(scales).to(format.scales)
    return {"scales": codes.view(torch.int8), "super_scales": factors, "scale_mean": mean}

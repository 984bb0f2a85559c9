"""Four-bit formats as pure functions: a weight to named parts, and back.

A weight [out, in] (or [E, out, in]) becomes `qweight` uint8 [out, in / 2], two codes per byte with
the first in the high half, and `scales` [out, in / group], which multiply the values of the codes.
`zeros` uint8 [out, in / group] are the codes that stand for 0. With double quantization `scales`
are the bits of 8-bit floats, multiplied by `scale_scales` [blocks], one for 256 of them, and added
to `scale_offset` [1].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import require
from transom.quantize.args import SCALE_BLOCK, Kind, QuantizeArgs

Parts = Mapping[str, Tensor]

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
LEVELS: dict[Kind, tuple[float, ...]] = {
    "nf4": NF4,
    "int4": tuple(float(value) for value in range(-8, 8)),
}
INT4_ZERO = 8  # the code of 0 where a group has no zero of its own
EIGHT_BITS = torch.float8_e4m3fn


@torch.no_grad()
def quantize(weight: Tensor, args: QuantizeArgs) -> dict[str, Tensor]:
    """Return the parts of a weight.

    Args:
        weight: [out, in] or [E, out, in] of any floating dtype. Scales keep its dtype.
        args: The format.

    Raises:
        RequestError: The inputs are not a multiple of the group.
    """
    inputs = weight.size(-1)
    require(
        inputs % args.group == 0,
        "group",
        args.group,
        f"expected a divisor of the {inputs} inputs",
    )
    if weight.ndim == 3:
        experts = [quantize(one, args) for one in weight]
        return {name: torch.stack([parts[name] for parts in experts]) for name in experts[0]}
    groups = weight.float().unflatten(-1, (-1, args.group))
    zeros: dict[str, Tensor] = {}
    if args.kind == "nf4":
        scales = groups.abs().amax(-1)
    elif args.zero_points:
        # The range reaches 0, so that a weight of 0 stays one.
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        zeros = {"zeros": (-low / _not_zero(scales)).round().to(torch.uint8)}
    else:
        # The largest takes code 0, the only one with a value of size 8: the scale has its sign (as
        # Q4_0 of ggml).
        scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    stored = (
        _code_scales(scales, weight.dtype)
        if args.double_quant
        else {"scales": scales.to(weight.dtype)}
    )
    units = groups / _not_zero(_read_scales(stored)).unsqueeze(-1)
    if zeros:
        units += (zeros["zeros"].float() - INT4_ZERO).unsqueeze(-1)
    codes = _nearest(units.flatten(-2), torch.tensor(LEVELS[args.kind]))
    return {"qweight": codes[..., 0::2] << 4 | codes[..., 1::2], **stored, **zeros}


def dequantize(parts: Parts, kind: Kind) -> Tensor:
    """Return the weight that the parts stand for.

    It is computed in float32 and rounded once to the dtype that it had before.
    """
    levels = torch.tensor(LEVELS[kind], device=parts["qweight"].device)
    # A byte finds both of its values at once, moved as one number of 8 bytes: twice as fast as two
    # look-ups.
    pairs = torch.cartesian_prod(levels, levels).view(torch.int64).flatten()
    values = pairs.index_select(0, parts["qweight"].flatten().int()).view(torch.float32)
    groups = values.view(*parts["scales"].shape, -1)
    if "zeros" in parts:
        groups -= (parts["zeros"].float() - INT4_ZERO).unsqueeze(-1)
    groups *= _read_scales(parts).unsqueeze(-1)
    return groups.flatten(-2).to(dtype_of(parts))


def dtype_of(parts: Parts) -> torch.dtype:
    """Return the dtype of the weight: that of the scales, or of their scales."""
    return parts["scale_scales" if "scale_scales" in parts else "scales"].dtype


def empty_parts(weight: Tensor, args: QuantizeArgs) -> dict[str, Tensor]:
    """Return parts of a weight of this shape, dtype and device, to be filled from a checkpoint."""
    *leading, inputs = weight.shape
    per_group = (*leading, inputs // args.group)
    parts = {"qweight": weight.new_empty(*leading, inputs // 2, dtype=torch.uint8)}
    if not args.double_quant:
        parts["scales"] = weight.new_empty(per_group)
    else:
        parts["scales"] = weight.new_empty(per_group, dtype=torch.uint8)
        blocks = -(-per_group[-2] * per_group[-1] // SCALE_BLOCK)
        parts["scale_scales"] = weight.new_empty(*leading[:-1], blocks)
        parts["scale_offset"] = weight.new_empty(*leading[:-1], 1)
    if args.zero_points:
        parts["zeros"] = weight.new_empty(per_group, dtype=torch.uint8)
    return parts


def _nearest(units: Tensor, levels: Tensor) -> Tensor:
    """Return the code of the level nearest to each value: the number of midpoints below it."""
    codes = torch.zeros_like(units, dtype=torch.uint8)
    for middle in ((levels[1:] + levels[:-1]) / 2).tolist():  # half the time of `torch.bucketize`
        codes += (units > middle).view(torch.uint8)
    return codes


def _not_zero(scales: Tensor) -> Tensor:
    """Return the scales with 1 in place of 0, to divide a group of zeros by."""
    return torch.where(scales == 0, 1.0, scales)


def _code_scales(scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return scales [out, groups] in 8 bits around their mean (section 3 of QLoRA).

    The 8-bit floats are those of hardware. bitsandbytes uses its dynamic tree, of similar
    precision.
    """
    offset = scales.mean().view(1).to(dtype)
    rest = (scales - offset.float()).flatten()
    blocks = F.pad(rest, (0, -len(rest) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = torch.finfo(EIGHT_BITS).max
    scale_scales = (blocks.abs().amax(1) / largest).to(dtype)
    # Clamped: its own rounding may leave the largest above what 8 bits hold.
    units = (blocks / _not_zero(scale_scales.float()).unsqueeze(1)).clamp(-largest, largest)
    codes = units.to(EIGHT_BITS).view(torch.uint8).flatten()[: len(rest)].view_as(scales)
    return {"scales": codes.clone(), "scale_scales": scale_scales, "scale_offset": offset}


def _read_scales(parts: Parts) -> Tensor:
    """Return the scales [..., out, in / group] in float32."""
    scales = parts["scales"]
    if "scale_scales" not in parts:
        return scales.float()
    flat = scales.flatten(-2).view(EIGHT_BITS).float()
    of_blocks = (
        parts["scale_scales"].float().repeat_interleave(SCALE_BLOCK, -1)[..., : flat.size(-1)]
    )
    return (flat * of_blocks + parts["scale_offset"].float()).view(scales.shape)

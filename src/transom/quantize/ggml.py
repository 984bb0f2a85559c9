"""The tensor types of ggml as pure functions: blocks of bytes to parts of a quantized weight, back.

A row of a ggml tensor is a sequence of blocks. A block has a fixed number of weights: the bits of
their codes and one or two half-precision factors. In the K types these multiply small scales and
minimums inside the block. Every type has a `WeightFormat` that represents it without loss, and
`formats.dequantize` gives the numbers of ggml bit for bit.

The layouts are those of ggml-quants.c and ggml-common.h of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import RequestError, nearest
from transom.quantize.formats import Parts, WeightFormat, dequantize, integers, pack, unpack

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class BlockType:
    """The layout of one block.

    Attributes:
        weights: Weights of a block.
        fields: The bytes of every field, in their order. `d` and `m` are the factors of scales and
            minimums, `e` is an exponent, `sc` has small scales, `qs` and `qh` have the low and the
            high bits of the codes.
        format: The format of the parts.
        low: Bytes of a plane of `qs`, and bits of a code in it; see `_planes`.
        high: The same of `qh`.
        zero: The number that is subtracted from codes of 8 bits.
    """

    weights: int
    fields: Mapping[str, int]
    format: WeightFormat
    low: tuple[int, int]
    high: tuple[int, int] = (0, 0)
    zero: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return sum(self.fields.values())


_HALF = torch.float16
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # doubled; the scales of ggml are halved

_Q4_0 = WeightFormat(integers(-8), 32, "none", _HALF)
_Q4_1 = WeightFormat(integers(0), 32, "minimums", _HALF)
_Q8_0 = WeightFormat(None, 32, "none", _HALF)
_Q8_1 = WeightFormat(None, 32, "minimums", _HALF)
_Q2_K = WeightFormat(integers(0), 16, "minimums", torch.int8, 16, _HALF)
_Q3_K = WeightFormat(integers(-4), 16, "none", torch.int8, 16, _HALF)
_Q4_K = WeightFormat(integers(0), 32, "minimums", torch.int8, 8, _HALF)
_Q5_K = WeightFormat(None, 32, "minimums", torch.int8, 8, _HALF)
_Q6_K = WeightFormat(None, 16, "none", torch.int8, 16, _HALF)
_IQ4 = WeightFormat(tuple(map(float, _IQ4_NL)), 32, "none", _HALF)
# The exponents of two are exact in bfloat16, the smallest of them as a subnormal number.
_MXFP4 = WeightFormat(
    tuple(float(v) for v in (*_E2M1, *(-one for one in _E2M1))), 32, "none", torch.bfloat16
)

TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, {"d": 2, "qs": 16}, _Q4_0, low=(16, 4)),
    "Q4_1": BlockType(32, {"d": 2, "m": 2, "qs": 16}, _Q4_1, low=(16, 4)),
    "Q5_0": BlockType(32, {"d": 2, "qh": 4, "qs": 16}, _Q8_0, low=(16, 4), high=(1, 1), zero=16),
    "Q5_1": BlockType(32, {"d": 2, "m": 2, "qh": 4, "qs": 16}, _Q8_1, low=(16, 4), high=(1, 1)),
    "Q8_0": BlockType(32, {"d": 2, "qs": 32}, _Q8_0, low=(32, 8)),
    "IQ4_NL": BlockType(32, {"d": 2, "qs": 16}, _IQ4, low=(16, 4)),
    "MXFP4": BlockType(32, {"e": 1, "qs": 16}, _MXFP4, low=(16, 4)),
    "Q2_K": BlockType(256, {"sc": 16, "qs": 64, "d": 2, "m": 2}, _Q2_K, low=(32, 2)),
    "Q3_K": BlockType(
        256, {"qh": 32, "qs": 64, "sc": 12, "d": 2}, _Q3_K, low=(32, 2), high=(32, 1)
    ),
    "Q4_K": BlockType(256, {"d": 2, "m": 2, "sc": 12, "qs": 128}, _Q4_K, low=(32, 4)),
    "Q5_K": BlockType(
        256, {"d": 2, "m": 2, "sc": 12, "qh": 32, "qs": 128}, _Q5_K, low=(32, 4), high=(32, 1)
    ),
    "Q6_K": BlockType(
        256, {"qs": 128, "qh": 64, "sc": 16, "d": 2}, _Q6_K, low=(64, 4), high=(32, 2), zero=32
    ),
}
WRITTEN = (*DENSE, "Q8_0", "Q4_0", "Q4_1")


def format_of(name: str) -> WeightFormat | None:
    """Return the format of the parts of a type; None for F32, F16 and BF16, which have none.

    Raises:
        RequestError: Transom can't read the type.
    """
    return None if name in DENSE else _type(name).format


def row_bytes(name: str, inputs: int) -> int:
    """Return the bytes of a row of so many weights.

    Raises:
        RequestError: Transom can't read the type, or the row is not a number of blocks.
    """
    if name in DENSE:
        return inputs * DENSE[name].itemsize
    kind = _type(name)
    if inputs % kind.weights:
        expected = f"expected a multiple of {kind.weights}, the weights of a block of {name}"
        raise RequestError(f"inputs: got {inputs}; {expected}")
    return inputs // kind.weights * kind.bytes


@torch.no_grad()
def parts(name: str, blocks: Tensor) -> dict[str, Tensor]:
    """Return the parts of a weight from its blocks, without loss.

    Args:
        name: A type of `TYPES`, such as `Q4_K`.
        blocks: The bytes of the rows, uint8 [out, bytes] or [E, out, bytes].

    Returns:
        The parts of a weight [out, in] or [E, out, in] in the format `format_of(name)`, in memory
        of their own.

    Raises:
        RequestError: Transom can't read the type.
    """
    codes, others = _separated(_type(name), blocks)
    return {"codes": codes if codes.dtype == torch.int8 else pack(codes), **others}


@torch.no_grad()
def dense(name: str, blocks: Tensor) -> Tensor:
    """Return the numbers of blocks uint8 [..., bytes]: float32 [..., in], or the type's own dtype.

    Raises:
        RequestError: Transom can't read the type.
    """
    if name in DENSE:
        return blocks.view(DENSE[name])
    return dequantize(parts(name, blocks), _type(name).format)


def _separated(kind: BlockType, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the codes [..., in] of blocks, in int8 or from 0 to 15 in uint8, and other parts."""
    by_block = blocks.unflatten(-1, (-1, kind.bytes))
    fields = dict(zip(kind.fields, by_block.split(list(kind.fields.values()), -1), strict=True))
    codes = _planes(fields["qs"], *kind.low)
    if "qh" in fields:
        codes |= _planes(fields["qh"], *kind.high) << kind.low[1]
    codes = codes.flatten(-2)
    if kind.format.levels is None:
        codes = (codes - kind.zero).view(torch.int8)
    if "e" in fields:
        return codes, {"scales": _halved_power(fields["e"].squeeze(-1))}
    factors = {
        key: fields[key].contiguous().view(_HALF).squeeze(-1) for key in "dm" if key in fields
    }
    if "sc" not in fields:
        out = {"scales": factors["d"]}
        return codes, out | ({"minimums": factors["m"]} if "m" in factors else {})
    scales, minimums = _small_scales(kind, fields["sc"])
    out = {"scales": scales.flatten(-2), "super_scales": factors["d"].flatten(-2)}
    if minimums is not None:  # ggml subtracts them
        out |= {"minimums": minimums.flatten(-2), "super_minimums": -factors["m"].flatten(-2)}
    return codes, out


@torch.no_grad()
def quantize(name: str, weight: Tensor) -> Tensor:
    """Return the blocks of a weight as the package `gguf` makes them.

    Args:
        name: A type of `WRITTEN`.
        weight: Finite numbers [..., in] of any floating dtype, on the CPU.

    Returns:
        uint8 [..., bytes].

    Raises:
        RequestError: Transom can't write the type, or a row is not a number of blocks.
    """
    row_bytes(name, weight.size(-1))
    if name in DENSE:
        return weight.to(DENSE[name]).contiguous().view(torch.uint8)
    _written(name)
    from gguf import GGMLQuantizationType, quants  # takes a third of a second

    kind = GGMLQuantizationType[name]
    with np.errstate(invalid="ignore"):  # of numbers that are not finite
        return torch.from_numpy(quants.quantize(weight.float().numpy(), kind))


@torch.no_grad()
def blocks(name: str, parts: Parts) -> Tensor:
    """Return the blocks uint8 [..., out, bytes] of parts in the format of a type, without loss.

    Raises:
        RequestError: Transom can't write the type.
    """
    kind, codes = _written(name), parts["codes"].view(torch.uint8)
    if kind.format.levels is not None:
        first, second = unpack(codes).unflatten(-1, (-1, 2, kind.weights // 2)).unbind(-2)
        codes = first | second << 4
    else:
        codes = codes.unflatten(-1, (-1, kind.weights))
    factors = (parts[key].to(_HALF).unsqueeze(-1) for key in ("scales", "minimums") if key in parts)
    return torch.cat((*(one.view(torch.uint8) for one in factors), codes), -1).flatten(-2)


def _type(name: str) -> BlockType:
    if name not in TYPES:
        known = (*DENSE, *TYPES)
        raise RequestError(
            f"type: got {name!r}; expected one of {', '.join(known)}{nearest(name, known)}"
        )
    return TYPES[name]


def _written(name: str) -> BlockType:
    if name not in WRITTEN:
        expected = f"expected one of {', '.join(WRITTEN)}{nearest(name, WRITTEN)}"
        raise RequestError(f"type: got {name!r}; {expected}")
    return TYPES[name]


def _planes(data: Tensor, width: int, bits: int) -> Tensor:
    """Return the numbers of some bits in bytes [..., n].

    Every `width` bytes are one plane of numbers in their lowest bits, then one in the bits above
    them, and so on: [..., n / width, 8 / bits, width], flattened.
    """
    rows = data.unflatten(-1, (-1, width)).contiguous()
    return torch.stack(
        [rows >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -2
    ).flatten(-3)


def _small_scales(kind: BlockType, sc: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the scales and minimums int8 [..., groups of a block] in the field `sc`."""
    if kind is TYPES["Q2_K"]:
        return (sc & 15).view(torch.int8), (sc >> 4).view(torch.int8)
    if kind is TYPES["Q6_K"]:
        return sc.contiguous().view(torch.int8), None
    if kind is TYPES["Q3_K"]:  # 16 numbers of 6 bits
        numbers = _planes(sc[..., :8], 8, 4) | _planes(sc[..., 8:], 4, 2) << 4
        return (numbers - 32).view(torch.int8), None
    # Eight pairs of 6 bits: four as they are, and four whose upper two bits are above those of the
    # first four.
    first, second, mixed = sc.split(4, -1)
    scales = torch.cat((first & 63, mixed & 15 | first >> 2 & 48), -1)
    minimums = torch.cat((second & 63, mixed >> 4 | second >> 2 & 48), -1)
    return scales.view(torch.int8), minimums.view(torch.int8)


def _halved_power(exponents: Tensor) -> Tensor:
    """Return 2 ** (e - 128) of exponents uint8 in bfloat16."""
    bits = exponents.to(torch.int16)
    # Two of these numbers are subnormal.
    return torch.where(bits < 2, 32 << bits, bits - 1 << 7).view(torch.bfloat16)

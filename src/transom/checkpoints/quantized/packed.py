"""Integers of 4 and 8 bits in words of 32, in the layouts of GPTQ and AWQ.

Both have `qweight`, `qzeros` and `scales` [n, out] for a weight [out, in] with n groups of inputs.
GPTQ packs neighbouring inputs into a word, [in bits / 32, out]; its `g_idx` [in] is the group of
every input. AWQ packs outputs, [in, out bits / 32], in the order `_AWQ`. Zero points are packed as
outputs, [n, out bits / 32]. Codes and zero points have no sign.

The sources are `torch.py` of GPTQModel and `gemm.py` of AutoAWQ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import RequestError, expect
from transom.checkpoints.files.lazy_tensors import PLAIN_DTYPES, LazyTensors
from transom.checkpoints.quantized.codes import Codes, Rows
from transom.names.transforms import Shape
from transom.quantize.formats import INT4, WeightFormat, pack, unpack

_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of 8 outputs, lowest bits first
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each place of a word
# Where zero points are stored less one, so is every word of them (utils/model.py of GPTQModel).
_ONES = {4: 0x11111111, 8: 0x01010101}


def open_packed(
    where: str, stored: LazyTensors, bits: int, group: int, *, less_one: bool, awq: bool
) -> Codes:
    """Return the weight of one module. Its scales are checked when it is read.

    Args:
        where: The module, for messages.
        stored: Its tensors by the last part of their names.
        bits: Bits of a code.
        group: Inputs that share a scale; 0 for all.
        less_one: Whether zero points are stored less one.
        awq: Whether the layout is that of AWQ.

    Raises:
        RequestError: A tensor is missing or of another shape or dtype, or groups have different
            sizes.
    """
    per_word, names = 32 // bits, ("qweight", "qzeros", "scales", "g_idx")[: 3 if awq else 4]
    missing = ", ".join(name for name in names if name not in stored)
    expect(not missing, where, sorted(stored), f"{missing}, too")
    sizes = stored["qweight"].shape
    expect(len(sizes) > 1, f"{where}.qweight: shape", sizes, "two dimensions")
    *leading, rows, columns = sizes
    outputs = stored["scales"].shape[-1] if awq else columns
    inputs = rows if awq else rows * per_word
    group = group or inputs
    expect(inputs % group == 0, f"{where}: group_size", group, f"a divisor of the {inputs} inputs")
    groups, words = inputs // group, -(-outputs // per_word)
    shapes: dict[str, Shape] = {
        "qweight": (rows, words if awq else outputs),
        "qzeros": (groups, words),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }
    for name in names:
        shape, lazy = (*leading, *shapes[name]), stored[name]
        expect(lazy.shape == shape, f"{where}.{name}: shape", lazy.shape, str(shape))
        kinds = PLAIN_DTYPES if name == "scales" else (torch.int32,)
        expected = " or ".join(map(str, kinds))
        expect(lazy.dtype in kinds, f"{where}.{name}: dtype", lazy.dtype, expected)

    def zeros() -> Tensor:
        words = stored["qzeros"].read() + (_ONES[bits] if less_one else 0)
        raw = _outputs(words, bits, outputs, awq=awq)
        return (raw - (1 << bits - 1)).view(torch.int8)

    order = None if awq else _order(f"{where}.g_idx", stored["g_idx"].read(), groups)
    own = WeightFormat(
        INT4 if bits == 4 else None,
        group,
        "zeros" if zeros().any() else "none",
        stored["scales"].dtype,
        ordered=order is not None,
    )

    def read() -> Rows:
        words = stored["qweight"].read()
        codes = pack(_outputs(words, bits, outputs, awq=True)) if awq else _bytes(words.mT, bits)
        scales = stored["scales"].read().mT.contiguous()
        if not scales.isfinite().all():
            raise RequestError(f"{where}.scales: got NaN or infinite numbers; expected finite ones")
        out = {"codes": codes, "scales": scales}
        if own.offset == "zeros":
            out["zeros"] = zeros()
        if order is not None:
            out |= {"codes": _moved(codes, order, bits), "order": order}
        if bits == 8:
            out["codes"] = out["codes"].bitwise_xor_(128).view(torch.int8)
        return out

    return Codes(own, (*leading, outputs, inputs), read)


def packed(parts: Rows, format: WeightFormat, *, less_one: bool, awq: bool = False) -> Rows:
    """Return the tensors of GPTQ or AWQ for the parts of a weight [out, in] or [E, out, in].

    Args:
        parts: The parts, in a format for which `fits` or `fits_awq` is true.
        format: Their format.
        less_one: Whether zero points are stored less one.
        awq: Whether the layout is that of AWQ.
    """
    bits, scales = 8 if format.levels is None else 4, parts["scales"]
    codes, zeros = parts["codes"].view(torch.uint8), parts.get("zeros")
    codes = codes if format.levels is not None else codes ^ 128
    inputs, groups = codes.size(-1) * 8 // bits, scales.size(-1)
    group_of = torch.arange(inputs, dtype=torch.int32, device=codes.device) // (inputs // groups)
    group_of = group_of.expand(*codes.shape[:-2], inputs)
    if "order" in parts:
        back = parts["order"].argsort(-1)
        codes, group_of = _moved(codes, back, bits), group_of.gather(-1, back)
    if zeros is None:
        zeros = torch.zeros_like(scales, dtype=torch.int8)
    words = _output_words(zeros.view(torch.uint8) + (1 << bits - 1), bits, awq=awq)
    if awq:
        wide = _output_words(unpack(codes), bits, awq=True)
        return {"qweight": wide, "qzeros": words, "scales": scales.mT.contiguous()}
    return {
        "qweight": _words(codes, bits).mT.contiguous(),
        "qzeros": words - (_ONES[bits] if less_one else 0),
        "scales": scales.mT.contiguous(),
        "g_idx": group_of.contiguous(),
    }


def fits(format: WeightFormat, shape: Shape) -> bool:
    """Return whether `packed` writes a weight of this format and shape."""
    plain = format.offset != "minimums" and not format.block and format.codes is torch.int8
    return plain and format.levels in (None, INT4) and shape[-1] % (8 if format.levels else 4) == 0


def fits_awq(format: WeightFormat, shape: Shape) -> bool:
    """Return whether `packed` writes a weight of this format and shape in the layout of AWQ."""
    grouped = format.group > 0 and not format.ordered and shape[-2] % 8 == 0
    return grouped and format.levels == INT4 and fits(format, shape)


def _order(where: str, group_of: Tensor, groups: int) -> Tensor | None:
    """Return the inputs sorted by their groups, or None if they are.

    Raises:
        RequestError: A group does not exist, or has more inputs than another.
    """
    inputs = group_of.size(-1)
    found, order = group_of.sort(dim=-1, stable=True)
    outside = found[(found < 0) | (found >= groups)].tolist()
    expect(not outside, where, (outside or [0])[0], f"groups from 0 to {groups - 1}")
    expected = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    if not torch.equal(found, expected.expand_as(found)):
        raise RequestError(
            f"{where}: got groups of different sizes; expected {inputs // groups} inputs in each"
        )
    return None if torch.equal(found, group_of) else order.int()


def _moved(codes: Tensor, order: Tensor, bits: int) -> Tensor:
    """Return codes [..., out, bytes] of inputs in another order [..., in]."""
    wide = codes if bits == 8 else unpack(codes)
    wide = wide.gather(-1, order.long().unsqueeze(-2).expand_as(wide))
    return wide if bits == 8 else pack(wide)


def _outputs(words: Tensor, bits: int, outputs: int, *, awq: bool) -> Tensor:
    """Return the numbers uint8 [..., out, m] of words int32 [..., m, out bits / 32]."""
    raw = _bytes(words, bits)
    raw = raw if bits == 8 else unpack(raw)
    if awq:
        raw = raw.unflatten(-1, (-1, 8))[..., list(_AWQ)].flatten(-2)
    return raw[..., :outputs].mT.contiguous()


def _output_words(raw: Tensor, bits: int, *, awq: bool) -> Tensor:
    """Return words int32 [..., m, out bits / 32] of what `_outputs` returns."""
    raw = F.pad(raw.mT, (0, -raw.size(-2) % (32 // bits)))
    raw = raw.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps odd strides of 1
    if awq:
        raw = raw.unflatten(-1, (-1, 8))[..., list(_PLACES)].flatten(-2)
    return _words(raw if bits == 8 else pack(raw), bits)


def _bytes(words: Tensor, bits: int) -> Tensor:
    """Return the numbers of words in new memory: bytes, or pairs, the first in the high half."""
    raw = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 4:  # in place: what is freed between what stays is lost to the process
        low = raw >> 4
        raw.bitwise_left_shift_(4).bitwise_or_(low)
    return raw


def _words(raw: Tensor, bits: int) -> Tensor:
    """Return words of what `_bytes` returns."""
    return (raw.contiguous() if bits == 8 else raw << 4 | raw >> 4).view(torch.int32)

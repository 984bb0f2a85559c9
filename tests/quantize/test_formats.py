"""Formats of 4 and 8 bits against the codes of other libraries, and against the nearest value found
by trying all.
"""

import pytest
import torch
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from transom.base.errors import RequestError
from transom.quantize.args import QuantizeArgs
from transom.quantize.fitting import rounded
from transom.quantize.formats import (
    NF4,
    Parts,
    WeightFormat,
    dequantize,
    empty_parts,
    integers,
    pack,
    quantize,
    requested,
    shape_of,
    unpack,
)

KINDS = {
    "nf4": QuantizeArgs(),
    "nf4, double": QuantizeArgs(double_quant=True),
    "fp4": QuantizeArgs(kind="fp4", group=32),
    "int4": QuantizeArgs(kind="int4", group=32),
    "int4, zeros": QuantizeArgs(kind="int4", group=128, zero_points=True),
    "int8": QuantizeArgs(kind="int8", group=0),
    "int8, zeros": QuantizeArgs(kind="int8", group=32, zero_points=True),
    "fp8": QuantizeArgs(kind="fp8", group=0),
}
BITS = {
    "nf4": 4.25,
    "nf4, double": 4.126,
    "fp4": 4.5,
    "int4": 4.5,
    "int4, zeros": 4.1875,
    "int8, zeros": 8.75,
}
# Sixty-fourths from -50 to 50, so that every division is the same everywhere.
EXACT = ((torch.arange(256) * 37 % 101) - 50).float() / 64
# What quantize_4bit(EXACT.view(2, 128), blocksize=64, quant_type="nf4") of bitsandbytes 0.50.2
# gives; all of its scales are 50 / 64.
BITSANDBYTES = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b0"
    "5d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05"
    "d18e2af4c16e18e3b05d17e29f3b05"
)
# Codes of quants.Q4_0 of gguf 0.19.0 for EXACT[:64], a block of 32 each line.
GGML = (
    [
        0,
        6,
        12,
        2,
        8,
        13,
        3,
        9,
        15,
        5,
        11,
        0,
        6,
        12,
        2,
        8,
        14,
        4,
        10,
        15,
        5,
        11,
        1,
        7,
        13,
        3,
        8,
        14,
        4,
        10,
        15,
        6,
    ],
    [
        4,
        15,
        9,
        3,
        13,
        7,
        1,
        11,
        5,
        15,
        10,
        4,
        14,
        8,
        2,
        13,
        7,
        0,
        11,
        5,
        15,
        9,
        3,
        14,
        8,
        2,
        12,
        6,
        0,
        10,
        4,
        15,
    ],
)


def gaussian(*shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def quantized(weight: torch.Tensor, args: QuantizeArgs) -> tuple[Parts, WeightFormat]:
    format = requested(args, weight.dtype)
    return quantize(weight, format), format


def relative_error(weight, args):
    return float((dequantize(*quantized(weight, args)) - weight).norm() / weight.norm())


def test_the_nf4_table_is_the_formula_of_the_paper():
    def quantiles(count):
        """Of the upper half, at even steps of probability, from 1 - (1/32 + 1/30) / 2 down to the
        middle.
        """
        steps = torch.linspace(1 - (1 / 32 + 1 / 30) / 2, 0.5, count, dtype=torch.float64)[:-1]
        return torch.special.ndtri(steps)

    expected = (
        torch.cat((-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9))).sort().values
    )
    assert torch.allclose(
        torch.tensor(NF4, dtype=torch.float64), expected / expected.max(), rtol=0, atol=2e-7
    )


def test_nf4_bytes_and_scales_are_those_of_bitsandbytes():
    parts, _ = quantized(EXACT.view(2, 128), QuantizeArgs())
    assert bytes(parts["codes"].flatten().tolist()).hex() == BITSANDBYTES
    assert parts["scales"].tolist() == [[50 / 64] * 2] * 2


def test_int4_codes_are_those_of_ggml():
    parts, format = quantized(EXACT[:64].view(2, 32), KINDS["int4"])
    assert unpack(parts["codes"]).tolist() == list(GGML)
    assert dequantize(parts, format)[0, 0] == EXACT[0], "the largest of a group is exact"


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_zeros_are_what_torch_makes_of_the_same_ranges(kind):
    weight = gaussian(8, 256) + 0.01
    weight[0, :128], weight[1, :128], weight[2] = weight[0, :128].abs(), -weight[1, :128].abs(), 0.0
    groups, last = weight.view(-1, 128), 15 if kind == "int4" else 255
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.quint8,
        qscheme=torch.per_channel_affine,
        quant_min=0,
        quant_max=last,
        eps=1e-12,
    )
    observer(groups)
    scales, zeros = observer.calculate_qparams()
    expected = torch.fake_quantize_per_channel_affine(groups, scales, zeros.int(), 0, 0, last)
    parts, format = quantized(weight, QuantizeArgs(kind=kind, group=128, zero_points=True))
    assert torch.equal(parts["zeros"].flatten().int() + (last + 1) // 2, zeros.int())
    assert torch.allclose(dequantize(parts, format).view(-1, 128), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("args", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_is_the_nearest_for_the_stored_scale(args, dtype):
    weight = gaussian(4, 256, dtype=dtype)
    weight[0, : args.group] = 0
    parts, format = quantized(weight, args)
    codes = 256 if format.levels is None else 16
    made, choices = dequantize(parts, format), []
    for code in range(codes):
        alike = parts["codes"].clone()
        alike.view(torch.uint8).fill_(code if format.levels is None else code * 17)
        choices.append((dequantize({**parts, "codes": alike}, format) - weight.float()).abs())
    nearest = torch.stack(choices).nan_to_num(torch.inf).amin(0)  # two codes are no number
    assert torch.allclose((made - weight.float()).abs(), nearest, rtol=1e-5, atol=1e-9)
    assert not made[0, : args.group].any()


@pytest.mark.parametrize("args", KINDS.values(), ids=KINDS)
def test_experts_are_quantized_as_if_alone(args):
    weight = gaussian(3, 6, 256) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)
    parts, format = quantized(weight, args)
    for e, one in enumerate(weight):
        alone = quantize(one, format)
        assert all(torch.equal(bits(parts[name][e]), bits(part)) for name, part in alone.items())
        assert torch.equal(dequantize(parts, format)[e], dequantize(alone, format))


@pytest.mark.parametrize("args", [one for one in KINDS.values() if not one.double_quant])
@pytest.mark.parametrize("shape", [(6, 256), (3, 6, 256)], ids=str)
def test_a_weight_rounded_without_parts_is_that_of_its_parts(args, shape):
    weight = gaussian(*shape, dtype=torch.bfloat16)
    parts, format = quantized(weight, args)
    assert torch.equal(rounded(weight, format), dequantize(parts, format))


def bits(part: torch.Tensor) -> torch.Tensor:
    return part.view(torch.uint8)


@pytest.mark.parametrize("args", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [(5, 256), (3, 5, 256)])
def test_any_rows_are_those_of_the_full_weight(args, shape):
    parts, format = quantized(gaussian(*shape), args)
    full = dequantize(parts, format)
    for rows in (slice(1, 4), torch.tensor([4, 0, 4])):
        assert torch.equal(dequantize(parts, format, rows), full[..., rows, :])
    for row in (-1, 5) if len(shape) == 2 else ():
        with pytest.raises(IndexError):
            dequantize(parts, format, torch.tensor([row]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 256), (2, 100, 128)])
def test_empty_parts_have_the_shapes_of_real_ones_and_the_bits_are_few(kind, shape):
    weight = gaussian(*shape, dtype=torch.bfloat16)
    parts, format = quantized(weight, KINDS[kind])
    empty = empty_parts(weight.shape, format, "meta")
    assert {name: (p.shape, p.dtype) for name, p in parts.items()} == {
        name: (p.shape, p.dtype) for name, p in empty.items()
    }
    taken = 8 * sum(part.nbytes for part in parts.values()) / weight.numel()
    assert taken == pytest.approx(BITS.get(kind, 8 + 16 / shape[-1]), rel=0.01)
    assert dequantize(empty, format).shape == shape == shape_of(parts, format)


def test_codes_and_zeros_of_gptq_are_represented():
    """Its weights are scale * (code - zero), in groups or in rows, with zeros of up to 16 or 256."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(4, 2, generator=generator).half()
    for steps, first in ((16, 0), (256, 0), (16, 1), (256, 1)):
        codes = torch.randint(0, steps, (4, 64), generator=generator)
        zeros = torch.randint(first, steps, (4, 2), generator=generator)
        expected = (codes.view(4, 2, 32) - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)
        four = steps == 16
        format = WeightFormat(integers(-8) if four else None, 32, "zeros", torch.float16)
        parts = {
            "codes": pack(codes.to(torch.uint8)) if four else (codes - 128).to(torch.int8),
            "zeros": (zeros - steps // 2).to(torch.int8),
            "scales": scales,
        }
        assert torch.equal(dequantize(parts, format), expected.view(4, 64))


def test_nf4_has_the_smaller_error_on_gaussian_weights():
    weight = gaussian(512, 1024)
    nf4, int4 = (relative_error(weight, QuantizeArgs(kind=kind)) for kind in ("nf4", "int4"))
    assert 0.09 < nf4 < 0.094 < int4 < 0.097


@pytest.mark.parametrize("outliers", [False, True])
def test_scales_in_eight_bits_cost_next_to_nothing(outliers):
    weight = gaussian(512, 1024)
    if outliers:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 1e-4] *= 30
    plain, double = (
        relative_error(weight, QuantizeArgs(double_quant=double)) for double in (False, True)
    )
    assert plain < double < 1.005 * plain


def test_weights_to_one_side_gain_by_zeros():
    weight = gaussian(64, 256).abs()
    symmetric, zeros = (
        relative_error(weight, QuantizeArgs(kind="int4", zero_points=on)) for on in (False, True)
    )
    assert zeros < 0.6 * symmetric


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"group": 48}, "group: got 48"),
        (
            {"kind": "int4", "double_quant": True},
            "double_quant: got True",
        ),
        ({"zero_points": True}, "zero_points: got True"),
        ({"kind": "fp8", "zero_points": True}, "expected kind int4 or int8 with it"),
        ({"kind": "fp8", "bits_budget": 8.0}, "bits_budget: got 8.0; expected kind int4"),
        (
            {"kind": "nf5"},
            "kind: got 'nf5'; expected one of nf4, fp4, int4, int8, fp8; did you mean 'nf4'",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(fields, words):
    with pytest.raises(RequestError, match=words):
        QuantizeArgs.from_dict(fields)


def test_a_group_must_divide_the_inputs():
    with pytest.raises(RequestError, match="group: got 64; expected a divisor of the 96 inputs"):
        quantized(gaussian(4, 96), QuantizeArgs())

"""The tensor types of ggml against the package `gguf`: numbers and bytes, bit for bit."""

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from transom.base.errors import RequestError
from transom.quantize import ggml
from transom.quantize.formats import dequantize, empty_parts

# Bits per weight in memory, beside those of the files.
BITS = {
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 8.5,  # 5.5
    "Q5_1": 9.0,  # 6
    "Q8_0": 8.5,
    "IQ4_NL": 4.5,
    "MXFP4": 4.5,  # 4.25
    "Q2_K": 5.125,  # 2.625
    "Q3_K": 4.5625,  # 3.4375
    "Q4_K": 4.625,  # 4.5
    "Q5_K": 8.625,  # 5.5
    "Q6_K": 8.5625,  # 6.5625
}


def random_blocks(name: str, *shape: int) -> torch.Tensor:
    """Bytes of every pattern. Factors are finite: some large, subnormal, zero or negative."""
    kind, generator = ggml.TYPES[name], torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (*shape, kind.bytes), generator=generator, dtype=torch.uint8)
    start = 0
    for field, size in kind.fields.items():
        if field in ("d", "m"):
            factors = raw[..., start : start + 2].contiguous().view(torch.float16)
            factors = torch.where(factors.isfinite(), factors, -1e4)
            factors.view(-1)[:4] = torch.tensor([0.0, -0.0, 6e-8, -65504.0])
            raw[..., start : start + 2] = factors.view(torch.uint8)
        elif field == "e":
            raw[..., start] = torch.arange(raw[..., 0].numel()).view(shape)  # every exponent
        start += size
    return raw.flatten(-2)


def peer(function, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(function(tensor.numpy(), GGMLQuantizationType[name]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", ggml.TYPES)
@pytest.mark.parametrize("shape", [(64, 5), (2, 32, 4)], ids=["matrix", "experts"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_numbers_are_those_of_gguf(name, shape):
    blocks = random_blocks(name, *shape)
    expected = peer(quants.dequantize, name, blocks)
    parts, format = ggml.parts(name, blocks), ggml.format_of(name)
    assert torch.equal(bits(dequantize(parts, format)), bits(expected))
    empty = empty_parts(expected.shape, format, "meta")
    assert {key: (p.shape, p.dtype) for key, p in parts.items()} == {
        key: (p.shape, p.dtype) for key, p in empty.items()
    }
    assert 8 * sum(part.nbytes for part in parts.values()) / expected.numel() == BITS[name]
    rows = dequantize(parts, format, slice(3, 9))
    assert torch.equal(bits(rows), bits(expected[..., 3:9, :]))


def test_block_sizes_are_those_of_gguf_and_four_bits_take_little_more_than_in_files():
    for name, kind in ggml.TYPES.items():
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert (kind.weights, kind.bytes) == (weights, size)
        assert ggml.row_bytes(name, 3 * weights) == 3 * size
        if "4" in name:
            assert BITS[name] <= 1.3 * 8 * size / weights


@pytest.mark.parametrize("name", ggml.DENSE)
def test_dense_types_are_views_of_the_bytes(name):
    numbers = torch.linspace(-3, 3, 128).view(2, 64).to(ggml.DENSE[name])
    assert ggml.format_of(name) is None and ggml.row_bytes(name, 64) == numbers[0].nbytes
    assert torch.equal(ggml.dense(name, numbers.view(torch.uint8)), numbers)


@pytest.mark.parametrize("name", ggml.WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_reference_quantizer(name, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) * torch.logspace(-8, 4, 64).unsqueeze(1)
    weight[0], weight[1], weight[2, :64] = 0.0, 1.0, -3.0
    weight[3] = torch.arange(256) / 2 - 64  # ties between two codes
    weight[4] = -weight[3]
    weight = weight.to(dtype)
    expected = peer(quants.quantize, name, weight.float()).view(torch.uint8)
    assert torch.equal(ggml.quantize(name, weight), expected)
    experts = ggml.quantize(name, weight.view(2, 32, 256))
    assert torch.equal(experts, expected.view(2, 32, -1))


@pytest.mark.parametrize("name", [name for name in ggml.WRITTEN if name in ggml.TYPES])
def test_parts_of_a_file_become_the_same_blocks_again(name):
    blocks = random_blocks(name, 2, 32, 3)
    assert torch.equal(ggml.blocks(name, ggml.parts(name, blocks)), blocks)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda: ggml.format_of("Q4_X"),
            "type: got 'Q4_X'; expected one of F32.*did you mean 'Q4_",
        ),
        (lambda: ggml.row_bytes("Q4_K", 32), "inputs: got 32; expected a multiple of 256"),
        (lambda: ggml.quantize("Q8_0", torch.ones(2, 33)), "inputs: got 33; expected a multiple"),
        (
            lambda: ggml.quantize("Q4_K", torch.ones(2, 256)),
            "type: got 'Q4_K'; expected one of F32",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(act, words):
    with pytest.raises(RequestError, match=words):
        act()

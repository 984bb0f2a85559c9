"""Products and blocks in C++ against the same in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import WorkError
from transom.ops import products
from transom.ops.build import library
from transom.ops.weights import DENSE, dense_weight
from transom.quantize import ggml
from transom.quantize.args import QuantizeArgs
from transom.quantize.formats import (
    FLOAT8,
    Parts,
    WeightFormat,
    dequantize,
    empty_parts,
    requested,
    shape_of,
)
from transom.quantize.leaves import plain_product
from transom.quantize.tiles import fits_tiles, in_tiles
from transom.verify import blocks
from transom.verify.findings import Finding, close, same_bits

# The same float32 numbers in another order of summation: 1e-6 at most. In 16 bits, PyTorch rounds
# the weight before the product, and both round the result.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ROWS = (1, 2, 3, 4, 7, 13, 32)
EXPERTS, THREADS = 3, 3


def formats() -> dict[str, WeightFormat]:
    """Return every format: those of `quantize` by their settings, those of ggml by their names."""
    kinds = {
        "nf4": (QuantizeArgs(), torch.bfloat16),
        "nf4, one scale per output": (QuantizeArgs(group=0), torch.float32),
        "nf4, scales of 8 bits": (QuantizeArgs(double_quant=True), torch.float32),
        "int4": (QuantizeArgs(kind="int4", group=32), torch.float16),
        "int4, zero points": (QuantizeArgs(kind="int4", zero_points=True), torch.bfloat16),
        "int8": (QuantizeArgs(kind="int8", group=128), torch.float32),
        "int8, one scale per output": (QuantizeArgs(kind="int8", group=0), torch.float16),
        "fp8": (QuantizeArgs(kind="fp8"), torch.bfloat16),
        "fp8, one scale per output": (QuantizeArgs(kind="fp8", group=0), torch.float32),
        "int8, zero points": (QuantizeArgs(kind="int8", zero_points=True), torch.float32),
    }
    own = {name: requested(args, dtype) for name, (args, dtype) in kinds.items()}
    own["int4, act-order"] = replace(own["int4"], ordered=True)
    return own | {name: block.format for name, block in ggml.TYPES.items()}


def check() -> Iterator[Finding]:
    """Compare products of every format, for odd and even sizes, few and many rows, and experts.

    Dense weights are compared too, and then the blocks that a decode plan runs in C++.

    Raises:
        WorkError: This machine has no library to compare.
    """
    if library() is None:
        raise WorkError("verify ops: this process has no products in C++ to compare")
    for name, format in formats().items():
        unit = format.group or 70
        for outputs, inputs in ((64, 8 * unit), (37, 3 * unit), (5, unit)):
            parts = random_parts((outputs, inputs), format)
            for rows in ROWS:
                for dtype in TOLERANCES:
                    case = f"{outputs} x {inputs}, {rows} rows"
                    yield _compared(name, case, parts, format, rows, dtype)
        yield from _in_tiles(name, format)
        experts = random_parts((EXPERTS, 20, 2 * unit), format)
        for e in range(EXPERTS):
            own = {key: part[e] for key, part in experts.items()}
            yield _compared(name, f"expert {e} of {EXPERTS}", own, format, 2, torch.float32)
        yield _threaded(name, format)
    for outputs, inputs in ((64, 512), (37, 210), (5, 7)):
        for rows in ROWS:
            for dtype in DENSE:
                for of_x in (torch.float32, torch.bfloat16):
                    yield _dense(outputs, inputs, rows, dtype, of_x)
    yield from blocks.check()


def _in_tiles(name: str, format: WeightFormat) -> Iterator[Finding]:
    """Compare products of codes in tiles, and the weight, if the format and this CPU have tiles."""
    shape = 48, 16 * (format.group or 64)
    parts = random_parts(shape, format)
    if not fits_tiles(parts, format):
        return
    tiles = in_tiles({key: part.clone() for key, part in parts.items()}, format)
    weights = [dequantize(one, format) for one in (tiles, parts)]
    yield same_bits(f"{name} in tiles", "weight", weights[0], weights[1], "other bits")
    for rows in ROWS:
        for dtype in TOLERANCES:
            case = f"{shape[0]} x {shape[1]}, {rows} rows"
            yield _compared(f"{name} in tiles", case, tiles, format, rows, dtype)


def random_parts(shape: tuple[int, ...], format: WeightFormat) -> Parts:
    """Return parts of a random weight, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    parts = empty_parts(shape, format, "cpu")
    for name, part in parts.items():
        drawn = torch.rand(part.shape, generator=generator)
        if name == "order":
            drawn = drawn.argsort(-1)
        elif part.dtype is FLOAT8:
            drawn = 448 * (2 * drawn - 1) ** 9  # numbers of all sizes
        elif part.dtype.is_floating_point:
            drawn = (0.5 + drawn) / 128
        else:  # no scale is the bits of a float of 8 bits that is NaN or negative
            least = -128 if part.dtype is torch.int8 and name in ("codes", "zeros") else 0
            drawn = (drawn * ((256 if part.dtype is torch.uint8 else 120) - least)).floor() + least
        part.copy_(drawn)
    return parts


def _compared(
    name: str, case: str, parts: Parts, format: WeightFormat, rows: int, dtype: torch.dtype
) -> Finding:
    """Compare one product, with a bias, of rows in a dtype."""
    x, bias = _inputs(parts, format, rows, dtype)
    measured = _product(x, bias, parts, format)
    expected = plain_product(x, bias, format, dtype, parts)
    kind = str(dtype).removeprefix("torch.")
    detail = f"{measured.flatten()[0]:.6g} instead of {expected.flatten()[0]:.6g}"
    return close(name, f"{case}, {kind}", measured, expected, TOLERANCES[dtype], detail)


def _dense(outputs: int, inputs: int, rows: int, dtype: torch.dtype, of_x: torch.dtype) -> Finding:
    """Compare two dense weights in one call. If x fits bfloat16, other instructions may be used."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(of_x).float()
    weights = torch.randn(2, outputs, inputs, generator=generator).to(dtype)
    biases = torch.randn(2, outputs, generator=generator)
    pairs = list(zip(weights, biases, strict=True))
    native = [made for made in (dense_weight(*pair) for pair in pairs) if made is not None]
    made = products.multiply(x, native)
    assert made is not None and len(made) == 2, "there is a library, and the dtypes are covered"
    expected = [F.linear(x, weight.float(), bias) for weight, bias in pairs]
    kinds = [str(kind).removeprefix("torch.") for kind in (dtype, of_x)]
    case = f"2 weights {outputs} x {inputs}, {rows} rows of {kinds[1]} numbers"
    return close(f"dense {kinds[0]}", case, torch.cat(made, 1), torch.cat(expected, 1), 1e-5, "")


def _threaded(name: str, format: WeightFormat) -> Finding:
    """Compare products on several threads with that on one; the order of summation is the same."""
    parts = random_parts((350, 8 * (format.group or 64)), format)
    x, bias = _inputs(parts, format, 32, torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, *[THREADS] * 20):
        torch.set_num_threads(threads)
        try:
            results.append(_product(x, bias, parts, format))
        finally:
            torch.set_num_threads(before)
    case = f"{THREADS} threads against one"
    return same_bits(
        name, case, torch.stack(results[1:]), torch.stack(results[:1] * 20), "other bits"
    )


def _inputs(
    parts: Parts, format: WeightFormat, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    outputs, inputs = shape_of(parts, format)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    return x, torch.randn(outputs, generator=generator).to(dtype)


def _product(x: Tensor, bias: Tensor, parts: Parts, format: WeightFormat) -> Tensor:
    y = products.product(x, bias, parts, format.levels, format.scales, format.block)
    assert y is not None, "there is a library, and every format is covered"
    return y

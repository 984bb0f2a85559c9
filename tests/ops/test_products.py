"""The leaves use the products in C++ where they can, and the numbers are those of PyTorch."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.inference.loop import generate
from transom.layers.linear import Linear
from transom.ops import products
from transom.ops.build import SWITCH
from transom.ops.weights import Weight, coded_weight, dense_weight
from transom.quantize.args import QuantizeArgs
from transom.quantize.formats import FLOAT8, WeightFormat, dequantize
from transom.quantize.methods import quantize_model
from transom.quantize.tiles import fits_tiles, in_tiles
from transom.verify import ops as verify

EXPERTS = {"num_experts": 4, "top_k": 2, "hidden_dim": 64}


def leaf() -> Linear:
    torch.manual_seed(0)
    holder = torch.nn.ModuleDict({"one": Linear(64, 24, bias=True)})
    return quantize_model(holder, QuantizeArgs(kind="int4", group=32))["one"]


@pytest.fixture
def calls(monkeypatch):
    """The number of rows of every product that C++ computes."""
    found = []
    original = products.product

    def product(x, *rest):
        y = original(x, *rest)
        if y is not None:
            found.append(x.numel() // x.size(-1))
        return y

    monkeypatch.setattr(products, "product", product)
    return found


def test_verify_ops_passes():
    assert [finding for finding in verify.check() if not finding.ok] == []


@pytest.mark.parametrize("shape", [(64,), (2, 16, 64)])
def test_few_rows_are_multiplied_in_c(shape, calls, monkeypatch):
    one, x = leaf(), torch.randn(shape)
    with torch.no_grad():
        y = one(x)
        assert calls == [x.numel() // 64]
        monkeypatch.setenv(SWITCH, "0")
        torch.testing.assert_close(y, one(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("what", ["65 rows", "no rows", "gradient", "gradient of bias", "float64"])
def test_other_products_take_the_path_of_pytorch(what, calls):
    one = leaf().requires_grad_(False)
    one.bias.requires_grad_(what == "gradient of bias")
    x = torch.randn({"65 rows": 65, "no rows": 0}.get(what, 4), 64)
    x = x.requires_grad_(what == "gradient")
    y = one(x.double() if what == "float64" else x)
    assert calls == [] and y.requires_grad == what.startswith("gradient")


def test_rows_that_are_not_contiguous_are_multiplied_as_they_are(calls):
    one, x = leaf(), torch.randn(64, 6).t()
    with torch.no_grad():
        assert torch.equal(one(x), one(x.contiguous()))
    assert calls == [6, 6]


def weights_of(
    names: list[str], outputs: int, inputs: int, dtype: torch.dtype = torch.float32
) -> list[Weight]:
    made = []
    for name in names:
        format = verify.formats()[name]
        parts = verify.random_parts((outputs, inputs), format)
        kind = (format.levels, format.scales, format.block)
        made.append(coded_weight(parts, *kind, None, dtype))
    return made


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_weights_of_several_formats_share_a_call(rows):
    """They want x in different orders, one after the other."""
    names = ["Q4_0", "nf4", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "nf4, one scale per output", "Q4_1"]
    weights = weights_of(names, 30, 512)
    weights.append(dense_weight(torch.randn(30, 512), None))
    x = torch.randn(rows, 512)
    together = products.multiply(x, weights)
    alone = [products.multiply(x, [weight])[0] for weight in weights]
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("rows", [1, 5])
def test_weights_of_several_orders_share_a_call(rows):
    """Neighbours of the same order share the inputs in this order, also if they have copies."""
    orders = [None, torch.arange(63, -1, -1), torch.arange(63, -1, -1), torch.randperm(64), None]
    weights, expected, x = [], [], torch.randn(rows, 64)
    for order in orders:
        format = replace(verify.formats()["int4"], ordered=order is not None)
        parts = verify.random_parts((20, 64), format)
        if order is not None:
            parts["order"].copy_(order)
        kind = (format.levels, format.scales, format.block)
        weights.append(coded_weight(parts, *kind, None, torch.float32))
        expected.append(x @ dequantize(parts, format).T)
    for y, wanted in zip(products.multiply(x, weights), expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
def test_every_float_of_8_bits_is_multiplied_exactly(dtype, tiled):
    """The smallest are subnormal; a row of a unit matrix picks the numbers of its input."""
    bits = torch.arange(256, dtype=torch.uint8)
    codes = torch.where(bits & 127 == 127, 0, bits).view(FLOAT8).view(4, 64).repeat(4, 1)
    format, parts = WeightFormat(None, 32, codes=FLOAT8), {"codes": codes}
    parts["scales"] = torch.ones(16, 2)
    if tiled and not fits_tiles(parts, format):
        pytest.skip("this CPU does not multiply tiles")
    own = in_tiles(parts, format) if tiled else parts
    weight = coded_weight(own, None, torch.float32, 0, None, dtype)
    for rows in (1, 4, 64):
        for x in torch.eye(64).split(rows):
            (y,) = products.multiply(x, [weight])
            assert torch.equal(y, x @ codes.float().T)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K"])
def test_rows_of_bfloat16_numbers_keep_their_bits_in_two_bytes(name):
    """Numbers of a size lose nothing, even in a bfloat16 model."""
    (short,) = weights_of([name], 20, 256, torch.bfloat16)
    (full,) = weights_of([name], 20, 256)
    x = (1 + torch.rand(1, 256)).bfloat16().float()
    (y,), (expected,) = products.multiply(x, [short]), products.multiply(x, [full])
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_a_bad_number_of_x_reaches_every_output(name, bad, dtype):
    """Also where rows become integers."""
    (weight,) = weights_of([name], 9, 128, dtype)
    x = torch.randn(2, 128).to(dtype).float()
    x[1, 70] = bad
    (y,) = products.multiply(x, [weight])
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_a_row_of_zeros_and_tiny_numbers_are_multiplied():
    (weight,) = weights_of(["Q8_0"], 9, 128)
    x = torch.zeros(2, 128)
    x[1] = 1e-42  # its largest has no finite reciprocal
    (y,) = products.multiply(x, [weight])
    assert y.abs().max() < 1e-37  # a normal number, since training may flush others to zero


def test_threads_of_python_may_multiply_at_once(monkeypatch):
    format = verify.formats()["Q4_K"]
    parts = verify.random_parts((600, 512), format)
    rows = torch.randn(40, 4, 512)
    expected = [
        products.product(x, None, parts, format.levels, format.scales, format.block) for x in rows
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with ThreadPoolExecutor(4) as executor:
        got = executor.map(
            lambda x: products.product(x, None, parts, format.levels, format.scales, format.block),
            rows,
        )
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("changes", [{}, {"moe_args": EXPERTS}], ids=["dense", "experts"])
def test_greedy_tokens_are_those_without_the_ops(changes, calls, monkeypatch):
    model = random_model(tiny_args(**changes, dim=64, hidden_dim=96))
    quantize_model(model, QuantizeArgs(kind="int8", group=32))
    prompts = [[1, 2, 3], [9, 8, 7]]
    got = generate(model, prompts, max_new_tokens=20)
    assert len(calls) > 10
    monkeypatch.setenv(SWITCH, "0")
    assert torch.equal(got, generate(model, prompts, max_new_tokens=20))

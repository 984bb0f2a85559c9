"""Products of 8-bit floats against the same sums in float64."""

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.layers.inputs import TransformerInput
from transom.quantize import scaled
from transom.quantize.args import QuantizeArgs
from transom.quantize.formats import dequantize, quantize, requested
from transom.quantize.leaves import plain_product
from transom.quantize.methods import quantize_model

FP8 = QuantizeArgs("fp8", group=0)


def operands(device="cpu", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 64), (48, 64)))
    x[0, 0] = 0  # a row without a largest number
    format = requested(FP8, torch.float32)
    parts = {name: part.to(device) for name, part in quantize(weight, format).items()}
    return x.to(device, dtype), torch.arange(48.0, device=device), parts, format


def check(device, dtype):
    """Compare the product with its own rounding, and with inputs that are not rounded."""
    x, bias, parts, format = operands(device, dtype)
    got = scaled.product(x, bias, parts)
    assert got.dtype is dtype
    wide = x.double()
    steps = wide.abs().amax(-1, True) / 448
    codes = (x.float() / steps.float().clamp(min=1e-30)).to(torch.float8_e4m3fn).double()
    weight = dequantize(parts, format).double()
    twin = (codes * steps) @ weight.T + bias
    torch.testing.assert_close(got.double(), twin, rtol=2**-7, atol=2**-4)
    whole = plain_product(x.float(), bias, format, torch.float32, parts)
    assert (got - whole).norm() < 0.05 * (whole - bias).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_are_rounded_row_by_row(dtype):
    try:
        check("cpu", dtype)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no product of 8-bit floats on the CPU: {error}")


def test_only_gpus_multiply_8_bit_floats():
    x, _, parts, _ = operands()
    assert not scaled.takes(x, parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_products_are_those_of_8_bit_floats():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply 8-bit floats")
    x, _, parts, _ = operands("cuda")
    assert scaled.takes(x, parts) and not scaled.takes(x.float(), parts)
    check("cuda", torch.bfloat16)
    model = quantize_model(random_model(tiny_args(hidden_dim=64), std=0.1), FP8).bfloat16().cuda()
    inputs = TransformerInput(torch.tensor([[1, 5, 9]], device="cuda"))
    with torch.no_grad():
        rounded = model(inputs).logits.float()
        expected = model.float()(inputs).logits
    assert (rounded - expected).norm() < 0.1 * expected.norm()

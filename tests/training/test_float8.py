"""Training in 8-bit floats: gradients near those of 16 bits, and devices that are refused."""

import pytest
import torch
import torch.nn.functional as F

from tests.training.runs import tiny_args
from transom.base.errors import RequestError
from transom.training.loop.float8 import Float8Product
from transom.training.loop.setup import open_run


def operands(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 24, 64), (48, 64), (2, 24, 48))
    drawn = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
    x, weight, grad = (one.bfloat16() for one in drawn)
    return x.requires_grad_(), weight.requires_grad_(), grad


def check(device):
    """Compare the product and its gradients with those of the same numbers in float64."""
    x, weight, grad = operands(device)
    y = Float8Product.apply(x, weight)
    y.backward(grad)
    wide = [one.detach().double().requires_grad_() for one in (x, weight)]
    expected = F.linear(*wide)
    expected.backward(grad.double())
    # 3 bits of mantissa in both factors; the gradient of the weight has factors of 7 bits.
    for found, right, limit in (
        (y, expected, 0.05),
        (x.grad, wide[0].grad, 0.05),
        (weight.grad, wide[1].grad, 0.01),
    ):
        gap = (found.double() - right).norm() / right.norm()
        assert gap < limit
    assert (y.double() - expected).norm() > 1e-3 * expected.norm()  # it is rounded to 8 bits


def test_gradients_are_near_those_of_16_bits():
    try:
        check("cpu")
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no product of 8-bit floats on the CPU: {error}")


def test_a_cpu_is_refused(tmp_path):
    with pytest.raises(RequestError, match="float8: got True; expected false: only GPUs"):
        open_run(tiny_args(tmp_path, "float8=true"), quiet=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_learns_as_in_16_bits(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply 8-bit floats")
    check("cuda")
    losses = {}
    for word in ("float8=true", "float8=false"):
        words = (word, "device=cuda", "dtype=bfloat16", f"out={tmp_path}/{word}", "steps=60")
        trainer = open_run(tiny_args(tmp_path, *words), quiet=True)
        losses[word] = [trainer.step().loss for _ in range(60)][-1]
    assert losses["float8=true"] == pytest.approx(losses["float8=false"], rel=0.1)

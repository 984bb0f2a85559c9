"""States in 8-bit codes: how far they are from the states, and their edges."""

import pytest
import torch

from transom.cache.codes import from_codes, to_codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_value_is_wrong_by_at_most_half_a_step_of_its_head(dtype):
    x = (torch.randn(3, 50, 2, 16) * torch.logspace(-3, 3, 50)[:, None, None]).to(dtype)
    codes, scales = to_codes(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert scales.shape == (3, 50, 2, 1)
    steps = x.double().abs().amax(-1, keepdim=True) / 127
    error = (from_codes(codes, scales, dtype).double() - x.double()).abs()
    # Rounding the scale and the product adds at most one rounding of the largest value each.
    assert (error <= steps / 2 + 2 * 127 * steps * torch.finfo(dtype).eps).all()


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    codes, scales = to_codes(x)
    dense = from_codes(codes, scales, torch.float32)
    assert torch.equal(dense[0], torch.zeros(2))
    assert not dense[1:].isfinite().any()

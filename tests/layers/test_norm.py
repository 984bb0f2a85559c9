"""RMSNorm against torch's in full precision and against transformers' order of casts in half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from transom.layers.norm import RMSNorm, rmsnorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rmsnorm_is_torchs(dtype):
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x[0, 0] = 1e-4  # the size at which eps, and its place under the root, decide
    norm = RMSNorm(32, 1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), norm.weight, 1e-5), **tolerance)
    torch.testing.assert_close(rmsnorm(x, 1e-5), F.rms_norm(x, (32,), None, 1e-5), **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_bit_equal_to_transformers_llama(dtype):
    """Float32 inside, cast, then the weight: the squares of 300 would overflow float16."""
    x = (torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    mine, theirs = RMSNorm(64, 1e-5).to(dtype), LlamaRMSNorm(64, 1e-5).to(dtype)
    with torch.no_grad():
        weight = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
        mine.weight.copy_(weight), theirs.weight.copy_(weight)
    out = mine(x)
    assert out.dtype is dtype
    assert out.isfinite().all()
    assert torch.equal(out, theirs(x))

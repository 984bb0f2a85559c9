"""RMSNorm against torch's in full precision and against transformers' order of casts in half
precision.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from transom.layers.norm import RMSNorm, make_norm, rmsnorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rmsnorm_is_torchs(dtype):
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )
    x[0, 0] = 1e-4  # the size at which eps, and its place under the root, decide
    norm = RMSNorm(32, 1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    )
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "peer"), [("rms_wide", Olmo2RMSNorm), ("rms_plus_one", Gemma2RMSNorm)]
)
def test_where_the_weight_is_applied_is_bit_equal_to_transformers(kind, peer, dtype):
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    mine, theirs = make_norm(kind, 64, 1e-5).to(dtype), peer(64, 1e-5).to(dtype)
    with torch.no_grad():
        weight = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
        mine.weight.copy_(weight), theirs.weight.copy_(weight)
    assert mine(x).dtype is dtype
    tolerance = (
        0 if dtype is torch.bfloat16 else 1e-6
    )  # our one fused kernel rounds in another order
    torch.testing.assert_close(mine(x), theirs(x), rtol=tolerance, atol=tolerance)


def test_layer_norm_is_torchs_and_float32_inside():
    x = (torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 300).to(torch.float16)
    mine = make_norm("layer", 64, 1e-5)
    torch.nn.init.uniform_(mine.weight, 0.5, 1.5), torch.nn.init.normal_(mine.bias)
    expected = F.layer_norm(x.float(), (64,), mine.weight, mine.bias, 1e-5)
    torch.testing.assert_close(mine(x), expected.half())
    assert mine(x).isfinite().all(), "the squares of 300 overflow float16"

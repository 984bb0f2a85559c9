"""Training with matrix products of 8-bit floats, on GPUs that multiply them.

Inputs, weights and output gradients are rounded row by row before a product. The product that makes
the gradient of a weight stays in 16 bits, since a weight learns from sums over all tokens. This is
the recipe `rowwise_with_gw_hp` of torchao (pytorch/ao, float8/README.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transom.base.errors import expect
from transom.base.runtime import dtype_name
from transom.layers.linear import Linear
from transom.models.llm import LLM
from transom.quantize import scaled


class Float8Product(torch.autograd.Function):
    """x W^T of x [..., in] and W [out, in] in 16 bits, both rounded to 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return scaled.product(x, None, scaled.rounded(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = gradients, ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = scaled.product(grad, None, scaled.rounded(weight.T))
        if ctx.needs_input_grad[1]:
            of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return of_x, of_weight


def use_float8(model: LLM, device: torch.device, dtype: torch.dtype) -> int:
    """Let the dense linears of all blocks train with products of 8-bit floats.

    Other calls, and leaves whose sizes are no multiples of 16, keep their dtype.

    Args:
        model: A model that trains under autocast. It is changed in place.
        device: The device on which it trains.
        dtype: The dtype of autocast.

    Returns:
        The number of leaves that changed.

    Raises:
        RequestError: If the device has no such products, or the dtype is not bfloat16.
    """
    expected = "false: only GPUs of capability 8.9 or more multiply 8-bit floats"
    expect(scaled.works(device), "float8", True, expected)
    expect(dtype == torch.bfloat16, "dtype", dtype_name(dtype), "bfloat16 with float8")
    leaves = [
        leaf
        for leaf in model.layers.modules()
        if type(leaf) is Linear and all(size % 16 == 0 for size in leaf.weight.shape)
    ]
    for leaf in leaves:
        leaf.forward = partial(_forward, leaf)  # type: ignore[method-assign]
    return len(leaves)


def _forward(leaf: Linear, x: Tensor) -> Tensor:
    fits = all(size % 16 == 0 for size in leaf.weight.shape)  # of this rank's part
    if not (fits and leaf.training and torch.is_grad_enabled()):
        return F.linear(x, leaf.weight, leaf.bias)
    dtype = torch.get_autocast_dtype(x.device.type)
    y: Tensor = Float8Product.apply(x.to(dtype), leaf.weight.to(dtype))
    return y if leaf.bias is None else y + leaf.bias.to(dtype)

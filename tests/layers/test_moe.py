"""Mixture of experts against one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import tiny_args
from transom.layers.linear import GroupedLinear
from transom.layers.moe import MoE

ROUTINGS = {
    "mixtral": {"routing": "softmax", "normalize": True},
    "qwen": {"routing": "softmax", "normalize": False},
    "llama4": {"routing": "sigmoid", "shared_expert": True},
}


def build(dtype: torch.dtype = torch.float64, **moe: object) -> MoE:
    """A mixture of 5 experts, 2 per token, with random weights."""
    args = tiny_args(dim=16, n_heads=2, moe_args={"num_experts": 5, "top_k": 2, "hidden_dim": 24, **moe})
    module = MoE(args.layers[0]).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return module


def draw(rows: int = 2, count: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, count, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def swiglu(x: Tensor, gate: Tensor, value: Tensor, out: Tensor) -> Tensor:
    return out @ (F.silu(gate @ x) * (value @ x))


def token_by_token(module: MoE, x: Tensor) -> Tensor:
    """The published formulas: Mixtral and Qwen weigh what experts return, Llama 4 what they are given."""
    experts, rows = module.experts, []
    for token in x.flatten(0, 1):
        logits = module.router.weight @ token
        chosen = sorted(range(5), key=lambda e: -logits[e].item())[:2]
        total = torch.zeros_like(token)
        for e in chosen:
            matrices = (experts.w_gate.weight[e], experts.w_value.weight[e], experts.w_out.weight[e])
            if module.moe.routing == "sigmoid":
                total = total + swiglu(torch.sigmoid(logits[e]) * token, *matrices)
                continue
            weight = logits.exp()[e] / logits.exp().sum()
            if module.moe.normalize:
                weight = logits.exp()[e] / logits.exp()[chosen].sum()
            total = total + weight * swiglu(token, *matrices)
        if module.shared_expert is not None:
            shared = module.shared_expert
            total = total + swiglu(token, shared.w_gate.weight, shared.w_value.weight, shared.w_out.weight)
        rows.append(total)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_mixture_equals_one_token_at_a_time_with_gradients(routing):
    module, x = build(**ROUTINGS[routing]), draw().requires_grad_()
    results = []
    for y in (module(x)[0], token_by_token(module, x)):
        pull = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
        results.append((y, *torch.autograd.grad(y, [x, *module.parameters()], pull)))
    names = ["y", "grad x", *(name for name, _ in module.named_parameters())]
    for name, mine, theirs in zip(names, *results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("widths", [(16, 24), (13, 7)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_its_loop_even_for_an_expert_without_tokens(dtype, widths):
    layer = GroupedLinear(4, *widths).to(dtype)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(layer.weight, generator=generator)
    rows = torch.randn(10, widths[0], generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor([4, 4, 9, 10])  # the second expert got nothing
    pull = torch.randn(10, widths[1], generator=generator).to(dtype)
    results = [
        (y, *torch.autograd.grad(y, (rows, layer.weight), pull))
        for y in (layer(rows, ends), layer.loop(rows, ends))
    ]
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    for grouped, loop in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=tolerance, atol=tolerance)
    assert (results[0][2][1] == 0).all(), "an expert without tokens has no gradient"


def test_statistics_count_real_tokens_only():
    module, x = build(), draw()
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 4:] = False
    _, counted = module(x, valid)
    alone = [module(row[None, :length])[1] for row, length in zip(x, (9, 4), strict=True)]
    assert counted.tokens.item() == 13
    assert counted.picks_E.sum().item() == 13 * 2
    torch.testing.assert_close(counted.picks_E, alone[0].picks_E + alone[1].picks_E)
    torch.testing.assert_close(counted.probabilities_E, alone[0].probabilities_E + alone[1].probabilities_E)
    assert counted.probabilities_E.requires_grad and not counted.picks_E.requires_grad


def test_order_of_tokens_does_not_matter():
    module, x = build(**ROUTINGS["llama4"]), draw(1, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module(x[:, order])[0], module(x)[0][:, order], rtol=0, atol=1e-12)

"""The balancing loss is Mixtral's."""

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from transom.layers.moe import statistics
from transom.training.loss import balancing_loss


def test_equals_transformers():
    logits = [torch.randn(14, 6, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 7)
    mask[1, 5:] = 0
    expected = load_balancing_loss_func(tuple(logits), num_experts=6, top_k=2, attention_mask=mask)
    ours = balancing_loss([statistics(one.topk(2, -1).indices, one, mask.bool()) for one in logits])
    assert torch.allclose(ours, expected)
    (got,) = torch.autograd.grad(ours, logits[0])
    (want,) = torch.autograd.grad(expected, logits[0])
    assert torch.allclose(got, want, atol=1e-7)

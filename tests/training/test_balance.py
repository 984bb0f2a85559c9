"""Balancing losses against transformers', the same under any split, and what they are for: routers
that recover.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func as switch_loss,
)
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.runtime import one_thread
from transom.config.layer_args import MoeArgs
from transom.evaluation.trace import recording
from transom.layers.inputs import TransformerInput
from transom.layers.moe import RouterStatistics
from transom.models.llm import LLM
from transom.training.losses.balance import (
    RouterCounts,
    health_row,
    mixtures,
    router_losses,
    router_sums,
    update_choice_biases,
)


def auxiliary(router: list[RouterStatistics], moe: MoeArgs) -> Tensor:
    """The loss itself, without its coefficient."""
    aux = router_losses(router, moe).aux
    assert aux is not None
    return aux


def seen(logits_BTE: Tensor, top_k: int, mask_BT: Tensor | None = None) -> RouterStatistics:
    """What a layer with these logits reports."""
    logits = logits_BTE.flatten(0, 1)
    ids = logits.topk(top_k, -1).indices
    if mask_BT is not None:
        ids = ids.masked_fill(~mask_BT.bool().view(-1, 1), -1)
    return RouterStatistics(ids, ids, logits, len(logits_BTE), "softmax")


def draw(layers: int, rows: int, count: int, experts: int = 6) -> list[Tensor]:
    """Logits of several layers."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, count, experts, generator=generator).requires_grad_()
        for _ in range(layers)
    ]


def equal_with_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-4)


def test_mixtral_batch_is_transformers_with_padding():
    logits, mask = draw(3, 2, 7), torch.ones(2, 7)
    mask[1, 5:] = 0
    theirs = mixtral_loss(
        tuple(x.flatten(0, 1) for x in logits), num_experts=6, top_k=2, attention_mask=mask
    )
    router = [seen(x, 2, mask) for x in logits]
    moe = MoeArgs(num_experts=6, top_k=2, balance="mixtral", balance_scope="batch")
    equal_with_gradients(auxiliary(router, moe), theirs, logits)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_switch_is_transformers_averaged_over_layers(scope):
    """Its groups are the rows; the batch is one group."""
    logits = draw(2, 3, 7)
    groups = logits if scope == "sequence" else [x.reshape(1, 21, 6) for x in logits]
    theirs = torch.stack([switch_loss(x.softmax(-1), x.argmax(-1)) for x in groups]).mean()
    moe = MoeArgs(num_experts=6, top_k=1, balance="switch", balance_scope=scope)
    equal_with_gradients(auxiliary([seen(x, 1) for x in logits], moe), theirs, logits)


def test_z_loss_is_transformers_and_weighs_in_by_its_coefficient():
    logits = draw(2, 3, 7)
    theirs = torch.stack([router_z_loss_func(x) for x in logits]).mean()
    moe = MoeArgs(num_experts=6, z_loss_coef=0.5, balance="none")
    losses = router_losses([seen(x, 2) for x in logits], moe)
    equal_with_gradients(losses.z, theirs, logits)
    equal_with_gradients(losses.weighted, 0.5 * theirs, logits)
    assert losses.aux is None and losses.tokens.item() == 21


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(("balance", "even"), [("mixtral", 2.0), ("switch", 1.0)])
def test_even_use_gives_the_published_number(balance, even, scope):
    ids = torch.arange(24).view(12, 2) % 6
    layer = RouterStatistics(ids, ids, torch.zeros(12, 6), 2, "softmax")
    moe = MoeArgs(num_experts=6, top_k=2, balance=balance, balance_scope=scope)
    assert auxiliary([layer, layer], moe).item() == pytest.approx(even)


def weighted_total(parts: list[list[RouterStatistics]], moe: MoeArgs) -> Tensor:
    """A step over several micro-batches or ranks, as training adds them up."""
    losses = [router_losses(part, moe) for part in parts]
    step_tokens = sum(one.tokens for one in losses)
    return sum(one.weighted * one.tokens for one in losses) / step_tokens


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (3, 3), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("balance", ["mixtral", "switch"])
def test_scope_sequence_does_not_depend_on_how_rows_are_split(balance, sizes):
    logits, mask = draw(2, 6, 9), torch.arange(9) < torch.tensor([9, 3, 9, 5, 1, 0])[:, None]
    moe = MoeArgs(num_experts=6, balance=balance, aux_loss_coef=0.1, z_loss_coef=0.1)
    whole = weighted_total([[seen(x, 2, mask) for x in logits]], moe)
    splits = zip(*(x.split(sizes) for x in logits), mask.split(sizes), strict=True)
    parts = [[seen(x, 2, part_mask) for x in part] for *part, part_mask in splits]
    equal_with_gradients(weighted_total(parts, moe), whole, logits)


def test_a_bias_moves_against_the_load():
    model = mixture("bias")
    update_choice_biases(model, torch.tensor([[9, 1, 1, 1], [3, 3, 3, 3]]), 0.25)
    first, second = (module.router.choice_bias for module in mixtures(model))
    assert first.tolist() == [-0.25, 0.25, 0.25, 0.25] and second.tolist() == [0, 0, 0, 0]
    assert not first.requires_grad


def test_counts_add_up_and_tell_the_routers_health():
    model = mixture("mixtral", expert_capacity=0.5).train()
    tokens = random_tokens(4, 12)
    whole = RouterCounts.of(map(router_sums, model(TransformerInput(tokens)).router))
    parts = [
        RouterCounts.of(map(router_sums, model(TransformerInput(part)).router))
        for part in tokens.split(1)
    ]
    for *some, total in zip(*parts, whole, strict=True):
        torch.testing.assert_close(sum(some), total)
    row = health_row(whole)
    assert whole.picks_LE.sum(1).tolist() == [48, 48]
    assert row["dropped_tokens"] == pytest.approx((1 - whole.load_LE.sum(1) / 48).tolist())
    assert [sum(load) for load in row["expert_load"]] == pytest.approx([1, 1])
    assert row["expert_load"][0] == pytest.approx(
        (whole.load_LE[0] / whole.load_LE[0].sum()).tolist()
    )
    assert all(0 < entropy < math.log(4) for entropy in row["router_entropy"])
    for module in mixtures(model):
        module.router.bias[2] = -100.0
    row = health_row(RouterCounts.of(map(router_sums, model(TransformerInput(tokens)).router)))
    assert row["dead_experts"] == [1, 1]


# -- what it is for
# ------------------------------------------------------------------------------------


def mixture(balance: str, scope: str = "sequence", **fields: Any) -> LLM:
    """Two layers of four experts, one per token, with random weights and no gradient yet."""
    moe = {"num_experts": 4, "top_k": 1, "normalize": False, "hidden_dim": 16, "router_bias": True}
    moe |= {"balance": balance, "balance_scope": scope, **fields}
    model = random_model(tiny_args(dim=16, n_heads=2, n_kv_heads=2, moe_args=moe))
    for module in mixtures(model):
        module.router.bias.requires_grad_(False).zero_()
        if module.router.choice_bias is not None:
            module.router.choice_bias.zero_()
    return model


def busiest(model: LLM, tokens: Tensor) -> list[float]:
    """Share of the tokens that the busiest expert of each layer gets."""
    counts = RouterCounts.of(map(router_sums, model.eval()(TransformerInput(tokens)).router))
    return [max(load) for load in health_row(counts)["expert_load"]]


@torch.no_grad()
def plant(model: LLM, tokens: Tensor, share: float) -> None:
    """Give the first expert of every layer that share of the tokens, by the router's bias."""
    for module in mixtures(model):
        with recording(model) as recorded:
            model.eval()(TransformerInput(tokens))
        logits_TE = recorded.outputs[module.router][2]
        margin_T = logits_TE[:, 1:].amax(1) - logits_TE[:, 0]
        module.router.bias[0] = margin_T.quantile(share)


def train(model: LLM, tokens: Tensor, steps: int) -> None:
    moe = model.args.moe_args
    assert moe is not None
    for module in mixtures(model):
        module.router.bias.requires_grad_()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        output = model(TransformerInput(tokens[:, :-1]))
        loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + router_losses(output.router, moe).weighted).backward()
        optimizer.step()
        optimizer.zero_grad()
        if moe.balance == "bias":
            update_choice_biases(
                model,
                RouterCounts.of(map(router_sums, output.router)).picks_LE,
                moe.bias_update_rate,
            )


MODES = [(b, s) for b in ("mixtral", "switch") for s in ("batch", "sequence")] + [
    ("bias", "sequence")
]


@pytest.mark.parametrize(("balance", "scope"), [*MODES, ("none", "sequence")])
def test_a_router_that_sends_nine_tenths_to_one_expert_recovers_with_balancing_only(balance, scope):
    model, tokens = (
        mixture(balance, scope, aux_loss_coef=0.1, bias_update_rate=0.02),
        random_tokens(8, 33),
    )
    with one_thread():
        plant(model, tokens[:, :-1], 0.9)
        assert all(0.88 <= share <= 0.92 for share in busiest(model, tokens[:, :-1]))
        train(model, tokens, 60)
    shares = busiest(model, tokens[:, :-1])
    if balance == "none":
        assert min(shares) > 0.6
    else:
        assert max(shares) < 0.45

"""Mixture of experts against one token at a time; capacity, padding and jitter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.helpers import tiny_args
from transom.layers.linear import GroupedLinear
from transom.layers.moe import LocalDispatcher, MoE, within_capacity
from transom.training.losses.balance import router_sums

ROUTINGS = {
    "mixtral": {"routing": "softmax", "normalize": True},
    "qwen": {"routing": "softmax", "normalize": False},
    "llama4": {"routing": "sigmoid", "shared_expert": True},
}


def build(dtype: torch.dtype = torch.float64, **moe: object) -> MoE:
    """A mixture of 5 experts, 2 per token, with random weights."""
    args = tiny_args(
        dim=16, n_heads=2, moe_args={"num_experts": 5, "top_k": 2, "hidden_dim": 24, **moe}
    )
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


def weighed_sum(module: MoE, token: Tensor, chosen: list[int]) -> Tensor:
    """Mixtral's formula for given experts: weights are those of the experts that do compute."""
    experts, odds, total = (
        module.experts,
        (module.router.weight @ token).exp(),
        torch.zeros_like(token),
    )
    for e in chosen:
        matrices = (experts.w_gate.weight[e], experts.w_value.weight[e], experts.w_out.weight[e])
        total = total + odds[e] / odds[chosen].sum() * swiglu(token, *matrices)
    return total


def token_by_token(module: MoE, x: Tensor) -> Tensor:
    """The published formulas: Mixtral and Qwen weigh what experts return, Llama 4 what they are
    given.
    """
    experts, rows = module.experts, []
    for token in x.flatten(0, 1):
        logits = module.router.weight @ token
        chosen = sorted(range(5), key=lambda e: -logits[e].item())[:2]
        total = torch.zeros_like(token)
        for e in chosen:
            matrices = (
                experts.w_gate.weight[e],
                experts.w_value.weight[e],
                experts.w_out.weight[e],
            )
            if module.moe.routing == "sigmoid":
                total = total + swiglu(torch.sigmoid(logits[e]) * token, *matrices)
                continue
            weight = logits.exp()[e] / logits.exp().sum()
            if module.moe.normalize:
                weight = logits.exp()[e] / logits.exp()[chosen].sum()
            total = total + weight * swiglu(token, *matrices)
        if module.shared_expert is not None:
            shared = module.shared_expert
            total = total + swiglu(
                token, shared.w_gate.weight, shared.w_value.weight, shared.w_out.weight
            )
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
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(16, 24), (13, 7)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_its_loop_even_for_an_expert_without_tokens(dtype, widths, bias):
    layer = GroupedLinear(4, *widths, bias).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    rows = torch.randn(12, widths[0], generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor(
        [4, 4, 9, 10]
    )  # the second expert got nothing, the last two rows belong to none
    pull = torch.randn(10, widths[1], generator=generator).to(dtype)
    results = [
        (y, *torch.autograd.grad(y, [rows, *layer.parameters()], pull))
        for y in (layer(rows, ends)[:10], layer.loop(rows, ends)[:10])
    ]
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    (y, d_rows, *d_weights), (loop_y, loop_d_rows, *loop_d_weights) = results
    for grouped, loop in zip(
        (y, d_rows[:10], *d_weights), (loop_y, loop_d_rows[:10], *loop_d_weights), strict=True
    ):
        torch.testing.assert_close(grouped, loop, rtol=tolerance, atol=tolerance)
    assert all((grad[1] == 0).all() for grad in d_weights), (
        "an expert without tokens has no gradient"
    )


def test_shapes_without_numbers_do_not_decide_how_numbers_are_multiplied():
    layer, ends = GroupedLinear(2, 16, 24), torch.tensor([3, 5])
    assert layer.to("meta")(torch.empty(5, 16, device="meta"), ends.to("meta")).shape == (5, 24)
    with FakeTensorMode():
        whole = MoE(tiny_args(dim=16, n_heads=2, moe_args={"hidden_dim": 24}).layers[0])
        assert whole(torch.empty(2, 9, 16))[0].shape == (2, 9, 16)
    # As before: the trial of the grouped product must not have been made with shapes.
    layer = GroupedLinear(2, 16, 24)
    torch.nn.init.ones_(layer.weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "loop", None)
        assert (layer(torch.ones(5, 16), ends) == 16).all()


@pytest.mark.parametrize(
    "fields", [{}, {"expert_bias": True}, {"routing": "sigmoid"}], ids=["plain", "bias", "input"]
)
def test_padding_changes_nothing_and_gets_nothing(fields):
    module, x = build(torch.float32, **fields), draw(dtype=torch.float32)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 4:], valid[1, 7:] = False, False
    padded = x.masked_fill(~valid[..., None], 1e4).requires_grad_()
    y, _ = module(padded, valid)
    assert (y[~valid] == 0).all()
    y.sum().backward()
    assert (padded.grad[~valid] == 0).all()
    got = [weight.grad for weight in module.parameters()]
    module.zero_grad()
    for row, y_TD, length in zip(x, y, (4, 7), strict=True):
        alone = module(row[None, :length])[0][0]
        torch.testing.assert_close(y_TD[:length], alone, rtol=1e-5, atol=1e-5)
        alone.sum().backward()
    for mine, alone in zip(got, (weight.grad for weight in module.parameters()), strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)


def test_a_call_of_padding_alone_is_zero():
    module, x = build(torch.float32), draw(dtype=torch.float32).requires_grad_()
    y, statistics = module(x, torch.zeros(2, 9, dtype=torch.bool))
    seen = router_sums(statistics)
    y.sum().backward()
    assert (y == 0).all() and (x.grad == 0).all() and seen.tokens_B.tolist() == [0, 0]
    assert (
        seen.picks_BE.sum()
        == seen.probabilities_BE.sum()
        == seen.squared_logsumexp
        == seen.entropy
        == 0
    )


def test_dropped_rows_stand_behind_all_ends_and_count_zero():
    dispatcher, x = LocalDispatcher(3), torch.arange(8.0).view(4, 2).requires_grad_()
    ids = torch.tensor([[2, -1], [0, 2], [-1, -1], [-1, 0]])
    rows, ends, handle = dispatcher.dispatch(x, ids)
    assert ends.tolist() == [2, 2, 4]
    assert rows[:4].tolist() == x[[1, 3, 0, 1]].tolist()
    junk = torch.full(
        (4, 2), math.nan
    )  # what a grouped product may leave there, in both directions
    y = dispatcher.combine(torch.cat((rows[:4], junk)), handle, torch.full((4, 2), 0.5))
    torch.testing.assert_close(y, x * torch.tensor([0.5, 1.0, 0.0, 0.5])[:, None])
    (grad,) = torch.autograd.grad(rows, x, torch.cat((torch.ones(4, 2), junk)))
    assert grad[:, 0].tolist() == [1, 2, 0, 1]


def test_statistics_count_real_tokens_by_row():
    module, x = build(), draw()
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 4:] = False
    counted = router_sums(module(x, valid)[1])
    alone = [
        router_sums(module(row[None, :length])[1]) for row, length in zip(x, (9, 4), strict=True)
    ]
    assert counted.tokens_B.tolist() == [9, 4]
    for name in ("picks_BE", "probabilities_BE"):
        torch.testing.assert_close(
            getattr(counted, name), torch.cat([getattr(one, name) for one in alone])
        )
    for name in ("squared_logsumexp", "entropy", "load_E", "dropped"):
        torch.testing.assert_close(
            getattr(counted, name), getattr(alone[0], name) + getattr(alone[1], name)
        )
    assert counted.picks_BE.sum().item() == counted.load_E.sum().item() == 13 * 2
    assert counted.probabilities_BE.requires_grad and counted.squared_logsumexp.requires_grad
    assert not counted.picks_BE.requires_grad and not counted.entropy.requires_grad
    uniform = torch.distributions.Categorical(logits=module.router(x.flatten(0, 1))[2]).entropy()
    torch.testing.assert_close(router_sums(module(x)[1]).entropy, uniform.sum())


def served_one_by_one(wanted: list[list[int]], limit: int) -> list[list[int]]:
    """Switch's rule for one row: tokens in order, an expert takes no more than `limit`."""
    taken, out = [0] * 5, []
    for token in wanted:
        kept = []
        for e in token:
            free = e >= 0 and taken[e] < limit
            taken[e] += free
            kept.append(e if free else -1)
        out.append(kept)
    return out


@pytest.mark.parametrize("capacity", [0.3, 1.0, 1.25])
def test_beyond_its_capacity_an_expert_drops_the_later_tokens_of_the_row(capacity):
    module = build(expert_capacity=capacity)
    ids = torch.rand(3 * 11, 5, generator=torch.Generator().manual_seed(0)).topk(2, -1).indices
    ids[11 + 8 : 22] = -1  # padding in the second row
    placed = within_capacity(ids, torch.zeros(33, 5), 3, module.moe).unflatten(0, (3, 11))
    for row, (got, wanted) in enumerate(zip(placed, ids.unflatten(0, (3, 11)), strict=True)):
        limit = math.ceil(capacity * (8 if row == 1 else 11) * 2 / 5)
        assert got.tolist() == served_one_by_one(wanted.tolist(), limit)


def test_capacity_acts_in_training_only_and_later_tokens_cannot_change_earlier_ones():
    module, x = build(expert_capacity=0.5), draw(1, 12)
    free = build()
    torch.testing.assert_close(module.eval()(x)[0], free(x)[0])
    y, statistics = module.train()(x)
    seen = router_sums(statistics)
    assert 0 < seen.dropped.item() <= 12
    assert seen.picks_BE.sum() == 24 and seen.load_E.max() <= math.ceil(0.5 * 12 * 2 / 5)
    changed = torch.cat((x[:, :7], -x[:, 7:]), 1)
    torch.testing.assert_close(module(changed)[0][:, :7], y[:, :7], rtol=0, atol=0)


def test_a_second_choice_is_the_best_expert_that_has_room():
    module = build(expert_capacity=1.0, overflow="second_choice", top_k=1)
    # One row of five tokens, one place per expert: all want expert 0, then the next of their own
    # list.
    preference = torch.tensor(
        [
            [9.0, 4, 3, 2, 1],
            [9, 1, 8, 2, 3],
            [9, 4, 8, 3, 5],
            [9, 8, 4, 1, 2],
            [9, 8, 7, 6, -math.inf],
        ]
    )
    placed = within_capacity(torch.zeros(5, 1, dtype=torch.int64), preference, 1, module.moe)
    # Token 2 finds expert 2 taken by token 1 and goes on to 4; token 4 is left with 3.
    assert placed.flatten().tolist() == [0, 2, 4, 1, 3]
    preference[4, 3] = -math.inf  # now no open expert has room
    placed = within_capacity(torch.zeros(5, 1, dtype=torch.int64), preference, 1, module.moe)
    assert placed.flatten().tolist() == [0, 2, 4, 1, -1]


@pytest.mark.parametrize("capacity", [0.2, 0.5, 1.0, 2.0])
def test_second_choices_never_exceed_the_capacity_nor_repeat_an_expert(capacity):
    module = build(expert_capacity=capacity, overflow="second_choice").train()
    with torch.no_grad():
        module.router.weight[0] = 0.3  # a popular one
    x = draw(3, 13)
    y, statistics = module(x)
    limit = math.ceil(capacity * 13 * 2 / 5)
    ids, _, logits = module.router(x.flatten(0, 1))
    placed = within_capacity(ids, logits, 3, module.moe)
    for row in placed.unflatten(0, (3, 13)):
        assert torch.bincount(row[row >= 0], minlength=5).max() <= limit
    for token in placed.tolist():
        kept = [e for e in token if e >= 0]
        assert len(set(kept)) == len(kept)
    if (
        capacity >= 1.0
    ):  # there is a place for every choice; the last tokens may lack a second different one
        assert (placed >= 0).any(-1).all()
    for token, chosen, got in zip(x.flatten(0, 1), placed.tolist(), y.flatten(0, 1), strict=True):
        torch.testing.assert_close(got, weighed_sum(module, token, [e for e in chosen if e >= 0]))
    y.sum().backward()
    assert torch.isfinite(module.router.weight.grad).all()
    assert router_sums(statistics).load_E.sum() == (placed >= 0).sum()


def test_jitter_is_the_routers_alone_and_in_training_alone():
    module, x = build(torch.float32, jitter=0.3, top_k=5), draw(dtype=torch.float32)
    kept, plain = x.clone(), build(torch.float32, top_k=5)
    torch.testing.assert_close(module.eval()(x)[0], plain(x)[0], rtol=0, atol=0)
    module.train()
    torch.manual_seed(0)
    logits = module.router(x.flatten(0, 1))[2]
    torch.manual_seed(0)
    noise = torch.empty(18, 16).uniform_(0.7, 1.3)
    torch.testing.assert_close(logits, (x.flatten(0, 1) * noise) @ module.router.weight.T)
    module(x)
    assert torch.equal(x, kept), "the tokens themselves stay as they are"


@pytest.mark.parametrize("overflow", ["drop", "second_choice"])
def test_recomputation_draws_the_same_jitter_and_drops_the_same_tokens(overflow):
    module = build(jitter=0.4, expert_capacity=0.7, overflow=overflow).train()
    x, results = draw().requires_grad_(), []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        torch.manual_seed(7)
        y, statistics = call(x)
        seen = router_sums(statistics)
        (y.square().sum() + seen.probabilities_BE.square().sum()).backward()
        results.append([y, seen.picks_BE, *(weight.grad.clone() for weight in module.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_shared_and_routed_experts_take_the_models_feed_forward_options():
    fields = {
        "num_experts": 4,
        "hidden_dim": 12,
        "expert_bias": True,
        "shared_expert": True,
        "shared_hidden_dim": 20,
    }
    args = tiny_args(
        dim=16, n_heads=2, activation="relu", ffn_gated=False, ffn_bias=True, moe_args=fields
    )
    module, x = MoE(args.layers[0]), draw(dtype=torch.float32)
    assert module.experts.w_gate is None and module.shared_expert.w_gate is None
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.4, generator=torch.Generator().manual_seed(0))
    ids, weights, _ = module.router(x.flatten(0, 1))
    value, out = module.experts.w_value, module.experts.w_out
    rows = []
    for token, chosen, how in zip(x.flatten(0, 1), ids, weights, strict=True):
        total = module.shared_expert(token)
        for e, w in zip(chosen, how, strict=True):
            hidden = F.relu(F.linear(token, value.weight[e], value.bias[e]))
            total = total + w * F.linear(hidden, out.weight[e], out.bias[e])
        rows.append(total)
    torch.testing.assert_close(module(x)[0], torch.stack(rows).view_as(x), rtol=1e-4, atol=1e-4)


def test_order_of_tokens_does_not_matter():
    module, x = build(**ROUTINGS["llama4"]), draw(1, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module(x[:, order])[0], module(x)[0][:, order], rtol=0, atol=1e-12)

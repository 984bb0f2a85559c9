"""Steps inside the backward pass: the numbers of ordinary steps, no gradient left, and what it
excludes.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import cross_entropy_sum
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import BackwardOptimizers, Optimizers, build_optimizer


def build(in_backward: bool, model_fields: dict[str, Any], **fields: Any) -> tuple[LLM, Optimizers]:
    model = random_model(tiny_args(**model_fields)).train()
    args = OptimizerArgs(lr=1e-2, max_grad_norm=None, in_backward=in_backward, **fields)
    return model, build_optimizer(model, args, device_type="cpu")


def train(model: LLM, optimizers: Optimizers, steps: range) -> list[Tensor]:
    """Gradient norms of steps at falling rates."""
    norms = []
    for step in steps:
        optimizers.set_scale(1 / (step + 1))
        tokens_BT = random_tokens(3, 12, seed=step)
        output = model(TransformerInput(tokens_BT[:, :-1]))
        loss = cross_entropy_sum(output.logits, tokens_BT[:, 1:]) / 33
        loss.backward()
        norms.append(optimizers.clip([p for p in model.parameters() if p.grad is not None], None))
        optimizers.step()
        optimizers.zero_grad()
    return norms


@pytest.mark.parametrize(
    ("model_fields", "fields"),
    [
        ({}, {}),
        ({"tie_embeddings": True}, {}),
        ({"dim": 64, "head_dim": 16}, {"state_bits": 8}),
        ({"moe_args": {"num_experts": 3, "hidden_dim": 24}}, {}),
    ],
    ids=["plain", "tied", "8-bit", "experts"],
)
def test_adamw_gives_the_bits_of_ordinary_steps(
    model_fields: dict[str, Any], fields: dict[str, Any]
) -> None:
    model, optimizers = build(True, model_fields, **fields)
    twin, ordinary = build(False, model_fields, **fields)
    norms, wanted = train(model, optimizers, range(3)), train(twin, ordinary, range(3))
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, want), name
    torch.testing.assert_close(torch.stack(norms), torch.stack(wanted))
    got, want = optimizers.state_tensors(), ordinary.state_tensors()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_activation_checkpointing_makes_a_block_again_before_its_weights_move() -> None:
    model, optimizers = build(True, {})
    twin, ordinary = build(False, {})
    for block in model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    train(model, optimizers, range(3))
    train(twin, ordinary, range(3))
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_muon_moves_matrix_by_matrix() -> None:
    fields = {"moe_args": {"num_experts": 3, "hidden_dim": 24}}
    model, optimizers = build(True, fields, name="muon")
    twin, ordinary = build(False, fields, name="muon")
    train(model, optimizers, range(3))
    train(twin, ordinary, range(3))
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        # One product of many matrices rounds otherwise than many products of one.
        torch.testing.assert_close(
            got, want, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_gradient_is_gone_before_the_next_layer_down_makes_its_own() -> None:
    model, _ = build(True, {})
    upper, seen = model.layers[1].attention.wq.weight, []
    model.layers[0].attention.wq.weight.register_hook(lambda grad: seen.append(upper.grad))
    output = model(TransformerInput(random_tokens(2, 8)))
    output.logits.sum().backward()
    assert seen == [None]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_norm_is_taken_once() -> None:
    model, optimizers = build(True, {})
    norms = train(model, optimizers, range(1))
    assert norms[0] > 0 and optimizers.clip([], None) == 0


def test_frozen_weights_stay_and_a_pause_leaves_gradients() -> None:
    model = random_model(tiny_args()).train()
    model.layers[0].requires_grad_(False)
    args = OptimizerArgs(max_grad_norm=None, in_backward=True)
    optimizers = build_optimizer(model, args, device_type="cpu")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizers, range(1))
    moved = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert moved == {name for name in before if not name.startswith("layers.0.")}
    assert isinstance(optimizers, BackwardOptimizers)
    optimizers.paused = True
    model(TransformerInput(random_tokens(2, 8))).logits.sum().backward()
    assert model.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("limit", "asked", "said"),
    [
        (1.0, {}, "max_grad_norm = null"),
        (None, {"accumulate": 2}, "accumulate = 1"),
        (None, {"ranks": 2}, "one rank"),
        (None, {"scaled": True}, "a dtype other than float16"),
        (0.5, {"accumulate": 4}, "max_grad_norm = null and accumulate = 1"),
    ],
    ids=["clipping", "accumulation", "ranks", "float16", "two at once"],
)
def test_what_needs_whole_gradients_is_refused(
    limit: float | None, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=rf"optimizer.in_backward: got True; .*{said}$"):
        OptimizerArgs(in_backward=True, max_grad_norm=limit).check_in_backward(**asked)
    OptimizerArgs(in_backward=False, max_grad_norm=limit).check_in_backward(**asked)
    OptimizerArgs(in_backward=True, max_grad_norm=None).check_in_backward()

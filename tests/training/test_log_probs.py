"""Log-probabilities of targets are those of the logits, and a model without its adapters is the one
before them.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.data.batch import NO_TARGET
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import active_adapters
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.training.loop.blocks import arrange_blocks
from transom.training.losses.log_probs import (
    adapters_off,
    check_frozen_base,
    measured_log_probs,
    target_log_probs,
)

TOKENS = random_tokens(3, 11)
TARGETS = random_tokens(3, 11, seed=1).masked_fill(random_tokens(3, 11, seed=2) < 25, NO_TARGET)
MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 20, "jitter": 0.5, "expert_capacity": 0.5}


def dense(model):
    """From the logits of every position, without any of our helpers."""
    logits = model(TransformerInput(TOKENS)).logits
    found = F.log_softmax(logits, -1).gather(-1, TARGETS.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(TARGETS == NO_TARGET, 0.0)


def chunked(model, chunk):
    return target_log_probs(
        model, model(TransformerInput(TOKENS, logits="none")).hidden_BTD, TARGETS, chunk
    )


def adapted(seed=0, **fields):
    """A model with an adapter that changes its answers: drawn weights, and a replaced norm."""
    model = random_model(tiny_args(**fields))
    apply_lora(
        model,
        LoraArgs(rank=2, targets=("attention", "output"), modules_to_save=("norm",), dropout=0.5),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or ".lora." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("chunk", [None, 0, 1, 4, 1000])
@pytest.mark.parametrize(
    "fields", [{}, {"logit_softcap": 1.5, "tie_embeddings": True}], ids=["untied", "tied, capped"]
)
def test_equals_the_dense_formula_with_its_gradients(fields, chunk):
    model = random_model(tiny_args(**fields)).double()
    weights = torch.randn(
        3, 11, dtype=torch.float64
    )  # any loss: each position pulls by another amount
    results = []
    for make in (dense, lambda m: chunked(m, chunk)):
        found = make(model)
        gradients = torch.autograd.grad((found * weights).sum(), list(model.parameters()))
        results.append((found.detach(), *gradients))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


def test_rows_without_a_target_give_zeros_that_can_be_differentiated():
    model = random_model(tiny_args())
    hidden = model(TransformerInput(TOKENS, logits="none")).hidden_BTD
    for chunk in (None, 4):
        found = target_log_probs(model, hidden, torch.full_like(TARGETS, NO_TARGET), chunk)
        assert torch.equal(found, torch.zeros(3, 11))
        assert torch.autograd.grad(found.sum(), hidden, retain_graph=True)[0].abs().sum() == 0


def test_what_a_position_without_target_holds_does_not_matter():
    model = random_model(tiny_args())
    hidden = model(TransformerInput(TOKENS, logits="none")).hidden_BTD.detach()
    spoilt = hidden.masked_fill((TARGETS == NO_TARGET).unsqueeze(-1), float("nan")).requires_grad_()
    found = target_log_probs(model, spoilt, TARGETS)
    assert torch.equal(found, target_log_probs(model, hidden, TARGETS))
    assert torch.autograd.grad(found.sum(), spoilt)[0].isfinite().all()


def test_autocast_leaves_the_softmax_in_float32():
    model = random_model(tiny_args())
    exact = dense(model.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked(model, 4)
        half = F.log_softmax(
            model(TransformerInput(TOKENS)).logits.bfloat16(), -1, dtype=torch.bfloat16
        )
    rough = half.gather(-1, TARGETS.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    kept = TARGETS != NO_TARGET
    assert found.dtype == torch.float32
    assert (found - exact)[kept].abs().mean() < (rough - exact)[kept].abs().mean()


def test_without_adapters_the_model_is_the_one_before():
    before = random_model(tiny_args())
    model = adapted()
    assert not torch.equal(dense(model), dense(before))
    with adapters_off(model):
        assert torch.equal(dense(model), dense(before))


def test_adapters_come_back_even_after_an_error():
    model = adapted()
    model.eval()
    want = dense(model)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        _ = 1 / 0
    assert active_adapters(model) == ("default",)
    assert torch.equal(dense(model), want)


def test_a_model_without_an_adapter_is_not_its_own_reference():
    with (
        pytest.raises(RequestError, match="adapter: got None"),
        adapters_off(random_model(tiny_args())),
    ):
        pass


def test_only_a_base_that_stands_still_is_a_reference():
    model = adapted()
    check_frozen_base(model, "a setting")  # the replaced norm trains, but is part of the adapter
    model.layers[0].attention_norm.weight.requires_grad_(True)
    with pytest.raises(RequestError, match=r"layers\.0\.attention_norm\.weight trains outside"):
        check_frozen_base(model, "a setting")


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_reference_between_forward_and_backward_changes_no_gradient(checkpointing):
    model = adapted().double().eval()
    wanted = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(dense(model).sum(), wanted)
    arrange_blocks(model, checkpointing=checkpointing)
    policy = chunked(model, 4)
    with adapters_off(model):
        measured_log_probs(model, TransformerInput(TOKENS), TARGETS)
    for got, expected in zip(torch.autograd.grad(policy.sum(), wanted), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_measuring_is_without_dropout_jitter_and_capacity_and_leaves_training_on():
    model = adapted(moe_args=MOE)
    want = dense(copy.deepcopy(model).eval())
    model.train()
    state = torch.get_rng_state()
    found = measured_log_probs(model, TransformerInput(TOKENS), TARGETS)
    torch.testing.assert_close(found, want)
    assert model.training and not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)

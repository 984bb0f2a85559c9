"""The chunked loss is the plain one, in value and gradient, whatever stands around the output
matrix.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import random_model, random_tokens, tiny_args
from transom.data.batch import NO_TARGET
from transom.layers.inputs import TransformerInput
from transom.training.losses import cross_entropy
from transom.training.losses.cross_entropy import (
    cross_entropy_sum,
    head_loss,
    plain_output_weight,
)
from transom.training.losses.log_probs import chunk_tokens

TOKENS = random_tokens(3, 11)
TARGETS = random_tokens(3, 11, seed=1).masked_fill(random_tokens(3, 11, seed=2) < 15, NO_TARGET)
MODELS = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "softcap": {"logit_softcap": 1.5},
    "scale": {"logit_scale": 0.3},
    "softcap and scale, tied": {"logit_softcap": 2.0, "logit_scale": 3.0, "tie_embeddings": True},
    "muP": {"mup_base_dim": 8},
}


def gradients(model, loss):
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


def both(model, chunk, targets=TARGETS):
    """(plain loss, its gradients, chunked loss, its gradients)."""
    results = []
    for size in (0, chunk):
        hidden = model(TransformerInput(TOKENS, logits="none")).hidden_BTD
        loss = head_loss(model, hidden, targets, size)
        results += [loss.detach(), gradients(model, loss)]
    return results


def assert_same(plain, plain_grads, chunked, chunked_grads, **close):
    torch.testing.assert_close(chunked, plain, **close)
    assert set(chunked_grads) == set(plain_grads)
    for name, expected in plain_grads.items():
        torch.testing.assert_close(
            chunked_grads[name], expected, msg=lambda m, n=name: f"{n}: {m}", **close
        )


@pytest.mark.parametrize("chunk", [1, 4, 7, 33, 1000])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_equals_the_plain_loss(changes, chunk):
    assert_same(*both(random_model(tiny_args(**changes)).double(), chunk))


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 1.5}], ids=["plain", "softcap"])
@pytest.mark.parametrize("chunk", [0, 4, 33])
def test_weights_count_each_target_as_often_as_they_say(changes, chunk):
    model = random_model(tiny_args(**changes)).double()
    weights = torch.tensor([0.0, 0.5, 2.0])[random_tokens(3, 11, seed=3) % 3]
    hidden, again = (model(TransformerInput(TOKENS, logits="none")).hidden_BTD for _ in range(2))
    losses = F.cross_entropy(
        model.project(hidden).flatten(0, 1), TARGETS.flatten(), reduction="none"
    )
    expected = (losses * weights.flatten()).sum()
    found = head_loss(model, again, TARGETS, chunk, weights)
    assert_same(
        expected.detach(), gradients(model, expected), found.detach(), gradients(model, found)
    )


def test_the_plain_loss_is_torchs_over_the_models_logits():
    model = random_model(tiny_args(logit_softcap=2.0)).double()
    output = model(TransformerInput(TOKENS))
    expected = F.cross_entropy(output.logits.flatten(0, 1), TARGETS.flatten(), reduction="sum")
    torch.testing.assert_close(head_loss(model, output.hidden_BTD, TARGETS), expected)


@pytest.mark.parametrize("cap", [None, 0.7, 1.5])
def test_gradients_are_those_of_the_function(cap):
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, NO_TARGET, 3, 3, 5])

    def loss(h, w):
        return cross_entropy._LinearCrossEntropy.apply(h, w, targets, None, 4, cap, None)

    made = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    with (
        torch.no_grad()
    ):  # central differences along random directions; gradcheck would run backward twice
        for _ in range(5):
            ways = torch.randn_like(hidden), torch.randn_like(weight)
            up, down = (loss(hidden + e * ways[0], weight + e * ways[1]) for e in (1e-6, -1e-6))
            expected = sum((g * way).sum() for g, way in zip(made, ways, strict=True))
            torch.testing.assert_close((up - down) / 2e-6, expected, rtol=1e-6, atol=1e-7)


def test_bfloat16_autocast_is_as_near_as_the_plain_path():
    model = random_model(tiny_args())
    _, exact, _, _ = both(model, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, plain_grads, chunked, chunked_grads = both(model, 5)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, plain, rtol=1e-2, atol=0.0)
    for name in ("output.weight", "norm.weight", "layers.0.attention.wq.weight"):
        worst, allowed = (
            (grads[name] - exact[name]).norm() for grads in (chunked_grads, plain_grads)
        )
        assert chunked_grads[name].dtype == torch.float32
        assert worst <= 1.2 * allowed


def test_half_precision_weights_sum_their_gradient_in_float32():
    hidden, weight = (
        torch.randn(512, 8, dtype=torch.bfloat16),
        torch.randn(5, 8, dtype=torch.bfloat16),
    )
    targets = torch.randint(5, (512,), generator=torch.Generator().manual_seed(0))

    def gradient(dtype, chunk):
        w = weight.to(dtype).requires_grad_()
        loss = cross_entropy._LinearCrossEntropy.apply(
            hidden.to(dtype), w, targets, None, chunk, None, None
        )
        return torch.autograd.grad(loss, w)[0].double()

    exact = gradient(torch.float64, 1)
    error = (gradient(torch.bfloat16, 1) - exact).norm() / exact.norm()
    assert error < 0.01  # 512 additions in bfloat16 would be off by several percent


def frozen_output(model):
    model.output.requires_grad_(False)


def hooked(model):
    model.output.register_forward_hook(lambda module, given, out: out * 0.5)


def with_adapter(model):
    adapter = nn.Linear(model.args.dim, model.args.vocab_size).double()
    model.output.register_module("lora", adapter)
    plain = model.output.forward
    model.output.forward = lambda x: plain(x) + adapter(x)


def with_bias(model):
    model.output.bias = nn.Parameter(torch.randn(model.args.vocab_size).double())


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.output)


@pytest.mark.parametrize("change", [frozen_output, hooked, with_adapter, with_bias, parametrized])
def test_what_stands_around_the_output_leaf_is_kept(change):
    model = random_model(tiny_args()).double()
    change(model)
    assert (plain_output_weight(model) is None) == (change is not frozen_output)
    plain, plain_grads, chunked, chunked_grads = both(model, 4)
    assert_same(plain, plain_grads, chunked, chunked_grads)
    assert ("output.weight" in chunked_grads) == (change not in (frozen_output, parametrized))


@pytest.mark.parametrize("hook", [None, hooked])
def test_logits_of_all_tokens_are_never_there(hook, monkeypatch):
    model = random_model(tiny_args())
    if hook is not None:
        hook(model)
    rows = []
    real = torch.Tensor.log_softmax if hook is None else F.cross_entropy

    def counted(logits, *args, **options):
        rows.append(logits.numel() // model.args.vocab_size)
        return real(logits, *args, **options)

    monkeypatch.setattr(
        *((torch.Tensor, "log_softmax") if hook is None else (F, "cross_entropy")), counted
    )
    head_loss(
        model, model(TransformerInput(TOKENS, logits="none")).hidden_BTD, TARGETS, 8
    ).backward()
    targets = int((TARGETS != NO_TARGET).sum())
    assert max(rows) == 7  # 33 tokens in 5 even chunks, or 28 targets in 4
    assert sum(rows) == (33 if hook is None else 2 * targets)  # backward makes them again


def test_a_position_without_target_may_hold_anything():
    model = random_model(tiny_args())
    hidden = (
        torch.randn(3, 11, 32)
        .masked_fill((TARGETS == NO_TARGET).unsqueeze(-1), float("nan"))
        .requires_grad_()
    )
    loss = head_loss(model, hidden, TARGETS, 4)
    loss.backward()
    assert (
        loss.isfinite()
        and hidden.grad.isfinite().all()
        and model.output.weight.grad.isfinite().all()
    )


def test_no_target_at_all_is_a_loss_of_zero():
    assert_same(*both(random_model(tiny_args()), 4, torch.full_like(TARGETS, NO_TARGET)))


def test_one_token_is_enough():
    model = random_model(tiny_args())
    hidden = torch.randn(1, 1, 32)
    target = torch.tensor([[3]])
    torch.testing.assert_close(
        head_loss(model, hidden, target, 1), head_loss(model, hidden, target, 0)
    )


def test_without_gradients_none_are_made(monkeypatch):
    asked = []
    real = cross_entropy._chunk
    monkeypatch.setattr(
        cross_entropy, "_chunk", lambda *args: (asked.append(args[3]), real(*args))[1]
    )
    model = random_model(tiny_args())
    with torch.no_grad():
        head_loss(model, torch.randn(3, 11, 32), TARGETS, 4)
    assert asked == [False] * 9


def test_the_gradient_is_given_away_and_not_copied():
    model = random_model(tiny_args())
    loss = head_loss(model, torch.randn(3, 11, 32, requires_grad=True), TARGETS, 4)
    made = loss.grad_fn.grads[1].data_ptr()
    loss.backward()
    assert model.output.weight.grad.data_ptr() == made


def test_a_second_backward_is_refused():
    model = random_model(tiny_args())
    loss = head_loss(model, torch.randn(3, 11, 32, requires_grad=True), TARGETS, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        loss.backward()


def test_micro_batches_add_up():
    model = random_model(tiny_args()).double()
    hidden = torch.randn(3, 11, 32, dtype=torch.float64)
    expected = gradients(model, cross_entropy_sum(model.project(hidden), TARGETS))["output.weight"]
    for row in range(3):
        head_loss(model, hidden[row : row + 1], TARGETS[row : row + 1], 4).backward()
    torch.testing.assert_close(model.output.weight.grad, expected)


def test_small_vocabularies_keep_the_plain_path():
    assert chunk_tokens(2048, 2048) == 0
    assert chunk_tokens(1024, 131072) == 128
    assert chunk_tokens(100, 1 << 26) == 1

"""Parameter groups, AdamW against torch, Muon against the SVD, and state that survives a
restart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.muon import (
    POLAR_EXPRESS,
    SAFETY,
    Muon,
    orthogonalize,
)
from transom.training.optim.optimizers import (
    Optimizers,
    build_optimizer,
    parameter_groups,
)

D, F, E, V = 16, 24, 3, 32
GROUP_OF = {
    "tok_embeddings.weight": "embedding",
    "layers.0.attention.wq.weight": "matrices",
    "layers.0.attention.q_norm.weight": "vectors",
    "layers.0.attention_norm.weight": "vectors",
    "layers.0.feed_forward.w_gate.weight": "matrices",
    "layers.0.feed_forward.w_gate.bias": "vectors",
    "layers.0.feed_forward.w_out.weight": "matrices",
    "layers.1.feed_forward.router.weight": "routers",
    "layers.1.feed_forward.experts.w_gate.weight": "matrices",
    "layers.1.feed_forward.experts.w_gate.bias": "vectors",
    "norm.weight": "vectors",
    "output.weight": "output",
    "vision.projector.weight": "others",
}


def tree(**children: nn.Module | Tensor) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        value = nn.Parameter(child) if isinstance(child, Tensor) else child
        setattr(module, name, value)
    return module


def build_model() -> nn.Module:
    """The parameter names of a dense and a sparse block, without their forward."""
    torch.manual_seed(0)
    norm = tree(weight=torch.ones(D))
    attention = tree(wq=tree(weight=torch.randn(D, D)), q_norm=tree(weight=torch.ones(4)))
    gate = tree(weight=torch.randn(F, D), bias=torch.zeros(F))
    dense = tree(w_gate=gate, w_out=tree(weight=torch.randn(D, F)))
    experts = tree(w_gate=tree(weight=torch.randn(E, F, D), bias=torch.zeros(E, F)))
    sparse = tree(router=tree(weight=torch.randn(E, D)), experts=experts)
    blocks = [
        tree(attention=attention, attention_norm=norm, feed_forward=dense),
        tree(feed_forward=sparse),
    ]
    return tree(
        tok_embeddings=tree(weight=torch.randn(V, D)),
        layers=nn.ModuleList(blocks),
        norm=tree(weight=torch.ones(D)),
        output=tree(weight=torch.randn(V, D)),
        vision=tree(projector=tree(weight=torch.randn(D, 2 * D))),
    )


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model: nn.Module, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizers.set_scale(1 / (step + 1))
        optimizers.step()
        optimizers.zero_grad()


def matrices_of_condition(count: int, rows: int, columns: int, condition: float) -> Tensor:
    rank = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(count, rows, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(count, columns, rank, dtype=torch.float64))
    exponents = torch.linspace(0, 1, rank, dtype=torch.float64)
    return (left * condition**-exponents) @ right.mT


# Parameter groups


def test_every_parameter_is_in_the_group_its_name_says() -> None:
    model = build_model()
    groups = parameter_groups(model, OptimizerArgs(name="muon"))
    got = {name: group["name"] for group in groups for name in group["param_names"]}
    assert got == GROUP_OF
    by_name = dict(model.named_parameters())
    for group in groups:
        assert [id(p) for p in group["params"]] == [
            id(by_name[name]) for name in group["param_names"]
        ]
    assert sum(len(group["params"]) for group in groups) == len(by_name)


def test_tied_output_is_trained_once() -> None:
    model = build_model()
    model.output.weight = model.tok_embeddings.weight
    names = [group["name"] for group in parameter_groups(model, OptimizerArgs())]
    assert "output" not in names and "embedding" in names


def test_frozen_parameters_are_skipped_and_their_group_with_them() -> None:
    model = build_model()
    model.tok_embeddings.weight.requires_grad_(False)
    assert "embedding" not in [group["name"] for group in parameter_groups(model, OptimizerArgs())]


def test_groups_carry_rate_decay_and_kind() -> None:
    args = OptimizerArgs(name="muon", lr=1e-3, muon_lr=0.05, embedding_lr=0.1, norm_lr=0.01)
    groups = {group["name"]: group for group in parameter_groups(build_model(), args)}
    rates = {name: group["base_lr"] for name, group in groups.items()}
    assert rates == {
        "matrices": 0.05,
        "embedding": 0.1,
        "output": 1e-3,
        "vectors": 0.01,
        "routers": 1e-3,
        "others": 1e-3,
    }
    assert [name for name, group in groups.items() if group["weight_decay"] == 0] == ["vectors"]
    assert [name for name, group in groups.items() if group["kind"] == "muon"] == ["matrices"]


def test_scale_multiplies_the_peak_and_not_the_present_rate() -> None:
    optimizers = build_optimizer(
        build_model(), OptimizerArgs(name="muon", lr=1e-3), device_type="cpu"
    )
    optimizers.set_scale(0.5)
    optimizers.set_scale(0.5)
    assert optimizers.learning_rates()["matrices"] == 0.01
    assert optimizers.learning_rates()["output"] == 5e-4


def test_model_with_nothing_to_train_is_refused() -> None:
    model = build_model().requires_grad_(False)
    with pytest.raises(RequestError, match="nothing to train"):
        build_optimizer(model, OptimizerArgs(), device_type="cpu")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "adam"}, "name"),
        ({"lr": 0.0}, "lr"),
        ({"muon_lr": float("nan")}, "muon_lr"),
        ({"eps": -1.0}, "eps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"muon_momentum": 1.0}, "muon_momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"muon_steps": 8}, "muon_steps"),
        ({"norm_lr": 0.0}, "norm_lr"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_bad_field_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=f"^{named}: got "):
        OptimizerArgs(**fields)


# AdamW


@pytest.mark.parametrize("device_type", ["cpu", "other"])  # the fused kernel and the one over lists
def test_adamw_is_that_of_torch(device_type: str) -> None:
    model, twin = build_model(), build_model()
    args = OptimizerArgs(lr=1e-2, norm_lr=3e-3)
    train(model, build_optimizer(model, args, device_type=device_type), range(3))
    vectors = [p for name, p in twin.named_parameters() if GROUP_OF[name] == "vectors"]
    rest = [p for name, p in twin.named_parameters() if GROUP_OF[name] != "vectors"]
    by_hand = torch.optim.AdamW(
        [
            {"params": rest, "lr": 1e-2, "weight_decay": 0.1},
            {"params": vectors, "lr": 3e-3, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    for step in range(3):
        give_gradients(twin, step)
        for group, peak in zip(by_hand.param_groups, (1e-2, 3e-3), strict=True):
            group["lr"] = peak / (step + 1)
        by_hand.step()
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# Orthogonalisation


@pytest.mark.parametrize("shape", [(64, 64), (80, 64), (160, 48), (48, 160)])
@pytest.mark.parametrize(
    ("steps", "low", "high"), [(4, 0.42, 1.57), (5, 0.84, 1.13), (7, 0.9999, 1.0001)]
)
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_singular_vectors_stay_and_values_come_near_one(
    shape: tuple[int, int], steps: int, low: float, high: float, condition: float
) -> None:
    torch.manual_seed(0)
    x = matrices_of_condition(2, *shape, condition)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    assert (
        values / values.norm(dim=-1, keepdim=True)
    ).min() >= 1e-3  # what the range is stated for
    got = orthogonalize(x.float(), steps).double()
    in_svd_basis = left.mT @ got @ right.mT
    new_values = in_svd_basis.diagonal(dim1=1, dim2=2)
    assert low <= new_values.min() and new_values.max() <= high
    # Equal singular values (condition 1) have no basis of their own, but any basis gives a
    # diagonal.
    torch.testing.assert_close(in_svd_basis, torch.diag_embed(new_values), rtol=0, atol=2e-4)
    torch.testing.assert_close(got, left * new_values[:, None] @ right, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(64, 64), (160, 48)])
@pytest.mark.parametrize("steps", [4, 7])
def test_tiny_singular_values_stay_harmless(shape: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    x = matrices_of_condition(1, *shape, 1e10).float()
    values = torch.linalg.svdvals(orthogonalize(x, steps))
    assert values.max() <= 1.57 and values.min() < 0.1


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_gram_form_equals_the_plain_iteration(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    want = (x / x.norm(dim=(1, 2), keepdim=True)).double()
    for a, b, c in POLAR_EXPRESS[:4]:
        want = want / SAFETY
        gram = want @ want.mT
        want = a * want + (b * gram + c * gram @ gram) @ want
    torch.testing.assert_close(orthogonalize(x), want.float(), rtol=0, atol=1e-4)


def test_half_precision_keeps_the_stated_range() -> None:
    torch.manual_seed(0)
    x = matrices_of_condition(1, 96, 32, 10.0).float()
    values = torch.linalg.svdvals(orthogonalize(x, 4, torch.bfloat16))
    assert values.min() >= 0.40 and values.max() <= 1.59


@pytest.mark.parametrize("shape", [(24, 24), (64, 24), (24, 64)])
def test_batched_equals_one_at_a_time(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, *shape)
    one_by_one = torch.cat([orthogonalize(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(orthogonalize(x), one_by_one, rtol=0, atol=1e-5)


def test_zero_tiny_and_rank_one_matrices_give_no_nan() -> None:
    x = torch.zeros(3, 40, 16)
    x[1] = 1e-30
    x[2] = torch.outer(torch.arange(40.0), torch.arange(16.0))
    got = orthogonalize(x, 7)
    assert got.isfinite().all()
    assert got[0].eq(0).all()
    torch.testing.assert_close(
        torch.linalg.svdvals(got[2])[:2], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-3
    )


# Muon


def test_first_muon_step_is_decay_and_scaled_orthogonal_update() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(48, 12))
    before = weight.detach().clone()
    weight.grad = torch.randn(48, 12)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    want = before * (1 - 0.1 * 0.5) - 0.1 * 2 * orthogonalize(weight.grad[None])[0]
    torch.testing.assert_close(weight.detach(), want, rtol=0, atol=1e-5)


def test_second_muon_step_looks_ahead_along_the_momentum() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(8, 24))
    first, second = torch.randn(8, 24), torch.randn(8, 24)
    optimizer = Muon([weight], lr=1.0, momentum=0.8)
    for gradient in (first, second):
        weight.grad = gradient
        weight.data.zero_()
        optimizer.step()
    momentum = 0.8 * (0.2 * first) + 0.2 * second
    want = -orthogonalize((0.2 * second + 0.8 * momentum)[None])[0]
    torch.testing.assert_close(weight.detach(), want, rtol=0, atol=1e-4)


def test_experts_are_separate_matrices() -> None:
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(4, 24, 16))
    singles = [nn.Parameter(matrix.clone()) for matrix in experts.detach()]
    stacked, separate = Muon([experts], weight_decay=0.1), Muon(singles, weight_decay=0.1)
    for _ in range(2):
        experts.grad = torch.randn(4, 24, 16) * torch.tensor([1.0, 10.0, 1e-3, 0.0])[:, None, None]
        for single, gradient in zip(singles, experts.grad, strict=True):
            single.grad = gradient.clone()
        stacked.step()
        separate.step()
    torch.testing.assert_close(
        experts.detach(), torch.stack([s.detach() for s in singles]), rtol=0, atol=1e-5
    )


def test_small_and_full_batches_update_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = build_model(), build_model()
    args = OptimizerArgs(name="muon")
    train(model, build_optimizer(model, args, device_type="cpu"), range(2))
    monkeypatch.setattr(
        "transom.training.optim.muon.matrices_per_batch", lambda elements, device_type: 2
    )
    train(twin, build_optimizer(twin, args, device_type="cpu"), range(2))
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_muon_leaves_a_parameter_without_gradient_alone() -> None:
    idle, busy = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    busy.grad = torch.eye(4)
    Muon([idle, busy], weight_decay=0.1).step()
    assert idle.eq(1).all() and not busy.eq(1).all()


def test_muon_refuses_vectors() -> None:
    with pytest.raises(RequestError, match="shape: got "):
        Muon([nn.Parameter(torch.ones(4))])


def test_muon_state_dict_round_trip_continues_bit_equal() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 8))
    optimizer = Muon([weight])
    gradients = torch.randn(4, 24, 8)
    for gradient in gradients[:2]:
        weight.grad = gradient
        optimizer.step()
    other_weight = nn.Parameter(weight.detach().clone())
    other = Muon([other_weight], lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[2:]:
        weight.grad, other_weight.grad = gradient, gradient.clone()
        optimizer.step()
        other.step()
    assert torch.equal(weight, other_weight)


# State by name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_run_is_bit_equal(name: str) -> None:
    args = OptimizerArgs(name=name)
    model = build_model()
    optimizers = build_optimizer(model, args, device_type="cpu")
    train(model, optimizers, range(2))
    saved = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    resumed = copy.deepcopy(model)
    train(model, optimizers, range(2, 4))

    fresh = build_optimizer(resumed, args, device_type="cpu")
    fresh.load_state_tensors(saved)
    train(resumed, fresh, range(2, 4))
    for (name, want), got in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(want, got), name


def test_state_keys_depend_on_the_model_and_not_on_the_steps_taken() -> None:
    model = build_model()
    optimizers = build_optimizer(model, OptimizerArgs(name="muon"), device_type="cpu")
    before = set(optimizers.state_tensors())
    train(model, optimizers, range(1))
    assert set(optimizers.state_tensors()) == before
    assert "layers.0.attention.wq.weight/momentum_buffer" in before
    assert {"norm.weight/step", "norm.weight/exp_avg", "norm.weight/exp_avg_sq"} <= before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state.pop("norm.weight/exp_avg"), "norm.weight/exp_avg: .* lacks"),
        (
            lambda state: state.update({"lost.weight/step": torch.zeros(())}),
            "lost.weight/step: no trainable",
        ),
        (
            lambda state: state.update({"norm.weight/exp_avg": torch.zeros(D + 1)}),
            "norm.weight/exp_avg: got ",
        ),
        (
            lambda state: state.update({"norm.weight/exp_avg": torch.zeros(D).half()}),
            "norm.weight/exp_avg: got ",
        ),
    ],
    ids=["missing", "left over", "shape", "dtype"],
)
def test_state_that_does_not_fit_is_refused_by_key_and_not_loaded(
    damage: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    optimizers = build_optimizer(build_model(), OptimizerArgs(), device_type="cpu")
    saved = {key: torch.ones_like(value) for key, value in optimizers.state_tensors().items()}
    damage(saved)
    with pytest.raises(RequestError, match=said):
        optimizers.load_state_tensors(saved)
    assert all(value.eq(0).all() for value in optimizers.state_tensors().values())

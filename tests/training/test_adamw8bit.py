"""8-bit AdamW: the code itself, a step against torch's, what it learns, and what it weighs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import cross_entropy_sum
from transom.training.optim.adamw8bit import BLOCK, AdamW8bit, dequantize, dynamic_map, quantize
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import Optimizers, build_optimizer


def blocks(count: int, seed: int = 0) -> Tensor:
    """Blocks whose sizes lie seven decades apart, in random order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (torch.rand(count, BLOCK, generator=generator) * -7)
    signs = torch.randint(2, (count, BLOCK), generator=generator) * 2 - 1
    return sizes * signs * torch.logspace(-12, 3, count).unsqueeze(1)


# The code


@pytest.mark.parametrize("signed", [True, False])
def test_map_has_256_rising_values_with_zero_and_one(signed: bool) -> None:
    values = dynamic_map(signed)
    assert len(set(values)) == 256 and list(values) == sorted(values)
    assert 0.0 in values and values[-1] == 1.0
    assert (min(values) < -0.99) == signed
    assert min(value for value in values if value > 0) < 1e-6


@pytest.mark.parametrize(
    ("signed", "of_largest", "of_value"), [(True, 0.0076, 0.071), (False, 0.0041, 0.036)]
)
def test_rounding_error_is_bounded(signed: bool, of_largest: float, of_value: float) -> None:
    values = blocks(64) if signed else blocks(64).abs()
    largest = values.abs().amax(1, keepdim=True)
    error = (dequantize(*quantize(values, signed), signed) - values).abs()
    assert (error <= of_largest * largest).all()
    near = values.abs() >= largest / 10
    assert (error[near] <= of_value * values.abs()[near]).all()


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_of_the_map_is_its_own_code(signed: bool) -> None:
    levels = torch.tensor(dynamic_map(signed)).unsqueeze(0)
    codes, _ = quantize(levels, signed)
    assert torch.equal(codes[0].int(), torch.arange(256, dtype=torch.int32))


def test_the_largest_of_a_block_and_zeros_are_exact() -> None:
    values = blocks(8).abs()
    values[:, 7] = 0.0
    values[3] = 0.0
    back = dequantize(*quantize(values, signed=False), signed=False)
    assert torch.equal(back.amax(1), values.amax(1))
    assert back[:, 7].eq(0).all() and back[3].eq(0).all() and back.isfinite().all()


def test_a_small_second_moment_does_not_vanish() -> None:
    values = torch.full((1, BLOCK), 1e-15)
    values[0, 0] = 1.0
    assert (dequantize(*quantize(values, signed=False), signed=False) > 0).all()


def test_an_outlier_costs_its_own_block_only() -> None:
    values = blocks(2)
    alone = dequantize(*quantize(values, signed=True), signed=True)
    values[1, 5] = 1e6
    assert torch.equal(dequantize(*quantize(values, signed=True), signed=True)[0], alone[0])


# A step


@pytest.mark.parametrize("shape", [(64, 64), (70, 90), (3, 40, 512), (5000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_first_step_is_that_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape).to(dtype))
    twin = nn.Parameter(weight.detach().to(torch.promote_types(dtype, torch.float32), copy=True))
    weight.grad = torch.randn(shape).to(dtype)
    twin.grad = weight.grad.to(twin.dtype)
    AdamW8bit([weight], lr=0.1, weight_decay=0.1).step()
    torch.optim.AdamW([twin], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95)).step()
    torch.testing.assert_close(
        weight, twin.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


def test_later_steps_stay_near_those_of_torch() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 100))
    twin = nn.Parameter(torch.zeros(64, 100))
    ours, torchs = (
        AdamW8bit([weight], lr=0.01),
        torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.95), weight_decay=0),
    )
    drift = torch.randn(64, 100)
    for _ in range(20):
        weight.grad = drift + 0.3 * torch.randn(64, 100) * drift.abs()
        twin.grad = weight.grad.clone()
        ours.step()
        torchs.step()
    error = (weight - twin).norm() / twin.norm()
    assert 0 < error < 0.05, error


def test_small_batches_of_blocks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = [(70, 91), (64, 64), (9, 512)]
    one = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    two = [nn.Parameter(p.detach().clone()) for p in one]
    first, second = AdamW8bit(one), AdamW8bit(two)
    for _ in range(3):
        for p, twin in zip(one, two, strict=True):
            p.grad = torch.randn(p.shape)
            twin.grad = p.grad.clone()
        first.step()
        with monkeypatch.context() as patch:
            patch.setattr("transom.training.optim.adamw8bit.BATCH_ELEMENTS", 7 * BLOCK)
            second.step()
    assert all(torch.equal(p, twin) for p, twin in zip(one, two, strict=True))


def test_a_gradient_that_stops_leaves_the_weight_finite() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW8bit([weight], lr=0.1)
    for scale in (1.0, 1.0, 0.0, 0.0):
        weight.grad = torch.randn(64, 64) * torch.logspace(-6, 0, 64) * scale
        optimizer.step()
    assert weight.abs().max() < 1.0  # four steps of about lr; a vanished denominator would give 1e4


def test_a_parameter_without_gradient_stays_and_counts_no_step() -> None:
    idle, busy = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))
    busy.grad = torch.ones(64, 64)
    optimizer = AdamW8bit([idle, busy], weight_decay=0.1)
    optimizer.step()
    assert idle.eq(1).all() and not busy.eq(1).any()
    assert [float(optimizer.state[p]["step"]) for p in (idle, busy)] == [0, 1]


def test_strided_parameters_and_closures_are_refused() -> None:
    with pytest.raises(RequestError, match="stride: got "):
        AdamW8bit([nn.Parameter(torch.ones(64, 80).t())])
    with pytest.raises(RequestError, match="closure"):
        AdamW8bit([nn.Parameter(torch.ones(4))]).step(lambda: 0.0)


# In a model


def build(state_bits: int) -> tuple[LLM, Optimizers]:
    model = LLM(tiny_args(dim=64, hidden_dim=96))
    model.init_weights(0)
    args = OptimizerArgs(lr=3e-3, state_bits=state_bits)
    return model, build_optimizer(model, args, device_type="cpu")


def train(model: LLM, optimizers: Optimizers, steps: range) -> float:
    """Steps on tokens that count upwards, each row from another start; the last loss."""
    loss = torch.zeros(())
    for step in steps:
        tokens_BT = (random_tokens(8, 1, seed=step) + torch.arange(17)) % 60
        logits = model(TransformerInput(tokens_BT[:, :-1])).logits
        loss = cross_entropy_sum(logits, tokens_BT[:, 1:]) / (8 * 16)
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
    return loss.item()


def test_it_learns_what_32_bits_learn() -> None:
    wide, narrow = (train(*build(bits), range(40)) for bits in (32, 8))
    assert wide < 1.0 and narrow == pytest.approx(wide, rel=0.05) and narrow != wide


def test_large_tensors_take_a_quarter_and_the_others_stay_in_32_bits() -> None:
    model, optimizers = build(8)
    state = optimizers.state_tensors()
    weight = "layers.0.attention.wq.weight"
    assert state[f"{weight}/exp_avg_codes"].dtype == torch.uint8
    for name in (
        "tok_embeddings.weight",
        "norm.weight",
        "layers.0.attention.wk.weight",
    ):  # wk has 2048 elements
        assert state[f"{name}/exp_avg"].dtype == torch.float32
    quantized = {name.partition("/")[0] for name in state if name.endswith("_codes")}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert quantized == {
        n for n, size in sizes.items() if size >= 4096 and n not in ("tok_embeddings.weight",)
    } - {name for name in sizes if name.endswith(("wk.weight", "wv.weight"))}
    taken = sum(t.nbytes for name, t in state.items() if name.partition("/")[0] in quantized)
    assert taken / (8 * sum(sizes[name] for name in quantized)) <= 0.3


def test_resumed_training_is_bit_equal() -> None:
    model, optimizers = build(8)
    train(model, optimizers, range(3))
    saved = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    resumed = copy.deepcopy(model)
    train(model, optimizers, range(3, 6))
    fresh = build_optimizer(resumed, OptimizerArgs(lr=3e-3, state_bits=8), device_type="cpu")
    fresh.load_state_tensors(saved)
    train(resumed, fresh, range(3, 6))
    for (name, want), got in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(want, got), name


def test_a_resumed_run_may_not_change_the_bits() -> None:
    _, wide = build(32)
    _, narrow = build(8)
    with pytest.raises(RequestError, match="lacks this tensor"):
        narrow.load_state_tensors(wide.state_tensors())


def test_muon_keeps_its_own_state() -> None:
    model = LLM(tiny_args(dim=64))
    model.init_weights(0)
    optimizers = build_optimizer(model, OptimizerArgs(name="muon", state_bits=8), device_type="cpu")
    state = optimizers.state_tensors()
    assert "layers.0.attention.wq.weight/momentum_buffer" in state
    assert not any(name.startswith("layers") and name.endswith("codes") for name in state)
    with pytest.raises(RequestError, match=r"^state_bits: got 4"):
        OptimizerArgs(state_bits=4)

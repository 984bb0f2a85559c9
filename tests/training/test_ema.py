"""The moving average of weights: its numbers, the swap, and what a step folder keeps of both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.files.safetensors_files import read_safetensors, write_tensors
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.training.optim.ema import Ema, ema_decay


def weights(model: LLM) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def move(model: LLM, seed: int) -> None:
    """What an optimizer step does, as far as an average can tell."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)


def trained(steps: int, decay: float = 0.9) -> tuple[LLM, Ema]:
    model = random_model(tiny_args())
    ema = Ema(model, decay)
    for step in range(steps):
        move(model, step)
        ema.update(step)
    return model, ema


def averages(model: LLM, ema: Ema) -> dict[str, Tensor]:
    with ema.swapped():
        return weights(model)


def test_decay_warms_up_to_its_value() -> None:
    assert [ema_decay(step, 0.5) for step in (0, 1, 8, 80)] == [0.1, 2 / 11, 0.5, 0.5]


def test_averages_are_those_of_torch_once_warm() -> None:
    model = random_model(tiny_args())
    ema = Ema(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.n_averaged.fill_(1)  # torch's first update copies, ours began with a copy
    for step in range(100, 105):
        move(model, step)
        ema.update(step)
        theirs.update_parameters(model)
    for name, want in theirs.module.named_parameters():
        torch.testing.assert_close(
            averages(model, ema)[name], want.detach(), msg=lambda text, name=name: name + text
        )


def test_the_first_average_is_mostly_the_first_step() -> None:
    model = random_model(tiny_args())
    before, ema = weights(model), Ema(model, 0.999)
    move(model, 0)
    ema.update(0)
    for name, got in averages(model, ema).items():
        torch.testing.assert_close(got, 0.1 * before[name] + 0.9 * weights(model)[name])


def test_the_swap_is_exact_and_survives_an_error() -> None:
    model, ema = trained(3)
    tokens, own, held = random_tokens(2, 9), weights(model), [id(p) for p in model.parameters()]
    plain = model(TransformerInput(tokens)).logits
    seen = []

    def fail_inside() -> None:
        with ema.swapped():
            seen.append(weights(model))
            model(TransformerInput(tokens[0]))

    with pytest.raises(RequestError, match="tokens: got"):
        fail_inside()
    assert not same(seen[0], own)
    assert same(weights(model), own) and [id(p) for p in model.parameters()] == held
    assert torch.equal(model(TransformerInput(tokens)).logits, plain)
    first = averages(model, ema)
    assert same(averages(model, ema), first)


def test_frozen_weights_and_tied_ones() -> None:
    model = random_model(tiny_args(tie_embeddings=True))
    model.layers[0].requires_grad_(False)
    ema = Ema(model, 0.9)
    names = {name.removeprefix("raw/") for name in ema.state_tensors()}
    assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}
    move(model, 0)
    ema.update(0)
    frozen = weights(model)["layers.0.attention.wq.weight"]
    assert torch.equal(averages(model, ema)["layers.0.attention.wq.weight"], frozen)


def test_a_step_folder_holds_the_averages_and_resumes_both(tmp_path: Path) -> None:
    model, ema = trained(3)
    with ema.swapped():
        save(model, tmp_path)
        write_tensors(tmp_path / "trainer.safetensors", ema.state_tensors())
    own, average = weights(model), averages(model, ema)
    assert same(weights(load(tmp_path)), average)
    assert not same(own, average)

    resumed = load(tmp_path)
    again = Ema(resumed, 0.9)
    tensors = {
        **read_safetensors(tmp_path / "trainer.safetensors"),
        "norm.weight/exp_avg": torch.zeros(32),
    }
    again.load_state_tensors(tensors)
    assert list(tensors) == ["norm.weight/exp_avg"]  # the optimizer's are left to it
    assert same(weights(resumed), own) and same(averages(resumed, again), average)
    for one, other in ((model, ema), (resumed, again)):
        move(one, 3)
        other.update(3)
    assert same(averages(resumed, again), averages(model, ema))


def test_saved_weights_that_do_not_fit_are_refused_and_not_loaded() -> None:
    model, ema = trained(2)
    own, saved = weights(model), {key: value.clone() for key, value in ema.state_tensors().items()}
    for damage, said in (
        (lambda state: state.pop("raw/norm.weight"), "raw/norm.weight: saved or"),
        (lambda state: state.update({"raw/lost": torch.zeros(1)}), "raw/lost: saved or"),
        (lambda state: state.update({"raw/norm.weight": torch.zeros(3)}), "raw/norm.weight: got "),
    ):
        state = copy.copy(saved)
        damage(state)
        with pytest.raises(RequestError, match=said):
            ema.load_state_tensors(state)
    assert same(weights(model), own)


def test_wrong_requests_are_refused_by_name() -> None:
    model = random_model(tiny_args())
    for decay in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(RequestError, match="ema_decay: got "):
            Ema(model, decay)
    with pytest.raises(RequestError, match=r"dtype of tok_embeddings.weight"):
        Ema(model.to(torch.bfloat16), 0.9)
    assert Ema(model.double(), 0.9).state_tensors()["raw/norm.weight"].dtype == torch.float64

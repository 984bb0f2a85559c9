"""The coverage report counts what requires a gradient, whatever it was asked to train."""

import pytest

from tests.helpers import random_model, tiny_args
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.coverage import coverage, coverage_lines

MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 24, "shared_expert": True}


def by_name(model):
    return {role.name: role for role in coverage(model)}


def test_experts_left_out_are_seen():
    model = apply_lora(
        random_model(tiny_args(moe_args=MOE)), LoraArgs(rank=2, targets=("attention",))
    )
    roles = by_name(model)
    assert (roles["attention"].training, roles["attention"].modules, roles["attention"].how) == (
        8,
        8,
        "adapter",
    )
    assert (roles["experts"].training, roles["experts"].modules, roles["experts"].how) == (
        0,
        6,
        "frozen",
    )
    assert roles["router"].how == "frozen"


@pytest.mark.parametrize(("target", "role", "other"), [
    ("experts", "experts", "shared_experts"), ("shared_experts", "shared_experts", "experts"),
])  # fmt: skip
def test_all_experts_or_shared_ones_only(target, role, other):
    roles = by_name(
        apply_lora(random_model(tiny_args(moe_args=MOE)), LoraArgs(rank=2, targets=(target,)))
    )
    assert roles[role].training == roles[role].modules > 0
    assert roles[other].training == 0


def test_a_router_trained_whole_is_said():
    args = LoraArgs(rank=2, targets=("attention",), modules_to_save=("router",))
    model = apply_lora(random_model(tiny_args(moe_args=MOE)), args)
    assert by_name(model)["router"].how == "whole"
    assert any(line.split()[:2] == ["router", "whole"] for line in coverage_lines(model))


def test_the_sum_is_what_an_optimizer_would_get():
    model = apply_lora(random_model(tiny_args()), LoraArgs(rank=2, modules_to_save=("norm",)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(role.new + role.whole for role in coverage(model)) == trained

"""Width scaling: which rates are divided, and that sizes then no longer grow with the width, as
they do without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers import tiny_args
from tests.training.coordinate_check import Coordinate, coordinate_check, growth
from transom.models.llm import LLM
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer, parameter_groups, width_multiplier

WIDTHS = (32, 64, 128, 256)


def maker(base: int | None, **changes: Any) -> Callable[[int], LLM]:
    """Models of any width with heads of 16 features; the widths of their parts grow together."""

    def make(width: int) -> LLM:
        sizes = {
            "dim": width,
            "n_heads": width // 16,
            "n_kv_heads": width // 32,
            "hidden_dim": width * 3 // 2,
        }
        moe = {"moe_args": {"num_experts": 4, "hidden_dim": width}} if changes.get("moe") else {}
        rest = {key: value for key, value in changes.items() if key != "moe"}
        model = LLM(tiny_args(**sizes, mup_base_dim=base, **moe, **rest))
        model.init_weights(0)
        return model

    return make


def ratios(rows: list[Coordinate]) -> dict[str, float]:
    """Largest over smallest size among the widths, per module, after the last step."""
    last = max(row.step for row in rows)
    sizes: dict[str, list[float]] = {}
    for row in rows:
        if row.step == last:
            sizes.setdefault(row.module, []).append(row.size)
    return {name: max(values) / min(values) for name, values in sizes.items()}


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"moe": True}], ids=["plain", "tied", "experts"]
)
def test_sizes_stay_with_mup_and_grow_without(changes: dict[str, Any]) -> None:
    args = OptimizerArgs(lr=1e-2)
    with_mup = coordinate_check(maker(32, **changes), WIDTHS, 4, optimizer=args)
    without = coordinate_check(maker(None, **changes), WIDTHS, 4, optimizer=args)
    assert max(ratios(with_mup).values()) < 2.0, ratios(with_mup)
    for name in ("layers.0.attention", "layers.1.attention", "layers.1.feed_forward", "logits"):
        assert ratios(without)[name] > 2.5, (name, ratios(without))
    assert max(growth(with_mup).values()) < 0.15 < 1.0 < max(growth(without).values())


def test_muon_needs_the_logits_factor_only() -> None:
    args = OptimizerArgs(name="muon", lr=1e-2)
    rows = coordinate_check(maker(64), (64, 128, 256), 3, optimizer=args)
    assert max(ratios(rows).values()) < 2.0, ratios(rows)
    without = coordinate_check(maker(None), (64, 128, 256), 3, optimizer=args)
    assert ratios(without)["logits"] > 1.5 and ratios(without)["layers.1.attention"] < 1.5


def test_at_the_base_width_nothing_changes() -> None:
    with_mup, without = (coordinate_check(maker(base), (64, 128), 2) for base in (64, None))
    first, wanted = ([row for row in rows if row.width == 64] for rows in (with_mup, without))
    assert (
        first == wanted and len(first) == 3 * 6
    )  # steps 0, 1, 2; embeddings, four sublayers, logits


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_of_matrices_and_routers_are_divided_and_their_decay_is_kept(name: str) -> None:
    model = maker(16, moe=True)(64)
    args = OptimizerArgs(name=name, lr=1e-2, muon_lr=0.02, embedding_lr=0.3)
    assert width_multiplier(model.args) == 4.0
    plain = {group["name"]: group for group in parameter_groups(model, args)}
    scaled = {
        g["name"]: g for g in parameter_groups(model, args, width=width_multiplier(model.args))
    }
    factors = {group: plain[group]["base_lr"] / scaled[group]["base_lr"] for group in plain}
    matrices = 4.0 if name == "adamw" else 1.0
    assert factors == {
        "matrices": matrices,
        "routers": 4.0,
        "embedding": 1.0,
        "output": 1.0,
        "vectors": 1.0,
    }
    for group in plain:
        decay = scaled[group]["base_lr"] * scaled[group]["weight_decay"]
        unscaled = plain[group]["base_lr"] * plain[group]["weight_decay"]
        assert decay == pytest.approx(unscaled), group
    optimizers = build_optimizer(model, args, device_type="cpu", width=4.0)
    assert optimizers.learning_rates()["routers"] == 1e-2 / 4


def test_growth_is_the_exponent() -> None:
    rows = [
        Coordinate(width, step, "a", 3.0 * width**0.5 * step) for width in WIDTHS for step in (0, 1)
    ]
    rows += [Coordinate(width, 1, "b", 0.2 / width) for width in WIDTHS]
    assert growth(rows) == pytest.approx({"a": 0.5, "b": -1.0})
    assert growth(rows, step=0) == {}  # zeros have no exponent

"""Blockwise attention by itself: derivatives, memory, precision; its values are held to in
test_backends.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention.memory import Largest
from transom.attention import blockwise as module
from transom.attention.blockwise import blockwise
from transom.attention.mask import Layout, MaskSpec
from transom.attention.reference import reference
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 4)
    monkeypatch.setattr(module, "KEYS", 3)


def draw(length: int, heads: int = 4, kv_heads: int = 2, dtype=torch.float64) -> tuple[Tensor, ...]:
    """q [1, T, N, 6], k [1, T, K, 6], v [1, T, K, 5] and sinks [N], with gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, length, heads, 6), (1, length, kv_heads, 6), (1, length, kv_heads, 5), (heads,))
    return tuple(
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_derivatives_are_those_of_finite_differences(small_blocks, softcap, known):
    positions = torch.arange(9)[None]
    spec = MaskSpec(LayerRule("window", 5), positions, None, Layout((9,)) if known else None)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        view = CacheView((k, v), positions, new_at=0 if known else None)
        return blockwise(q, view, spec, ScoreArgs(0.7, softcap, sinks))

    assert torch.autograd.gradcheck(run, draw(9, heads=2, kv_heads=1))


@pytest.mark.parametrize("kind", ["causal", "full", "window"])
@pytest.mark.parametrize("known", [True, False], ids=["layout", "positions"])
def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch, known, kind):
    monkeypatch.setattr(module, "QUERIES", 16)
    monkeypatch.setattr(module, "KEYS", 64)
    length = 384
    q, k, v, sinks = draw(length, heads=2, kv_heads=1, dtype=torch.float32)
    positions = torch.arange(length)[None]
    spec = MaskSpec(
        LayerRule(kind, 64 if kind == "window" else 0),
        positions,
        None,
        Layout((length,)) if known else None,
    )
    calls = []
    call = module._call
    monkeypatch.setattr(module, "_call", lambda *inputs: calls.append(inputs) or call(*inputs))
    # Without gradients it is the Python behind the operators that runs: from outside they are one
    # operation each.
    with Largest() as largest, torch.no_grad():
        view = CacheView((k, v), positions, new_at=0 if known else None)
        out = blockwise(q, view, spec, ScoreArgs(None, 5.0, sinks))
        module._backward(out, *module._forward(*calls[0]), *calls[0])
    assert largest.elements <= length * 2 * 6, (
        "q itself must be the largest tensor, forward and backward"
    )


def test_a_window_meets_only_the_blocks_it_reaches(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 16)
    monkeypatch.setattr(module, "KEYS", 16)
    made = []
    scores = module._scores
    monkeypatch.setattr(
        module, "_scores", lambda rows, key, cap: made.append(key.size(2)) or scores(rows, key, cap)
    )
    length, window = 512, 32
    q, k, v, _ = (x.detach() for x in draw(length))
    positions = torch.arange(length)[None]
    for layout in (Layout((length,)), None):
        made.clear()
        spec = MaskSpec(LayerRule("window", window), positions, None, layout)
        blockwise(q, CacheView((k, v), positions, new_at=0), spec, ScoreArgs())
        assert sum(made) <= length // 16 * (window + 16), (
            "keys met must follow the window, not the length"
        )


def test_float32_inside_even_under_autocast():
    q, k, v, sinks = draw(40, dtype=torch.float32)
    positions = torch.arange(40)[None]
    view, spec = CacheView((k, v), positions), MaskSpec(LayerRule(), positions)
    exact = reference(q, view, spec, ScoreArgs(2.0, 5.0, sinks))
    expected = torch.autograd.grad(exact.sum(), q)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = blockwise(q, view, spec, ScoreArgs(2.0, 5.0, sinks))
        got = torch.autograd.grad(out.sum(), q)[0]
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_scores_too_large_for_exp_are_still_exact(small_blocks):
    """Without a running maximum exp(1000) is inf; a hidden key with the highest score must not
    count either.
    """
    q, k, v, _ = draw(11)
    positions = torch.arange(11)[None]
    view, spec = CacheView((k, v), positions), MaskSpec(LayerRule(), positions)
    results = []
    for attend in (blockwise, reference):
        out = attend(q, view, spec, ScoreArgs(500.0))
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


def test_one_query_and_one_key():
    q, k, v, sinks = draw(1)
    position = torch.zeros(1, 1, dtype=torch.int64)
    out = blockwise(
        q,
        CacheView((k, v), position),
        MaskSpec(LayerRule(), position),
        ScoreArgs(None, None, sinks),
    )
    scores = (q[0, 0] * k[0, 0].repeat_interleave(2, 0)).sum(-1) * 6**-0.5
    expected = torch.sigmoid(scores - sinks)[:, None] * v[0, 0].repeat_interleave(2, 0)
    torch.testing.assert_close(out[0, 0], expected)


def test_shapes_are_worked_out_on_the_meta_device():
    q, positions = torch.empty(1, 300, 4, 16, device="meta"), torch.arange(300, device="meta")[None]
    spec = MaskSpec(LayerRule(), positions, None, Layout((300,)))
    assert (
        blockwise(q, CacheView((q, q), positions, new_at=0), spec, ScoreArgs(softcap=5.0)).shape
        == q.shape
    )


@pytest.mark.parametrize("sink", [1e4, -1e4, float("-inf")])
def test_sinks_far_from_every_score_take_all_or_nothing(small_blocks, sink):
    q, k, v, _ = draw(9)
    positions = torch.arange(9)[None]
    view, spec = CacheView((k, v), positions), MaskSpec(LayerRule(), positions)
    score = ScoreArgs(sinks_N=torch.full((4,), sink, dtype=torch.float64))
    torch.testing.assert_close(blockwise(q, view, spec, score), reference(q, view, spec, score))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_tells_the_compiler_the_shapes_and_strides_that_it_makes(monkeypatch, dtype):
    calls = []
    call = module._call
    monkeypatch.setattr(module, "_call", lambda *inputs: calls.append(inputs) or call(*inputs))
    q, k, v, sinks = draw(7, dtype=dtype)
    positions = torch.arange(7)[None]
    blockwise(
        q,
        CacheView((k, v), positions),
        MaskSpec(LayerRule(), positions),
        ScoreArgs(0.5, 2.0, sinks),
    )
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    torch.library.opcheck(module._forward_op, calls[0], test_utils=tests)

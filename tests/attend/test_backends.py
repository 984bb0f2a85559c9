"""Every backend equals the reference, and the reference equals a loop over pairs; all in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import one_thread
from transom.args import LayerRule
from transom.attend.attend import backend
from transom.attend.mask import Layout, MaskSpec, allowed, positions_from_sizes, segments_from_sizes
from transom.attend.reference import reference
from transom.attend.sdpa import sdpa
from transom.attend.view import CacheView, Score
from transom.errors import RequestError

RULES = [
    LayerRule(),
    LayerRule("full"),
    LayerRule("window", 7),
    LayerRule("window", 60),
    LayerRule("chunk", 16),
    LayerRule("chunk", 50),
]
HEADS = [(8, 8), (8, 2), (8, 1)]
LENGTH = 53  # more than one block of queries, and no multiple of any


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 queries instead of 256: the same edges at a fraction of the work."""
    monkeypatch.setattr("transom.attend.sdpa.BLOCK", 16)


def by_rule(rule: LayerRule) -> str:
    return f"{rule.kind}{rule.size or ''}"


def draw(rows: int, count: int, slots: int, heads: tuple[int, int], dtype=torch.float64) -> tuple[Tensor, ...]:
    """Random q [B, T, N, 8] and k, v [B, S, K, 8] that require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, count, heads[0], 8), (rows, slots, heads[1], 8), (rows, slots, heads[1], 8))
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )


def check_equal(
    states: tuple[Tensor, ...], view_fields: dict, spec: MaskSpec, score: Score | None = None
) -> Tensor:
    """Outputs and gradients of sdpa and the reference agree; returns sdpa's output."""
    score = score or Score()
    q, k, v = states
    results = []
    for attend in (sdpa, reference):
        out = attend(q, CacheView((k, v), **view_fields), spec, score)
        pull = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
        results.append((out, *torch.autograd.grad(out, states, pull)))
    for name, fast, slow in zip(("out", "grad q", "grad k", "grad v"), *results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    return results[0][0]


def test_reference_is_softmax_over_the_allowed_keys():
    """Pair by pair in plain Python: scale, softmax, sum; query head h reads kv head h // (N / K)."""
    q, k, v = draw(2, 5, 6, (4, 2))
    q_positions = torch.tensor([[3, 4, 5, -1, 0], [0, 1, 2, 3, 4]])
    k_positions = torch.tensor([[0, 5, -1, 2, 3, 4], [5, 4, 3, 2, 1, 0]])
    may = allowed(LayerRule("window", 3), q_positions, k_positions)
    out = reference(q, CacheView((k, v), k_positions), MaskSpec(LayerRule("window", 3), q_positions), Score(0.3))
    for b in range(2):
        for t in range(5):
            for h in range(4):
                seen = [s for s in range(6) if may[b, t, s]]
                weights = [math.exp(0.3 * (q[b, t, h] @ k[b, s, h // 2]).item()) for s in seen]
                expected = sum(
                    (w / sum(weights) * v[b, s, h // 2] for w, s in zip(weights, seen, strict=True)),
                    torch.zeros(8, dtype=torch.float64),
                )
                torch.testing.assert_close(out[b, t, h], expected, rtol=0, atol=1e-12)


def lay_out(kind: str, length: int) -> tuple[Tensor, Tensor | None, Layout | None]:
    """Positions [B, T], segments and layout of a call that has nothing cached."""
    if kind == "rows":
        return torch.arange(length).expand(2, -1), None, Layout((length, length))
    if kind == "start":
        return torch.arange(37, 37 + length).expand(2, -1), None, Layout((length, length), start=37)
    if kind == "padded":
        lengths = torch.tensor([length, length // 3, 0])
        positions = torch.arange(length).expand(3, -1)
        positions = positions.masked_fill(positions >= lengths[:, None], -1)
        return positions, None, Layout((length,) * 3, padded=True)
    if kind == "packed":
        rows = [[5, 5, 1, 9, length - 20], [length - 19, 19]]
        positions = torch.stack([positions_from_sizes(sizes) for sizes in rows])
        segments = torch.stack([segments_from_sizes(sizes) for sizes in rows])
        return positions, segments, Layout(tuple(size for sizes in rows for size in sizes))
    # Anything at all: out of order, repeated, empty, in two segments.
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(-1, length // 2, (2, length), generator=generator)
    return positions, torch.randint(0, 2, (2, length), generator=generator), None


@pytest.mark.parametrize("layout", ["rows", "start", "padded", "packed", "anything"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
@pytest.mark.parametrize("rule", RULES, ids=by_rule)
def test_sdpa_equals_reference_without_a_cache(small_blocks, rule, heads, layout):
    positions, segments, known = lay_out(layout, LENGTH)
    states = draw(*positions.shape, positions.size(1), heads)
    view = {"positions_BS": positions, "segments_BS": segments, "new_at": None if known is None else 0}
    out = check_equal(states, view, MaskSpec(rule, positions, segments, known))
    assert (out[positions < 0] == 0).all(), "padding must come out as exact zeros"


@pytest.mark.parametrize("kind", ["window", "chunk"])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65])
def test_sdpa_equals_reference_around_the_edges_of_a_window_or_chunk(small_blocks, kind, size):
    positions, segments, known = lay_out("rows", 64)
    view = {"positions_BS": positions, "segments_BS": segments, "new_at": 0}
    check_equal(draw(2, 64, 64, (4, 2)), view, MaskSpec(LayerRule(kind, size), positions, None, known))


def cached(kind: str, rule: LayerRule) -> tuple[Tensor, Tensor, int | None]:
    """(positions of the queries, of the slots, `new_at`) where rows have seen 40 and 23 tokens before."""
    generator = torch.Generator().manual_seed(2)
    seen, capacity = torch.tensor([[40], [23]]), (rule.size or 41) + 3
    count = 4 if kind == "ring" else LENGTH
    queries = seen + torch.arange(count)
    if kind == "prefix, padded":
        queries[1, count // 2 :] = -1
    last = queries.amax(1, keepdim=True) if kind == "ring" else seen - 1
    slots = last - torch.arange(capacity)  # what a ring holds: the newest `capacity` positions, or empty
    slots = slots.clamp(min=-1)[:, torch.randperm(capacity, generator=generator)]
    return (queries, slots, None) if kind == "ring" else (queries, torch.cat((slots, queries), 1), capacity)


@pytest.mark.parametrize("kind", ["prefix", "prefix, padded", "ring"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.kind != "full"], ids=by_rule)
def test_sdpa_equals_reference_with_cached_slots(small_blocks, rule, kind):
    queries, slots, new_at = cached(kind, rule)
    states = draw(*queries.shape, slots.size(1), (4, 2))
    out = check_equal(states, {"positions_BS": slots, "new_at": new_at}, MaskSpec(rule, queries), Score(0.2))
    assert (out[queries < 0] == 0).all(), "padding must come out as exact zeros"


def test_queries_that_see_nothing_give_zeros_and_finite_gradients():
    queries, slots = torch.tensor([[9, -1, 4]]), torch.tensor([[-1, 0, 12, -1]])
    states = draw(1, 3, 4, (2, 2))
    out = check_equal(states, {"positions_BS": slots}, MaskSpec(LayerRule("window", 3), queries))
    assert (out == 0).all()
    grads = torch.autograd.grad(
        sdpa(states[0], CacheView(states[1:], slots), MaskSpec(LayerRule(), queries), Score()).sum(), states
    )
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("prefix", [0, 96])
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_sdpa_never_builds_a_mask_of_the_whole_call(monkeypatch, kind, prefix):
    count, rule, seen = 8192, LayerRule(kind, 64), []
    kernel = F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        seen.append((0 if attn_mask is None else attn_mask.numel(), q.size(-2) * k.size(-2)))
        return kernel(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    queries = torch.arange(prefix, prefix + count)[None]
    slots = torch.arange(prefix + count)[None]
    q, k, v = (x.detach() for x in draw(1, count, prefix + count, (1, 1), torch.float32))
    layout = None if prefix else Layout((count,))
    sdpa(q, CacheView((k, v), slots, new_at=prefix), MaskSpec(rule, queries, None, layout), Score())
    masks, products = (max(numbers) for numbers in zip(*seen, strict=True))
    assert max(masks, products) <= 512 * 512, "work per call must follow the window, not the length"


@pytest.mark.parametrize("rule", [LayerRule(), LayerRule("window", 7)], ids=by_rule)
def test_sdpa_in_bfloat16_is_near_the_float64_reference(rule):
    positions, _, known = lay_out("rows", LENGTH)
    spec = MaskSpec(rule, positions, None, known)
    q, k, v = (x.detach() for x in draw(2, LENGTH, LENGTH, (8, 2), torch.bfloat16))
    out = sdpa(q, CacheView((k, v), positions, new_at=0), spec, Score())
    wide = reference(q.double(), CacheView((k.double(), v.double()), positions, new_at=0), spec, Score())
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), wide, rtol=2**-7, atol=2**-7)


def test_unknown_backend_names_the_nearest():
    assert backend("sdpa") is sdpa
    with pytest.raises(RequestError, match="did you mean 'reference'"):
        backend("referense")

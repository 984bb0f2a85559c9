"""Every backend equals the reference, and the reference equals a loop over pairs and peers; all in
float64.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attention.memory import Largest
from transom.attention.backends import BACKENDS, Attend
from transom.attention.mask import (
    Layout,
    MaskSpec,
    allowed,
    positions_from_sizes,
    segments_from_sizes,
)
from transom.attention.reference import reference
from transom.attention.sdpa import sdpa
from transom.attention.view import CacheView, ScoreArgs
from transom.base.runtime import one_thread
from transom.config.layer_args import LayerRule

RULES = [
    LayerRule(),
    LayerRule("full"),
    LayerRule("window", 7),
    LayerRule("window", 60),
    LayerRule("chunk", 16),
    LayerRule("chunk", 50),
]
HEADS = [(8, 8), (8, 2), (8, 1)]
SINKS = torch.tensor([0.3, -2.0, 1.5, 4.0, 0.0, -0.5, 2.5, 1.0], dtype=torch.float64)
SCORES = {  # what each backend is held to: sdpa is torch's kernel for plain scores
    "sdpa": lambda heads: ScoreArgs(),
    "blockwise": lambda heads: ScoreArgs(0.4, 2.0, SINKS[:heads].clone().requires_grad_()),
}
LENGTH = 53  # more than one block of queries, and no multiple of any


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 queries instead of 256: the same edges at a fraction of the work."""
    monkeypatch.setattr("transom.attention.sdpa.BLOCK", 16)
    monkeypatch.setattr("transom.attention.blockwise.QUERIES", 16)
    monkeypatch.setattr("transom.attention.blockwise.KEYS", 8)


@pytest.fixture(params=SCORES)
def name(request):
    """Each backend that runs here."""
    return request.param


def by_rule(rule: LayerRule) -> str:
    return f"{rule.kind}{rule.size or ''}"


def draw(
    rows: int, count: int, slots: int, heads: tuple[int, int], dtype=torch.float64, v_dim: int = 8
) -> tuple[Tensor, ...]:
    """Random q [B, T, N, 8], k [B, S, K, 8] and v [B, S, K, v_dim] that require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (rows, count, heads[0], 8),
        (rows, slots, heads[1], 8),
        (rows, slots, heads[1], v_dim),
    )
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    )


def check_equal(
    attend: Attend,
    states: tuple[Tensor, ...],
    view_fields: dict,
    spec: MaskSpec,
    score: ScoreArgs | None = None,
) -> Tensor:
    """Outputs and gradients of a backend and the reference agree; returns the backend's output."""
    score = score or ScoreArgs()
    q, k, v = states
    inputs = states if score.sinks_N is None else (*states, score.sinks_N)
    results = []
    for one in (attend, reference):
        out = one(q, CacheView((k, v), **view_fields), spec, score)
        pull = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
        results.append((out, *torch.autograd.grad(out, inputs, pull)))
    names = ("out", "grad q", "grad k", "grad v", "grad sinks")
    for name, fast, slow in zip(names, *results, strict=False):
        torch.testing.assert_close(
            fast, slow, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    return results[0][0]


def test_reference_is_softmax_over_the_allowed_keys():
    """Pair by pair in plain Python: scale, softmax, sum; query head h reads kv head h // (N /
    K).
    """
    q, k, v = draw(2, 5, 6, (4, 2))
    q_positions = torch.tensor([[3, 4, 5, -1, 0], [0, 1, 2, 3, 4]])
    k_positions = torch.tensor([[0, 5, -1, 2, 3, 4], [5, 4, 3, 2, 1, 0]])
    may = allowed(LayerRule("window", 3), q_positions, k_positions)
    out = reference(
        q,
        CacheView((k, v), k_positions),
        MaskSpec(LayerRule("window", 3), q_positions),
        ScoreArgs(0.3),
    )
    for b in range(2):
        for t in range(5):
            for h in range(4):
                seen = [s for s in range(6) if may[b, t, s]]
                weights = [math.exp(0.3 * (q[b, t, h] @ k[b, s, h // 2]).item()) for s in seen]
                expected = sum(
                    (
                        w / sum(weights) * v[b, s, h // 2]
                        for w, s in zip(weights, seen, strict=True)
                    ),
                    torch.zeros(8, dtype=torch.float64),
                )
                torch.testing.assert_close(out[b, t, h], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("peer", ["gemma2", "gpt_oss"])
def test_reference_caps_and_sinks_as_transformers_does(peer):
    """Gemma 2's soft-cap and gpt-oss's sinks, from the eager code of `transformers`."""
    if peer == "gemma2":
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

        score, options, module = ScoreArgs(0.3, softcap=1.5), {"softcap": 1.5}, torch.nn.Module()
    else:
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

        score, options, module = ScoreArgs(0.3, sinks_N=SINKS[:4]), {}, torch.nn.Module()
        module.sinks = SINKS[:4]
    module.eval()
    module.num_key_value_groups = 2
    states, positions = draw(2, 9, 9, (4, 2)), torch.arange(9).expand(2, -1)
    hidden = ~allowed(LayerRule("window", 4), positions, positions).unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    heads_first = (x.transpose(1, 2) for x in states)
    expected, _ = eager_attention_forward(
        module, *heads_first, mask, scaling=0.3, dropout=0.0, **options
    )
    out = reference(
        states[0],
        CacheView(states[1:], positions),
        MaskSpec(LayerRule("window", 4), positions),
        score,
    )
    torch.testing.assert_close(
        out, expected, rtol=0, atol=1e-6
    )  # the peers compute softmax in float32


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
def test_backend_equals_reference_without_a_cache(small_blocks, name, rule, heads, layout):
    positions, segments, known = lay_out(layout, LENGTH)
    states = draw(*positions.shape, positions.size(1), heads)
    view = {
        "positions_BS": positions,
        "segments_BS": segments,
        "new_at": None if known is None else 0,
    }
    score, attend = SCORES[name](heads[0]), BACKENDS[name]
    out = check_equal(attend, states, view, MaskSpec(rule, positions, segments, known), score)
    assert (out[positions < 0] == 0).all(), "padding must come out as exact zeros"


@pytest.mark.parametrize("kind", ["window", "chunk"])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65])
def test_backend_equals_reference_around_the_edges_of_a_window_or_chunk(
    small_blocks, name, kind, size
):
    positions, segments, known = lay_out("rows", 64)
    view = {"positions_BS": positions, "segments_BS": segments, "new_at": 0}
    spec = MaskSpec(LayerRule(kind, size), positions, None, known)
    check_equal(BACKENDS[name], draw(2, 64, 64, (4, 2)), view, spec, SCORES[name](4))


@pytest.mark.parametrize("v_dim", [1, 5, 12])
@pytest.mark.parametrize("layout", ["rows", "packed", "anything"])
def test_values_may_have_a_head_dim_of_their_own(small_blocks, name, layout, v_dim):
    positions, segments, known = lay_out(layout, LENGTH)
    view = {
        "positions_BS": positions,
        "segments_BS": segments,
        "new_at": None if known is None else 0,
    }
    states = draw(2, LENGTH, LENGTH, (4, 2), v_dim=v_dim)
    spec = MaskSpec(LayerRule("window", 20), positions, segments, known)
    assert check_equal(BACKENDS[name], states, view, spec, SCORES[name](4)).shape == (
        2,
        LENGTH,
        4,
        v_dim,
    )


def cached(kind: str, rule: LayerRule) -> tuple[Tensor, Tensor, int | None]:
    """(positions of the queries, of the slots, `new_at`) where rows have seen 40 and 23 tokens
    before.
    """
    generator = torch.Generator().manual_seed(2)
    seen, capacity = torch.tensor([[40], [23]]), (rule.size or 41) + 3
    count = 4 if kind == "ring" else LENGTH
    queries = seen + torch.arange(count)
    if kind == "prefix, padded":
        queries[1, count // 2 :] = -1
    last = queries.amax(1, keepdim=True) if kind == "ring" else seen - 1
    slots = last - torch.arange(
        capacity
    )  # what a ring holds: the newest `capacity` positions, or empty
    slots = slots.clamp(min=-1)[:, torch.randperm(capacity, generator=generator)]
    return (
        (queries, slots, None)
        if kind == "ring"
        else (queries, torch.cat((slots, queries), 1), capacity)
    )


@pytest.mark.parametrize("kind", ["prefix", "prefix, padded", "ring"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.kind != "full"], ids=by_rule)
def test_backend_equals_reference_with_cached_slots(small_blocks, name, rule, kind):
    queries, slots, new_at = cached(kind, rule)
    states = draw(*queries.shape, slots.size(1), (4, 2))
    view, score = {"positions_BS": slots, "new_at": new_at}, SCORES[name](4)
    out = check_equal(BACKENDS[name], states, view, MaskSpec(rule, queries), score)
    assert (out[queries < 0] == 0).all(), "padding must come out as exact zeros"


@pytest.mark.parametrize("sinks", [None, SINKS[:2]])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_queries_that_see_nothing_give_zeros_and_finite_gradients(softcap, sinks):
    queries, slots = torch.tensor([[9, -1, 4]]), torch.tensor([[-1, 0, 12, -1]])
    score = ScoreArgs(0.3, softcap, None if sinks is None else sinks.clone().requires_grad_())
    for name in ["sdpa", "blockwise"] if score.plain else ["blockwise"]:
        states = draw(1, 3, 4, (2, 2))
        spec = MaskSpec(LayerRule("window", 3), queries)
        assert (
            check_equal(BACKENDS[name], states, {"positions_BS": slots}, spec, score) == 0
        ).all()
        out = BACKENDS[name](
            states[0], CacheView(states[1:], slots), MaskSpec(LayerRule(), queries), score
        )
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), states))


@pytest.mark.parametrize("v_dim", [4, 8, 16])
def test_sdpa_stays_linear_where_values_have_another_head_dim(v_dim):
    """torch's fused CPU kernel wants one head dim and else takes dense scores, without a word."""
    length = 512
    q, k, v = (
        x.detach().requires_grad_() for x in draw(1, length, length, (1, 1), torch.float32, v_dim)
    )
    positions = torch.arange(length)[None]
    with Largest() as largest:
        spec = MaskSpec(LayerRule(), positions, None, Layout((length,)))
        sdpa(q, CacheView((k, v), positions, new_at=0), spec, ScoreArgs()).sum().backward()
    assert largest.elements <= length * 16


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
    sdpa(
        q,
        CacheView((k, v), slots, new_at=prefix),
        MaskSpec(rule, queries, None, layout),
        ScoreArgs(),
    )
    masks, products = (max(numbers) for numbers in zip(*seen, strict=True))
    assert max(masks, products) <= 512 * 512, "work per call must follow the window, not the length"


@pytest.mark.parametrize("rule", [LayerRule(), LayerRule("window", 7)], ids=by_rule)
def test_backend_in_bfloat16_is_near_the_float64_reference(name, rule):
    positions, _, known = lay_out("rows", LENGTH)
    spec = MaskSpec(rule, positions, None, known)
    q, k, v = (x.detach() for x in draw(2, LENGTH, LENGTH, (8, 2), torch.bfloat16))
    out = BACKENDS[name](q, CacheView((k, v), positions, new_at=0), spec, SCORES[name](8))
    wide = CacheView((k.double(), v.double()), positions, new_at=0)
    exact = reference(q.double(), wide, spec, SCORES[name](8))
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)

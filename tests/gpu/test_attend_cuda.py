"""Attention backends on a CUDA device against the float64 reference on the same rounded inputs,
with gradients.
"""

import pytest
import torch

from transom.attention.backends import BACKENDS, auto, choose
from transom.attention.mask import Layout, MaskSpec, positions_from_sizes, segments_from_sizes
from transom.attention.reference import reference
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RULES = [LayerRule(), LayerRule("full"), LayerRule("window", 100), LayerRule("chunk", 130)]
LENGTH = 300  # no multiple of a block of 128
# Largest error over largest value. Kernels round the softmax weights to the inputs' dtype (half a
# unit in the last place each: 2^-9 in bfloat16) and sum a few hundred of them; gradients are two
# such products deep, and the float32 case allows for exp2 and a different order of summation.
OUT = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}
GRAD = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 1e-3}


def by_rule(rule):
    return f"{rule.kind}{rule.size or ''}"


def lay_out(kind):
    """(positions [2, T], segments, layout, new_at)."""
    rows = torch.arange(LENGTH, device="cuda").expand(2, -1)
    if kind == "rows":
        return rows, None, Layout((LENGTH, LENGTH)), 0
    if kind == "padded":
        ends = torch.tensor([[LENGTH], [130]], device="cuda")
        return rows.masked_fill(rows >= ends, -1), None, Layout((LENGTH, LENGTH), padded=True), 0
    if kind == "packed":
        sizes = [[128, 1, 171], [299, 1]]
        positions = torch.stack([positions_from_sizes(row, "cuda") for row in sizes])
        segments = torch.stack([segments_from_sizes(row, "cuda") for row in sizes])
        return positions, segments, Layout((128, 1, 171, 299, 1)), 0
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(-1, LENGTH, (2, LENGTH), generator=generator).cuda()
    return positions, torch.randint(0, 2, (2, LENGTH), generator=generator).cuda(), None, None


def make_score(kind):
    sinks = torch.linspace(-2, 3, 8, device="cuda").requires_grad_() if "sinks" in kind else None
    return ScoreArgs(0.15, 3.0 if "cap" in kind else None, sinks)


def near(name, got, exact, tolerance):
    assert got.isfinite().all(), f"{name} is not finite"
    error = ((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)).item()
    assert error < tolerance, f"{name}: {error:.1e} of its largest value"


def check(attend, states, view_fields, spec, score, dtype):
    """Output and gradients of `attend` on rounded inputs against the reference on the same numbers
    in float64.
    """
    results = []
    for one, kind in ((attend, dtype), (reference, torch.float64)):
        q, k, v = (x.detach().to(dtype).to(kind).requires_grad_() for x in states)
        inputs = (q, k, v) if score.sinks_N is None else (q, k, v, score.sinks_N)
        out = one(q, CacheView((k, v), **view_fields), spec, score)
        pull = torch.cos(torch.arange(out.numel(), device="cuda", dtype=torch.float64)).view_as(out)
        results.append((out, *torch.autograd.grad(out, inputs, pull.to(dtype).to(out.dtype))))
    names = ("out", "grad q", "grad k", "grad v", "grad sinks")
    for index, (name, got, exact) in enumerate(zip(names, *results, strict=False)):
        near(name, got, exact.double(), GRAD[dtype] if index else OUT[dtype])


@pytest.mark.parametrize("kind", ["plain", "cap", "sinks", "cap+sinks"])
@pytest.mark.parametrize("layout", ["rows", "padded", "packed", "anything"])
@pytest.mark.parametrize("dtype", OUT, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("rule", RULES, ids=by_rule)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_backend_equals_the_reference_wherever_it_declares_support(name, rule, dtype, layout, kind):
    positions, segments, known, new_at = lay_out(layout)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, LENGTH, 8, 64), (2, LENGTH, 2, 64), (2, LENGTH, 2, 64))
    states = [torch.randn(shape, generator=generator).cuda() for shape in shapes]
    view = {"positions_BS": positions, "segments_BS": segments, "new_at": new_at}
    spec, score = MaskSpec(rule, positions, segments, known), make_score(kind)
    q, k, v = (x.to(dtype) for x in states)
    reason = BACKENDS[name].why_not(q, CacheView((k, v), **view), spec, score)
    if reason is not None:
        pytest.skip(reason)
    check(BACKENDS[name].function, states, view, spec, score, dtype)


@pytest.mark.parametrize("v_dim", [64, 128])
@pytest.mark.parametrize("name", ["sdpa", "blockwise", "flex", "varlen"])
def test_values_of_another_head_dim(name, v_dim):
    positions, _, known, new_at = lay_out("rows")
    states = [torch.randn(2, LENGTH, 4, dim, device="cuda") for dim in (96, 96, v_dim)]
    view, spec = (
        {"positions_BS": positions, "new_at": new_at},
        MaskSpec(LayerRule(), positions, None, known),
    )
    q, k, v = (x.bfloat16() for x in states)
    reason = BACKENDS[name].why_not(q, CacheView((k, v), **view), spec, ScoreArgs())
    if reason is not None:
        pytest.skip(reason)
    check(BACKENDS[name].function, states, view, spec, ScoreArgs(), torch.bfloat16)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", ["sdpa", "blockwise", "flex"])
def test_few_queries_against_many_cached_slots(name, queries):
    slots = torch.arange(512, device="cuda").expand(2, -1)
    spec = MaskSpec(LayerRule("window", 200), slots[:, 400 : 400 + queries])
    score = make_score("plain" if name == "sdpa" else "cap+sinks")
    states = [
        torch.randn(2, n, h, 64, device="cuda") for n, h in ((queries, 8), (512, 2), (512, 2))
    ]
    with torch.no_grad():
        q, k, v = (x.bfloat16() for x in states)
        got = BACKENDS[name].function(q, CacheView((k, v), slots), spec, score)
        exact = reference(q.double(), CacheView((k.double(), v.double()), slots), spec, score)
    near("out", got, exact, OUT[torch.bfloat16])


def test_flex_takes_many_lengths_and_rules_without_falling_back_to_dense_scores():
    for length in (129, 200, 256, 300, 513, 640, 777, 900, 1024, 1100):
        positions = torch.arange(length, device="cuda")[None]
        for rule in (LayerRule(), LayerRule("window", 64)):
            q = torch.randn(1, length, 4, 64, device="cuda", dtype=torch.bfloat16)
            view, spec = (
                CacheView((q, q), positions, new_at=0),
                MaskSpec(rule, positions, None, Layout((length,))),
            )
            score = ScoreArgs(softcap=5.0)
            exact = reference(
                q.double(), CacheView((q.double(), q.double()), positions), spec, score
            )
            near(
                f"{length} {by_rule(rule)}",
                BACKENDS["flex"].function(q, view, spec, score),
                exact,
                2**-6,
            )


@pytest.mark.parametrize(
    ("name", "rule", "layout", "score"),
    [
        ("sdpa", LayerRule(), Layout((32768,)), ScoreArgs()),
        ("varlen", LayerRule("window", 1024), Layout((32768,)), ScoreArgs()),
        ("flex", LayerRule("window", 1024), Layout((32768,)), ScoreArgs(softcap=5.0)),
    ],
)
def test_auto_is_linear_in_memory_at_32k(name, rule, layout, score):
    length = 32768
    q, k = (torch.randn(1, length, n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2))
    q.requires_grad_()
    positions = torch.arange(length, device="cuda")[None]
    view, spec = CacheView((k, k), positions, new_at=0), MaskSpec(rule, positions, None, layout)
    assert choose(q, view, spec, score).name == name
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    auto(q, view, spec, score).sum().backward()
    # Output, gradients, their float32 sums and logarithms: a few times q; one dense head alone
    # would be 2 GiB.
    assert torch.cuda.max_memory_allocated() - before < 16 * q.numel() * q.element_size()

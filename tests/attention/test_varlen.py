"""Varlen: what it hands to torch's kernel, by a slow stand-in with the documented meaning of every
argument.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as peer

from transom.attention import varlen as module
from transom.attention.mask import Layout, MaskSpec, positions_from_sizes, segments_from_sizes
from transom.attention.reference import reference
from transom.attention.sdpa import by_documents
from transom.attention.varlen import varlen, why_not
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule

RULES = [LayerRule(), LayerRule("full"), LayerRule("window", 7), LayerRule("chunk", 16)]


def stand_in(
    q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False
):
    """torch's varlen_attn, one document at a time; (left, right) keys around a query's own, -1
    without end.
    """
    assert ends_q.dtype == ends_k.dtype == torch.int32 and q.size(-1) == v.size(-1)
    assert longest_q == longest_k == int(ends_q.diff().max()) and int(ends_q[-1]) == q.size(0)
    repeats = q.size(1) // k.size(1)
    assert enable_gqa == (repeats > 1)
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    left, right = window_size
    pieces = []
    for start, stop in zip(ends_q.tolist(), ends_q.tolist()[1:], strict=False):
        scores = torch.einsum("tnh,snh->nts", q[start:stop], k[start:stop]) * scale
        ahead = torch.arange(stop - start)[None] - torch.arange(stop - start)[:, None]
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if right >= 0:
            hidden |= ahead > right
        if left >= 0:
            hidden |= ahead < -left
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("nts,snh->tnh", weights, v[start:stop]))
    return torch.cat(pieces)


def without_gqa(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size):
    """The signature of releases before grouped heads."""
    return stand_in(
        q, k, v, ends_q, ends_k, longest_q, longest_k, scale=scale, window_size=window_size
    )


@pytest.fixture(params=[stand_in, without_gqa])
def kernel(request, monkeypatch):
    monkeypatch.setattr(peer, "varlen_attn", request.param)
    module._read_parameters.cache_clear()
    yield
    module._read_parameters.cache_clear()


def draw(rows: int, length: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, length, 4, 16), (rows, length, 2, 16), (rows, length, 2, 8))
    return tuple(
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )


# Padding that every query would see is no job for it: see the test behind this one.
JOBS = [
    (rule, layout)
    for rule in RULES
    for layout in ("rows", "start", "padded", "packed")
    if (rule.kind, layout) != ("full", "padded")
]


@pytest.mark.parametrize(
    ("rule", "layout"),
    JOBS,
    ids=lambda one: one if isinstance(one, str) else f"{one.kind}{one.size or ''}",
)
def test_documents_windows_and_chunks_reach_the_kernel_as_meant(kernel, rule, layout):
    length, segments = 40, None
    positions = torch.arange(length).expand(2, -1)
    known = Layout((length, length))
    if layout == "start":
        positions, known = positions + 11, Layout((length, length), start=11)
    elif layout == "padded":
        positions, known = (
            positions.masked_fill(positions >= torch.tensor([[40], [13]]), -1),
            Layout((length, length), padded=True),
        )
    elif layout == "packed":
        sizes = [[5, 17, 18], [39, 1]]
        positions = torch.stack([positions_from_sizes(row) for row in sizes])
        segments = torch.stack([segments_from_sizes(row) for row in sizes])
        known = Layout((5, 17, 18, 39, 1))
    states = draw(2, length)
    view = CacheView(states[1:], positions, segments, new_at=0)
    spec = MaskSpec(rule, positions, segments, known)
    got, expected = (
        varlen(states[0], view, spec, ScoreArgs(0.3)),
        reference(states[0], view, spec, ScoreArgs(0.3)),
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for fast, slow in zip(
        *(torch.autograd.grad(x.square().sum(), states) for x in (got, expected)), strict=True
    ):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


def on_cuda(head_dim: int = 16, v_dim: int | None = None) -> tuple[Tensor, CacheView]:
    """What a CUDA call would look like, without a device: the checks read shapes, dtype and device
    alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 8, 2, head_dim, dtype=torch.bfloat16, device="cuda")
        v = torch.empty(1, 8, 2, v_dim or head_dim, dtype=torch.bfloat16, device="cuda")
    return q, CacheView((q, v), torch.arange(8)[None], new_at=0)


@pytest.mark.parametrize(
    ("reason", "head_dim", "v_dim", "layout", "score"),
    [
        (None, 16, None, Layout((8,)), ScoreArgs()),
        (None, 16, 8, Layout((8,)), ScoreArgs(0.1)),
        ("document lengths", 16, None, None, ScoreArgs()),
        ("steps of 8", 20, None, Layout((8,)), ScoreArgs()),
        ("values of 24", 16, 24, Layout((8,)), ScoreArgs()),
        ("soft caps", 16, None, Layout((8,)), ScoreArgs(softcap=2.0)),
    ],
)
def test_varlen_says_what_it_cannot_do(reason, head_dim, v_dim, layout, score):
    q, view = on_cuda(head_dim, v_dim)
    got = why_not(q, view, MaskSpec(LayerRule(), view.positions_BS, None, layout), score)
    assert got is None if reason is None else reason in (got or "")


def test_a_torch_without_windows_is_not_a_crash(monkeypatch):
    monkeypatch.setattr(
        peer, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None
    )
    module._read_parameters.cache_clear()
    q, view = on_cuda()
    reason = why_not(
        q, view, MaskSpec(LayerRule(), view.positions_BS, None, Layout((8,))), ScoreArgs()
    )
    module._read_parameters.cache_clear()
    assert reason is not None and "window_size" in reason


def test_padding_that_every_query_would_see_is_no_job_for_slices_of_documents():
    positions = torch.arange(40).expand(2, -1)
    states = draw(2, 40)
    spec = MaskSpec(LayerRule("full"), positions, layout=Layout((40, 40), padded=True))
    view = CacheView(states[1:], positions, new_at=0)
    assert not by_documents(view, spec)
    assert by_documents(view, replace(spec, rule=LayerRule()))

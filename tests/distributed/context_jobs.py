"""Attention of rows that ranks divide, by a ring and to gathered keys."""

from __future__ import annotations

import torch
import torch.distributed as dist

from transom.attention.backends import auto
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import collected_notices
from transom.config.layer_args import LayerRule
from transom.data.batch import Batch
from transom.distributed.context_parallel import ContextAttend, cut_rows

ROWS, TOKENS, HEADS, DIM = 2, 21, 4, 16  # 21 tokens are padded to a multiple of the pieces


def job(device="cpu", dtype=torch.float64, kv_heads=2, tokens=TOKENS):
    """Return this rank's tokens of random rows: states, positions and the gradient of the output.

    The gradient of padding is 0, since no loss depends on it.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([tokens, tokens - 4])
    ids = torch.arange(tokens).expand(ROWS, -1)
    own = cut_rows(Batch(ids, ids, lengths=lengths), rank, ranks)
    assert own.positions is not None
    real = (own.positions >= 0)[..., None, None]
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    full = (torch.randn(ROWS, tokens, n, DIM, generator=draw, dtype=torch.float64) for n in heads)
    q, k, v, grad = (one[:, own.tokens[0]].to(device, dtype) for one in full)
    return (q, k, v), own.positions.to(device), grad * real.to(device), real.to(device)


def results(ring, mesh, states, positions, grad, real):
    """Return the output of real tokens, and the gradients of queries, keys and values."""
    q, k, v = (state.clone().requires_grad_() for state in states)
    spec, view = MaskSpec(LayerRule(), positions), CacheView((k, v), positions)
    with collected_notices() as notices:
        out = ContextAttend(auto, mesh, ring)(q, view, spec, ScoreArgs(0.3))
    assert not notices, "keys are gathered"
    assert (out.grad_fn.next_functions[0][0].name() == "_RingBackward") == ring
    out.backward(grad)
    return out.detach() * real, q.grad, k.grad, v.grad


def difference(found, expected):
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))

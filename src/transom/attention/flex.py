"""torch's FlexAttention: one compiled kernel for soft-capping, sinks and any positions.

The lowest and highest position and segment of each block decide which blocks of keys a block of
queries needs. Pairs of tokens are not compared. The result is a table (T / 128) x (S / 128) per
step and rule. Blocks that are visible throughout skip the mask (FlexAttention, arXiv 2412.05496).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.attention.graphs import constant_in_graphs
from transom.attention.mask import MaskSpec, visible
from transom.attention.view import CacheView, ScoreArgs

BLOCK = 128  # tokens per block of queries and of keys
FAR = 2**62  # beyond every position and segment


def why_not(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    """Return why flex can't compute this job, or None."""
    if q_BTNH.device.type != "cuda":
        return (
            f"has a kernel for cuda only, and computes all scores at once on {q_BTNH.device.type}"
        )
    if q_BTNH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {q_BTNH.dtype}"
    v_dim = view.dense()[0][1].size(-1)
    if min(q_BTNH.size(-1), v_dim) < 16:
        return f"takes head dims of 16 or more, not {q_BTNH.size(-1)} with values of {v_dim}"
    return None if _has_triton() else "needs triton, which is not installed"


def flex(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Return softmax(cap(q k^T scale), sinks) v under the mask rule.

    See `backends.Attend` for the arguments.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    call: Callable[..., Any] = flex_attention
    if q_BTNH.is_cuda and not torch.compiler.is_compiling():
        call = _compiled()
    (k, v), _ = view.dense()
    out, aux = call(
        q_BTNH.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if score.softcap is None else _softcap_mod(score.softcap),
        block_mask=_block_mask(view, spec, q_BTNH.size(0)),
        scale=score.scale_for(q_BTNH.size(-1)),
        enable_gqa=q_BTNH.size(2) != k.size(2),
        return_aux=AuxRequest(lse=True),
    )
    if score.sinks_N is not None:
        # A sink adds exp(sink) to the denominator exp(lse): the rest is left with this share.
        share = torch.sigmoid(aux.lse - score.sinks_N.to(aux.lse.dtype)[:, None])
        out = (out * share.unsqueeze(-1)).to(out.dtype)
    return out.transpose(1, 2)


@constant_in_graphs
def _has_triton() -> bool:
    return _find_triton()


@functools.cache
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: past torch's limit of recompilations it fails, where it would else go on with dense
    # scores
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def _softcap_mod(cap: float) -> Callable[..., Tensor]:
    def softcap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return softcap


def _block_mask(view: CacheView, spec: MaskSpec, rows: int) -> Any:
    """Return the BlockMask of this step and rule, which layers that read the same slots share."""
    if torch.compiler.is_compiling():  # a graph must not depend on what an earlier layer stored
        return block_mask(view, spec, rows)
    slots = (view.positions_BS, view.segments_BS)
    made, table = spec.tables.get("flex", ((None, None), None))
    if table is None or made[0] is not slots[0] or made[1] is not slots[1]:
        table = block_mask(view, spec, rows)
        spec.tables["flex"] = (slots, table)
    return table


def block_mask(view: CacheView, spec: MaskSpec, rows: int) -> Any:
    """Return the BlockMask of a view of `rows` rows from the corners of its blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    segmented = _segmented(view, spec)
    queries = _Corners.of(spec.positions_BT, spec.segments_BT if segmented else None)
    keys = _Corners.of(view.positions_BS, view.segments_BS if segmented else None)
    some, all_of_it = _meet(spec, queries.against(-1), keys.against(-2))
    partial_count, partial_indices = _listed(some & ~all_of_it)
    full_count, full_indices = _listed(all_of_it)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_indices,
        full_count,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(view, spec, rows),
        seq_lengths=(spec.positions_BT.size(1), view.positions_BS.size(1)),
    )


class _Corners(NamedTuple):
    """Extremes per block [B, blocks] of positions and segments, and whether all tokens are real."""

    low: Tensor
    high: Tensor
    first_segment: Tensor
    last_segment: Tensor
    complete: Tensor

    @classmethod
    def of(cls, positions: Tensor, segments: Tensor | None) -> _Corners:
        """Compute the corners from positions and segments [B, tokens].

        The last block is filled up with empty slots.
        """
        missing = -positions.size(1) % BLOCK
        blocks = F.pad(positions.long(), (0, missing), value=-1).unflatten(1, (-1, BLOCK))
        real = blocks >= 0
        low, high = blocks.masked_fill(~real, FAR).amin(-1), blocks.amax(-1)
        if segments is None:
            same = torch.zeros_like(low)
            return cls(low, high, same, same, real.all(-1))
        segments = F.pad(segments.long(), (0, missing)).unflatten(1, (-1, BLOCK))
        first, last = (
            segments.masked_fill(~real, FAR).amin(-1),
            segments.masked_fill(~real, -FAR).amax(-1),
        )
        return cls(low, high, first, last, real.all(-1))

    def against(self, dim: int) -> _Corners:
        """Return the corners with a dimension to broadcast along: -1 for queries, -2 for keys."""
        return _Corners(*(x.unsqueeze(dim) for x in self))


def _meet(spec: MaskSpec, q: _Corners, k: _Corners) -> tuple[Tensor, Tensor]:
    """Return two bool [B, query blocks, key blocks]: some pair may be visible; every pair is."""
    kind, size = spec.rule.kind, spec.rule.size
    some = (q.high >= 0) & (k.high >= 0)
    some = some & (q.first_segment <= k.last_segment) & (k.first_segment <= q.last_segment)
    every = q.complete & k.complete
    every = every & (q.first_segment == k.last_segment) & (k.first_segment == q.last_segment)
    if kind != "full":
        some, every = some & (k.low <= q.high), every & (k.high <= q.low)
    if kind == "window":
        some, every = some & (k.high > q.low - size), every & (k.low > q.high - size)
    elif kind == "chunk":
        q_low, q_high, k_low, k_high = (
            x.div(size, rounding_mode="floor") for x in (q.low, q.high, k.low, k.high)
        )
        some = some & (k_low <= q_high) & (q_low <= k_high)
        every = every & (k_low == q_high) & (q_low == k_high)
    return some, every


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the count of key blocks of each query block [B, 1, blocks], and their indices first.

    Both are int32, as torch expects.
    """
    order = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), order.unsqueeze(1)


def _mask_mod(view: CacheView, spec: MaskSpec, rows: int) -> Callable[..., Tensor]:
    """Return the rule as a function of a pair of indices, for the kernel's partial blocks."""
    rule, segmented = spec.rule, _segmented(view, spec)
    q_positions, k_positions = (
        x.expand(rows, -1).contiguous() for x in (spec.positions_BT, view.positions_BS)
    )
    q_segments, k_segments = spec.segments_BT, view.segments_BS

    def pair(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        ok = visible(rule, q_positions[b, t], k_positions[b, s])
        if segmented and q_segments is not None and k_segments is not None:
            ok = ok & (q_segments[b, t] == k_segments[b, s])
        return ok

    return pair


def _segmented(view: CacheView, spec: MaskSpec) -> bool:
    return spec.segments_BT is not None and view.segments_BS is not None

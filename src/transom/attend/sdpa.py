"""torch's scaled_dot_product_attention, sliced by document and by block.

A dense mask costs T x S memory, and the CPU kernel works through what it hides. Where the host knows how the
call's tokens lie (`Layout`), documents and chunks become plain causal calls and a window becomes blocks of
queries against the few keys they can reach; everything else goes block by block with the rule's own mask.
Both are exact, linear in memory and differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.args import LayerRule
from transom.attend.mask import Layout, MaskSpec, allowed
from transom.attend.reference import repeat_kv
from transom.attend.view import CacheView, Score

BLOCK = 256  # queries per masked call, tokens


def sdpa(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: Score) -> Tensor:
    """softmax(q k^T scale) v under the rule; q [B, T, N, H] in, the same shape out."""
    layout = spec.layout
    if view.only_new and layout is not None and not (layout.padded and spec.rule.kind == "full"):
        return _by_document(q_BTNH, view, spec.rule, layout, spec.positions_BT, score)
    return _by_block(q_BTNH, view, spec, score)


def _kernel(q_BTNH: Tensor, k: Tensor, v: Tensor, score: Score, *, mask: Tensor | None, causal: bool) -> Tensor:
    """One fused call; `mask` bool, broadcast to [B, N, T, S]."""
    repeats = q_BTNH.size(2) // k.size(2)
    if repeats > 1 and mask is not None and q_BTNH.is_cuda:
        # CUDA's masked kernel has no grouped heads: enable_gqa would fall back to dense scores.
        k, v = repeat_kv(k, v, repeats, dim=2)
        repeats = 1
    out = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=score.scale,
        enable_gqa=repeats > 1,
    )
    return out.transpose(1, 2)


def _by_document(
    q_BTNH: Tensor, view: CacheView, rule: LayerRule, layout: Layout, positions_BT: Tensor, score: Score
) -> Tensor:
    (k, v), _ = view.dense()
    q_flat, k_flat, v_flat = q_BTNH.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    pieces, at = [], 0
    sizes = _chunks(layout, rule.size) if rule.kind == "chunk" else layout.documents
    for size, run in groupby(sizes):
        count = sum(1 for _ in run)
        # Neighbours of equal length are a batch: a view of the flat tokens, not a copy.
        run_of = slice(at, at + count * size)
        q_run, k_run, v_run = (x[run_of].unflatten(0, (count, size)) for x in (q_flat, k_flat, v_flat))
        at += count * size
        if rule.kind == "window" and size > rule.size:
            out = _by_window(q_run, k_run, v_run, rule.size, score)
        else:
            out = _kernel(q_run, k_run, v_run, score, mask=None, causal=rule.kind != "full" and size > 1)
        pieces.append(out.flatten(0, 1))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    out = out.unflatten(0, q_BTNH.shape[:2])
    if layout.padded:  # padding stands behind the real tokens, so only its own rows need clearing
        out = out.masked_fill((positions_BT < 0)[..., None, None], 0.0)
    return out


def _chunks(layout: Layout, chunk: int) -> Iterator[int]:
    """Document lengths cut where absolute positions reach a multiple of `chunk`: each cut is then causal."""
    for size in layout.documents:
        first = min(size, chunk - layout.start % chunk)
        yield first
        for at in range(first, size, chunk):
            yield min(chunk, size - at)


def _by_window(q: Tensor, k: Tensor, v: Tensor, window: int, score: Score) -> Tensor:
    """Blocks of queries against the keys that a window of that size can reach."""
    length = q.size(1)
    block = min(max(BLOCK // 2, window // 2), 4 * BLOCK)
    pieces, masks = [], {}
    for start in range(0, length, block):
        stop, low = min(start + block, length), max(0, start - window + 1)
        shape = (stop - start, start - low)
        if shape not in masks:
            rows = torch.arange(start, stop, device=q.device)[:, None]
            cols = torch.arange(low, stop, device=q.device)[None]
            masks[shape] = (cols <= rows) & (cols > rows - window)
        mask = masks[shape]
        pieces.append(_kernel(q[:, start:stop], k[:, low:stop], v[:, low:stop], score, mask=mask, causal=False))
    return torch.cat(pieces, 1)


def _by_block(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: Score) -> Tensor:
    """Any positions at all: the rule's mask for one block of queries at a time."""
    (k, v), k_positions = view.dense()
    length, pieces = q_BTNH.size(1), []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low, high = _reach(spec.rule, view.new_at, start, stop, k.size(1))
        may = allowed(
            spec.rule,
            spec.positions_BT[:, start:stop],
            k_positions[:, low:high],
            None if spec.segments_BT is None else spec.segments_BT[:, start:stop],
            None if view.segments_BS is None else view.segments_BS[:, low:high],
        ).unsqueeze(1)
        # A row with no key at all would be NaN, in the gradient too: let it see everything, then clear it.
        lonely = ~may.any(-1, keepdim=True)
        keys, values = k[:, low:high], v[:, low:high]
        out = _kernel(q_BTNH[:, start:stop], keys, values, score, mask=may | lonely, causal=False)
        pieces.append(out.masked_fill(lonely.transpose(1, 2), 0.0))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _reach(rule: LayerRule, new_at: int | None, start: int, stop: int, slots: int) -> tuple[int, int]:
    """The slots [low, high) that queries [start, stop) of the call can possibly see."""
    if new_at is None or rule.kind == "full":
        return 0, slots
    within = rule.size > 0 and start - rule.size + 1 >= 0  # a chunk reaches back no further than a window
    return (new_at + start - rule.size + 1 if within else 0), new_at + stop

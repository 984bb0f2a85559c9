"""torch's scaled_dot_product_attention, sliced by document and by block.

A dense mask costs T x S memory, and the CPU kernel computes the scores that it hides. Where the
host knows the layout of a call (`Layout`), documents and chunks become plain causal calls, and a
window becomes blocks of queries with the keys that they can reach. Everything else is computed by
blocks of queries with the mask of the rule. Both ways are exact, linear in memory and
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.attention.mask import Layout, MaskSpec, allowed
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import RequestError
from transom.config.layer_args import LayerRule

# Queries per masked call, and queries up to which the CPU is faster if it reads shared keys once.
BLOCK, FEW = 256, 16


def why_not(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    """Return why sdpa can't compute this job, or None."""
    return None if score.plain else "computes neither soft caps nor sinks"


def sdpa(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Return softmax(q k^T scale) v under the mask rule; see `backends.Attend` for the arguments.

    Raises:
        RequestError: The scores have a soft cap or sinks.
    """
    reason = why_not(q_BTNH, view, spec, score)
    if reason is not None:  # nobody has asked `why_not` if the function is called by itself
        raise RequestError(f"attention backend: got sdpa, which {reason}; expected blockwise")
    if by_documents(view, spec):
        run = partial(_one_length, rule=spec.rule, score=score)
        return per_document(q_BTNH, view, spec, run)
    return _by_block(q_BTNH, view, spec, score)


def by_documents(view: CacheView, spec: MaskSpec) -> bool:
    """Return whether the host can cut a call into documents that attend to themselves only."""
    layout = spec.layout
    return view.only_new and layout is not None and not (layout.padded and spec.rule.kind == "full")


def _kernel(
    q_BTNH: Tensor, k: Tensor, v: Tensor, score: ScoreArgs, *, mask: Tensor | None, causal: bool
) -> Tensor:
    """Compute one fused call; `mask` is bool and broadcasts to [B, N, T, S]."""
    head_dim, v_dim = q_BTNH.size(-1), v.size(-1)
    shared = k.size(2) < q_BTNH.size(2)
    few = isinstance(q_BTNH.size(1), int) and q_BTNH.size(1) <= FEW
    if shared and mask is not None and (q_BTNH.is_cuda or few):
        return _by_group(q_BTNH, k, v, score, mask)
    if head_dim != v_dim:
        # Fused kernels need one head dim; padding with zeros does not change the result.
        dim = max(head_dim, v_dim)
        q_BTNH, k, v = (
            F.pad(x, (0, dim - x.size(-1))) if x.size(-1) < dim else x for x in (q_BTNH, k, v)
        )
    out = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=score.scale_for(head_dim),
        enable_gqa=shared,
    )
    return out.transpose(1, 2)[..., :v_dim]


def _by_group(q_BTNH: Tensor, k: Tensor, v: Tensor, score: ScoreArgs, mask: Tensor) -> Tensor:
    """Compute query heads that share keys as more queries of one head.

    The masked CUDA kernel has no grouped heads, and enable_gqa would compute dense scores. That of
    the CPU reads shared keys once per head, in bfloat16 at a tenth of the speed.
    """
    tokens, repeats = q_BTNH.size(1), q_BTNH.size(2) // k.size(2)
    rows = q_BTNH.unflatten(2, (-1, repeats)).transpose(2, 3).flatten(1, 2)
    wide = mask if tokens == 1 else mask.repeat_interleave(repeats, -2)
    out = _kernel(rows, k, v, score, mask=wide, causal=False)
    return out.unflatten(1, (tokens, repeats)).transpose(2, 3).flatten(2, 3)


def per_document(
    q_BTNH: Tensor, view: CacheView, spec: MaskSpec, run: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Compute attention document by document, or chunk by chunk where the rule has chunks.

    Args:
        q_BTNH: Queries of the call.
        view: Keys and values of the same tokens.
        spec: A mask rule with a layout.
        run: Attention of neighbouring documents of equal length: q, k, v [documents, tokens, ...]
            to [documents, tokens, N, v's H].
    """
    (k, v), _ = view.dense()
    assert spec.layout is not None, "checked by by_documents"
    q_flat, k_flat, v_flat = q_BTNH.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    pieces, at = [], 0
    for size, group in groupby(document_sizes(spec.layout, spec.rule)):
        count = sum(1 for _ in group)
        # Neighbours of equal length are a batch: a view of the flat tokens, not a copy.
        here = slice(at, at + count * size)
        q_run, k_run, v_run = (
            x[here].unflatten(0, (count, size)) for x in (q_flat, k_flat, v_flat)
        )
        at += count * size
        pieces.append(run(q_run, k_run, v_run).flatten(0, 1))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return clear_padding(out.unflatten(0, q_BTNH.shape[:2]), spec)


def clear_padding(out_BTNH: Tensor, spec: MaskSpec) -> Tensor:
    """Return the output with zeros for padding.

    Padding follows the real tokens, which are causal, so only its own rows are wrong.
    """
    if spec.layout is None or not spec.layout.padded:
        return out_BTNH
    return out_BTNH.masked_fill((spec.positions_BT < 0)[..., None, None], 0.0)


def _one_length(q: Tensor, k: Tensor, v: Tensor, rule: LayerRule, score: ScoreArgs) -> Tensor:
    """Compute attention of documents [count, size, ...], each of which begins a window or chunk."""
    size = q.size(1)
    if rule.kind == "window" and size > rule.size:
        return _by_window(q, k, v, rule.size, score)
    return _kernel(q, k, v, score, mask=None, causal=rule.kind != "full" and size > 1)


def document_sizes(layout: Layout, rule: LayerRule) -> Iterator[int]:
    """Yield the document lengths in tokens; for a rule with chunks, those of the chunks.

    Chunks begin at multiples of absolute positions. Each is causal by itself.
    """
    if rule.kind != "chunk":
        yield from layout.documents
        return
    for size in layout.documents:
        first = min(size, rule.size - layout.start % rule.size)
        yield first
        for at in range(first, size, rule.size):
            yield min(rule.size, size - at)


def _by_window(q: Tensor, k: Tensor, v: Tensor, window: int, score: ScoreArgs) -> Tensor:
    """Compute blocks of queries with the keys that the window can reach."""
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
        pieces.append(
            _kernel(
                q[:, start:stop], k[:, low:stop], v[:, low:stop], score, mask=mask, causal=False
            )
        )
    return torch.cat(pieces, 1)


def _by_block(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Compute any job with the mask of the rule, one block of queries at a time."""
    (k, v), k_positions = view.dense()
    length, segments, pieces = q_BTNH.size(1), (spec.segments_BT, view.segments_BS), []
    known = isinstance(length, int)  # an exported program is for any length, and has one block
    for start in range(0, length, BLOCK) if known else (0,):
        stop = min(start + BLOCK, length) if known else length
        low, high = reach(spec.rule, view.new_at, start, stop, k.size(1))
        block = (slice(start, stop), slice(low, high))
        may = allowed(spec.rule, spec.positions_BT, k_positions, *segments, *block).unsqueeze(1)
        # A fully masked row would be NaN, in the gradient too. It attends to all keys instead, and
        # its output is cleared.
        fully_masked = ~may.any(-1, keepdim=True)
        keys, values = k[:, low:high], v[:, low:high]
        mask = may | fully_masked
        out = _kernel(q_BTNH[:, start:stop], keys, values, score, mask=mask, causal=False)
        pieces.append(out.masked_fill(fully_masked.transpose(1, 2), 0.0))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def reach(
    rule: LayerRule, new_at: int | None, start: int, stop: int, slots: int
) -> tuple[int, int]:
    """Return the slots [low, high) that queries [start, stop) of the call can attend to at most."""
    if new_at is None or rule.kind == "full":
        return 0, slots
    # A chunk reaches back no further than a window of its size.
    within = rule.size > 0 and start - rule.size + 1 >= 0
    return (new_at + start - rule.size + 1 if within else 0), new_at + stop

"""Attention by blocks of queries and keys with a running softmax (FlashAttention, arXiv
2205.14135).

Plain tensor operations, so that it takes any positions, soft-capping, sinks and grouped heads on
any device, in float32 or better. Only q, k, v, the output and one logarithm per query and head are
kept for the backward pass, which makes the scores of every block again: memory is linear in length
in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from transom.attention.mask import MaskSpec, allowed
from transom.attention.sdpa import by_documents, per_document, reach
from transom.attention.view import CacheView, ScoreArgs
from transom.base.runtime import no_autocast
from transom.config.layer_args import LayerRule

QUERIES, KEYS = 128, 256  # tokens per block; fewer queries take more keys at a time


def why_not(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    """What keeps blockwise from this job: nothing does."""
    return None


def blockwise(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """softmax(cap(q k^T scale), sinks) v under the rule; q [B, T, N, H] in, [B, T, N, v's H]
    out.
    """
    scale, softcap, sinks_N = score.scale_for(q_BTNH.size(-1)), score.softcap, score.sinks_N
    if by_documents(view, spec):
        kind = (
            "causal" if spec.rule.kind == "chunk" else spec.rule.kind
        )  # a chunk is a document by then

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            places = torch.arange(q.size(1), device=q.device)[None]
            tiles = (places, places, None, None, kind, spec.rule.size, 0, True)
            return _call(q, k, v, sinks_N, *tiles, scale, softcap)

        return per_document(q_BTNH, view, spec, run)
    (k, v), k_positions = view.dense()
    segmented = spec.segments_BT is not None and view.segments_BS is not None
    segments = (spec.segments_BT, view.segments_BS) if segmented else (None, None)
    tiles = (
        spec.positions_BT,
        k_positions,
        *segments,
        spec.rule.kind,
        spec.rule.size,
        view.new_at,
        False,
    )
    return _call(q_BTNH, k, v, sinks_N, *tiles, scale, softcap)


def _call(*inputs: Any) -> Tensor:
    """The operator where a graph or a gradient needs one: its first use imports torch's compiler,
    for a second.
    """
    recorded = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs[:4]
    )
    out, _ = (_forward_op if recorded or torch.compiler.is_compiling() else _forward)(*inputs)
    return out


@dataclass(frozen=True)
class _Tiles:
    """Which blocks of keys a block of queries has to meet, and the mask inside each.

    `known` means that token i stands at position i, for queries and keys alike: then a block that
    is all visible is told from its corners and gets no mask.
    """

    rule: LayerRule
    q_positions_BT: Tensor
    k_positions_BS: Tensor
    q_segments_BT: Tensor | None = None
    k_segments_BS: Tensor | None = None
    new_at: int | None = None
    known: bool = False

    def met(self, start: int, stop: int, slots: int) -> Iterator[tuple[int, int, Tensor | None]]:
        """(low, high, hidden) of every block of keys that queries [start, stop) may see; hidden [B,
        1, 1, T, S].
        """
        low, high = reach(self.rule, self.new_at, start, stop, slots)
        keys = KEYS * QUERIES // min(QUERIES, stop - start)
        for at in range(low, high, keys):
            end = min(at + keys, high)
            if self.known and self._all_visible(start, stop, at, end):
                yield at, end, None
                continue
            may = allowed(
                self.rule,
                self.q_positions_BT[:, start:stop],
                self.k_positions_BS[:, at:end],
                None if self.q_segments_BT is None else self.q_segments_BT[:, start:stop],
                None if self.k_segments_BS is None else self.k_segments_BS[:, at:end],
            )
            if may.is_cpu:  # elsewhere the answer would have to be waited for
                if not may.any():
                    continue
                if may.all():
                    yield at, end, None
                    continue
            yield at, end, ~may[:, None, None]

    def _all_visible(self, start: int, stop: int, low: int, high: int) -> bool:
        if self.rule.kind == "full":
            return True
        return high - 1 <= start and (self.rule.kind != "window" or low > stop - 1 - self.rule.size)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks_N: Tensor | None,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    q_segments_BT: Tensor | None,
    k_segments_BS: Tensor | None,
    kind: str,
    size: int,
    new_at: int | None,
    known: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(output [B, T, N, v's H], logarithm of the sum of weights [B, K, N / K, T]) from q and k, v
    [B, S, K, H].

    Rows of one kv head's queries are laid side by side (R = N / K * T), so that keys are never
    repeated.
    """
    positions = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    tiles = _Tiles(LayerRule(cast(Any, kind), size), *positions, new_at, known)
    wide, length, kv_heads = _wide(q), q.size(1), k.size(2)
    out, lse = _new_outputs(q, k, v)
    group = lse.size(2)
    with no_autocast(q.device.type):
        keys, values = _heads_first(k, wide), _heads_first(v, wide)
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            rows = _rows(q, start, stop, kv_heads, wide) * scale
            top, total, acc = _empty_sums(rows, values, sinks_N, group)
            for low, high, hidden in tiles.met(start, stop, k.size(1)):
                scores = _scores(rows, keys[:, :, low:high], softcap)
                if softcap is not None:
                    scores.mul_(softcap)
                _hide(scores, hidden, float("-inf"), group)
                higher = torch.maximum(top, scores.amax(-1))
                base = higher.masked_fill(
                    higher == float("-inf"), 0.0
                )  # nothing seen so far: not inf - inf
                weights = scores.sub_(base.unsqueeze(-1)).exp_()
                fade = (top - base).exp_()
                total = total.mul_(fade).add_(weights.sum(-1))
                acc = acc.mul_(fade.unsqueeze(-1)).add_(weights @ values[:, :, low:high])
                top = higher
            nothing = total == 0
            _write(
                out, acc.div_(total.masked_fill(nothing, 1.0).unsqueeze(-1)), start, stop, kv_heads
            )
            # +inf: the backward pass then finds a weight of 0 for every key of a row that saw none
            logs = (top + total.log()).masked_fill_(nothing, float("inf"))
            lse[..., start:stop] = logs.unflatten(2, (group, -1))
    return out, lse


def _backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks_N: Tensor | None,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    q_segments_BT: Tensor | None,
    k_segments_BS: Tensor | None,
    kind: str,
    size: int,
    new_at: int | None,
    known: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sinks [N] (zeros where there are none)."""
    positions = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    tiles = _Tiles(LayerRule(cast(Any, kind), size), *positions, new_at, known)
    wide, kv_heads, group = _wide(q), k.size(2), lse.size(2)
    with no_autocast(q.device.type):
        keys, values = _heads_first(k, wide), _heads_first(v, wide)
        grad_q, grad_k, grad_v = (
            torch.empty_like(q),
            torch.zeros_like(keys),
            torch.zeros_like(values),
        )
        grad_sinks = lse.new_zeros(kv_heads, group)
        for start in range(0, q.size(1), QUERIES):
            stop = min(start + QUERIES, q.size(1))
            rows = _rows(q, start, stop, kv_heads, wide) * scale
            grad = _rows(grad_out, start, stop, kv_heads, wide)
            delta = (grad * _rows(out, start, stop, kv_heads, wide)).sum(-1)
            logs, grad_rows = lse[..., start:stop].flatten(2), torch.zeros_like(rows)
            for low, high, hidden in tiles.met(start, stop, k.size(1)):
                key, value = keys[:, :, low:high], values[:, :, low:high]
                scores, slope = _scores(rows, key, softcap), None
                if (
                    softcap is not None
                ):  # here scores are still tanh(s / cap), whose slope is 1 - tanh^2
                    slope = (scores * scores).neg_().add_(1.0)
                    scores.mul_(softcap)
                weights = _hide(scores.sub_(logs.unsqueeze(-1)).exp_(), hidden, 0.0, group)
                grad_v[:, :, low:high] += weights.mT @ grad
                back = (grad @ value.mT).sub_(delta.unsqueeze(-1)).mul_(weights)
                if slope is not None:
                    back.mul_(slope)
                grad_rows += back @ key
                grad_k[:, :, low:high] += back.mT @ rows
            _write(grad_q, grad_rows.mul_(scale), start, stop, kv_heads)
            if sinks_N is not None:
                took = (sinks_N.to(wide).view(kv_heads, group, 1) - lse[..., start:stop]).exp()
                grad_sinks -= (took * delta.unflatten(2, (group, -1))).sum((0, 3))
    grad_k, grad_v = (x.transpose(1, 2).to(like.dtype) for x, like in ((grad_k, k), (grad_v, v)))
    return grad_q, grad_k, grad_v, grad_sinks.flatten()


# As operators of their own, so that a compiled graph holds two calls and not every block of the
# square.
_forward_op = torch.library.custom_op("transom::blockwise", _forward, mutates_args=())
_backward_op = torch.library.custom_op("transom::blockwise_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _new_outputs(q, k, v)


@_backward_op.register_fake
def _backward_shapes(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grad_k, grad_v = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (k, v))
    return torch.empty_like(q), grad_k, grad_v, lse.new_empty(q.size(2))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.mark_non_differentiable(output[1])
    ctx.rest = inputs[8:]


def _pull_back(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_sinks = _backward_op(grad_out, out, lse, *tensors, *ctx.rest)
    sinks_N = tensors[3]
    return (
        grad_q,
        grad_k,
        grad_v,
        None if sinks_N is None else grad_sinks.to(sinks_N.dtype),
        *(None,) * 10,
    )


_forward_op.register_autograd(_pull_back, setup_context=_keep)


def _new_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.size(-1))
    return out, q.new_empty(q.size(0), k.size(2), q.size(2) // k.size(2), q.size(1), dtype=_wide(q))


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _heads_first(x_BSKH: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, K, S, H], contiguous: a block of it is then multiplied without a copy."""
    return x_BSKH.transpose(1, 2).to(dtype).contiguous()


def _rows(x_BTNH: Tensor, start: int, stop: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Tokens [start, stop) as [B, K, R, H]."""
    return (
        x_BTNH[:, start:stop]
        .unflatten(2, (kv_heads, -1))
        .permute(0, 2, 3, 1, 4)
        .flatten(2, 3)
        .to(dtype)
    )


def _write(x_BTNH: Tensor, rows_BKRH: Tensor, start: int, stop: int, kv_heads: int) -> None:
    """The inverse of `_rows`, into tokens [start, stop) of `x_BTNH`."""
    into = x_BTNH[:, start:stop].unflatten(2, (kv_heads, -1))
    into.copy_(rows_BKRH.unflatten(2, (-1, stop - start)).permute(0, 3, 1, 2, 4))


def _empty_sums(
    rows: Tensor, values: Tensor, sinks_N: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Highest score, sum of weights and weighted values before any key; a sink counts as seen
    already.
    """
    shape = rows.shape[:3]
    acc = rows.new_zeros(*shape, values.size(-1))
    if sinks_N is None:
        return rows.new_full(shape, float("-inf")), rows.new_zeros(shape), acc
    sinks = sinks_N.to(rows.dtype).view(1, rows.size(1), group, 1)
    top = sinks.expand(shape[0], -1, -1, shape[2] // group).flatten(2)
    return top, rows.new_ones(shape), acc


def _scores(rows: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """Scaled products, or tanh(s / cap) of them, still to be multiplied by the cap."""
    return rows @ key.mT if softcap is None else ((rows / softcap) @ key.mT).tanh_()


def _hide(x_BKRS: Tensor, hidden: Tensor | None, value: float, group: int) -> Tensor:
    """In place: `value` where a key is hidden from a query."""
    if hidden is not None:
        x_BKRS.unflatten(2, (group, -1)).masked_fill_(hidden, value)
    return x_BKRS

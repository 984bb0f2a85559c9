"""Attention by blocks of queries and keys with a running softmax.

The algorithm is that of FlashAttention (arXiv 2205.14135). The backend consists of plain tensor
operations, so it takes any positions, soft-capping, sinks and grouped heads on any device, in
float32 or better. Only q, k, v, the output and one logarithm per query and head are kept for the
backward pass, which recomputes the scores of every block. Memory is linear in the sequence length
in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from transom.attention.mask import MaskSpec, allowed
from transom.attention.sdpa import by_documents, per_document, reach
from transom.attention.view import CacheView, ScoreArgs
from transom.base.runtime import no_autocast
from transom.config.layer_args import LayerRule

QUERIES, KEYS = 128, 256  # tokens per block; fewer queries take more keys at a time


def blockwise(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Return softmax(cap(q k^T scale), sinks) v under the mask rule.

    See `backends.Attend` for the arguments.
    """
    scale, softcap, sinks_N = score.scale_for(q_BTNH.size(-1)), score.softcap, score.sinks_N
    if by_documents(view, spec):
        # Chunks have been cut into documents of their own, which are causal.
        kind = "causal" if spec.rule.kind == "chunk" else spec.rule.kind

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            positions_1T = torch.arange(q.size(1), device=q.device)[None]
            mask = (positions_1T, positions_1T, None, None, kind, spec.rule.size, 0, True)
            return _call(q, k, v, sinks_N, *mask, scale, softcap)

        return per_document(q_BTNH, view, spec, run)
    (k, v), k_positions = view.dense()
    segmented = spec.segments_BT is not None and view.segments_BS is not None
    segments = (spec.segments_BT, view.segments_BS) if segmented else (None, None)
    rule = (spec.rule.kind, spec.rule.size, view.new_at, False)
    mask = (spec.positions_BT, k_positions, *segments, *rule)
    return _call(q_BTNH, k, v, sinks_N, *mask, scale, softcap)


def _call(*inputs: Any) -> Tensor:
    """Call the operator if a graph or a gradient needs it, otherwise the plain function.

    The first use of the operator imports torch's compiler, which takes a second.
    """
    needs_grad = any(x is not None and x.requires_grad for x in inputs[:4])
    recorded = torch.is_grad_enabled() and needs_grad
    out, _ = (_forward_op if recorded or torch.compiler.is_compiling() else _forward)(*inputs)
    return out


@dataclass(frozen=True)
class _Job:
    """The inputs of both operators; the fields and their types are the operators' schema.

    `known` means that token i has position i, for queries and keys alike. Whether all pairs of a
    block are visible then follows from its corners, and the block needs no mask.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks_N: Tensor | None
    q_positions_BT: Tensor
    k_positions_BS: Tensor
    q_segments_BT: Tensor | None
    k_segments_BS: Tensor | None
    kind: str
    size: int
    new_at: int | None
    known: bool
    scale: float
    softcap: float | None

    @property
    def rule(self) -> LayerRule:
        """The mask rule that `kind` and `size` describe."""
        return LayerRule(cast(Any, self.kind), self.size)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of all sums: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def query_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of every block of queries."""
        for start in range(0, self.q.size(1), QUERIES):
            yield start, min(start + QUERIES, self.q.size(1))

    def key_blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor | None]]:
        """Yield (low, high, hidden) of every block of keys that a block of queries may attend to.

        `start` and `stop` are those of the queries. `hidden` is bool [B, 1, 1, T, S], or None where
        every pair is visible.
        """
        low, high = reach(self.rule, self.new_at, start, stop, self.k.size(1))
        keys = KEYS * QUERIES // min(QUERIES, stop - start)
        positions = (self.q_positions_BT, self.k_positions_BS)
        tables = (*positions, self.q_segments_BT, self.k_segments_BS)
        for at in range(low, high, keys):
            end = min(at + keys, high)
            if self.known and self._all_visible(start, stop, at, end):
                yield at, end, None
                continue
            may = allowed(self.rule, *tables, slice(start, stop), slice(at, end))
            # On other devices than the CPU the host would wait for the answers.
            if may.is_cpu and not may.any():
                continue
            yield at, end, None if may.is_cpu and may.all() else ~may[:, None, None]

    def _all_visible(self, start: int, stop: int, low: int, high: int) -> bool:
        if self.kind == "full":
            return True
        return high - 1 <= start and (self.kind != "window" or low > stop - 1 - self.size)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Compute attention from the fields of a `_Job`.

    Queries of the same kv head are side by side (R = N / K * T rows), so that keys are never
    repeated.

    Returns:
        The output [B, T, N, v's H] and the logarithm of the sum of weights [B, K, N / K, T].
    """
    job = _Job(*inputs)
    wide, kv_heads = job.wide, job.k.size(2)
    out, lse = _new_outputs(job.q, job.k, job.v)
    group = lse.size(2)
    with no_autocast(job.q.device.type):
        keys, values = _heads_first(job.k, wide), _heads_first(job.v, wide)
        for start, stop in job.query_blocks():
            rows = _rows(job.q, start, stop, kv_heads, wide) * job.scale
            top, total, acc = _empty_sums(rows, values, job.sinks_N, group)
            for low, high, hidden in job.key_blocks(start, stop):
                scores = _scores(rows, keys[:, :, low:high], job.softcap)
                if job.softcap is not None:
                    scores.mul_(job.softcap)
                _hide(scores, hidden, float("-inf"), group)
                higher = torch.maximum(top, scores.amax(-1))
                # Where no key has been visible so far, 0 avoids inf - inf.
                base = higher.masked_fill(higher == float("-inf"), 0.0)
                weights = scores.sub_(base.unsqueeze(-1)).exp_()
                fade = (top - base).exp_()
                total = total.mul_(fade).add_(weights.sum(-1))
                acc = acc.mul_(fade.unsqueeze(-1)).add_(weights @ values[:, :, low:high])
                top = higher
            fully_masked = total == 0
            output = acc.div_(total.masked_fill(fully_masked, 1.0).unsqueeze(-1))
            _write(out, output, start, stop, kv_heads)
            # With +inf the backward pass gives every key of a fully masked row a weight of 0.
            logs = (top + total.log()).masked_fill_(fully_masked, float("inf"))
            lse[..., start:stop] = logs.unflatten(2, (group, -1))
    return out, lse


def _backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of the sinks [N] (zeros where there are none)."""
    job = _Job(*inputs)
    wide, kv_heads, group = job.wide, job.k.size(2), lse.size(2)
    with no_autocast(job.q.device.type):
        keys, values = _heads_first(job.k, wide), _heads_first(job.v, wide)
        grad_q = torch.empty_like(job.q)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        grad_sinks = lse.new_zeros(kv_heads, group)
        for start, stop in job.query_blocks():
            rows = _rows(job.q, start, stop, kv_heads, wide) * job.scale
            grad = _rows(grad_out, start, stop, kv_heads, wide)
            delta = (grad * _rows(out, start, stop, kv_heads, wide)).sum(-1)
            logs, grad_rows = lse[..., start:stop].flatten(2), torch.zeros_like(rows)
            for low, high, hidden in job.key_blocks(start, stop):
                key, value = keys[:, :, low:high], values[:, :, low:high]
                scores, slope = _scores(rows, key, job.softcap), None
                if job.softcap is not None:  # scores are tanh(s / cap), with slope 1 - tanh^2
                    slope = (scores * scores).neg_().add_(1.0)
                    scores.mul_(job.softcap)
                weights = _hide(scores.sub_(logs.unsqueeze(-1)).exp_(), hidden, 0.0, group)
                grad_v[:, :, low:high] += weights.mT @ grad
                grad_scores = (grad @ value.mT).sub_(delta.unsqueeze(-1)).mul_(weights)
                if slope is not None:
                    grad_scores.mul_(slope)
                grad_rows += grad_scores @ key
                grad_k[:, :, low:high] += grad_scores.mT @ rows
            _write(grad_q, grad_rows.mul_(job.scale), start, stop, kv_heads)
            if job.sinks_N is not None:
                sinks = job.sinks_N.to(wide).view(kv_heads, group, 1)
                share = (sinks - lse[..., start:stop]).exp()
                grad_sinks -= (share * delta.unflatten(2, (group, -1))).sum((0, 3))
    grad_k = grad_k.transpose(1, 2).to(job.k.dtype)
    return grad_q, grad_k, grad_v.transpose(1, 2).to(job.v.dtype), grad_sinks.flatten()


# Operators of their own, so that a compiled graph has two calls instead of every pair of blocks.
_INPUTS = ", ".join(f"{field.type} {field.name}" for field in fields(_Job))
_INPUTS = _INPUTS.replace(" | None", "?").replace("int", "SymInt")  # torch's words for types
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
_forward_op = torch.library.custom_op(
    "transom::blockwise", _forward, mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "transom::blockwise_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor out, Tensor lse, {_INPUTS}) -> {_GRADIENTS}",
)


@_forward_op.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _new_outputs(q, k, v)


@_backward_op.register_fake
def _backward_shapes(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grad_k, grad_v = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (k, v))
    return torch.empty_like(q), grad_k, grad_v, lse.new_empty(q.size(2))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.mark_non_differentiable(output[1])
    ctx.rest = inputs[8:]


def _call_backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_sinks = _backward_op(grad_out, out, lse, *tensors, *ctx.rest)
    sinks_N = tensors[3]
    grad_sinks = None if sinks_N is None else grad_sinks.to(sinks_N.dtype)
    return grad_q, grad_k, grad_v, grad_sinks, *(None,) * 10


_forward_op.register_autograd(_call_backward, setup_context=_setup_context)


def _new_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.size(-1))
    shape = (q.size(0), k.size(2), q.size(2) // k.size(2), q.size(1))
    return out, q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _heads_first(x_BSKH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [B, K, S, H], contiguous, so that a block of it is multiplied without a copy."""
    return x_BSKH.transpose(1, 2).to(dtype).contiguous()


def _rows(x_BTNH: Tensor, start: int, stop: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Return tokens [start, stop) as [B, K, R, H]."""
    x = x_BTNH[:, start:stop].unflatten(2, (kv_heads, -1))
    return x.permute(0, 2, 3, 1, 4).flatten(2, 3).to(dtype)


def _write(x_BTNH: Tensor, rows_BKRH: Tensor, start: int, stop: int, kv_heads: int) -> None:
    """Write rows into tokens [start, stop) of `x_BTNH`: the inverse of `_rows`."""
    into = x_BTNH[:, start:stop].unflatten(2, (kv_heads, -1))
    into.copy_(rows_BKRH.unflatten(2, (-1, stop - start)).permute(0, 3, 1, 2, 4))


def _empty_sums(
    rows: Tensor, values: Tensor, sinks_N: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest score, the sum of weights and the weighted values before any key.

    Sinks are counted already.
    """
    shape = rows.shape[:3]
    acc = rows.new_zeros(*shape, values.size(-1))
    if sinks_N is None:
        return rows.new_full(shape, float("-inf")), rows.new_zeros(shape), acc
    sinks = sinks_N.to(rows.dtype).view(1, rows.size(1), group, 1)
    top = sinks.expand(shape[0], -1, -1, shape[2] // group).flatten(2)
    return top, rows.new_ones(shape), acc


def _scores(rows: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """Return the scaled products; with a soft cap tanh(product / cap), without the factor cap."""
    return rows @ key.mT if softcap is None else ((rows / softcap) @ key.mT).tanh_()


def _hide(x_BKRS: Tensor, hidden: Tensor | None, value: float, group: int) -> Tensor:
    """Write `value` in place where a key is hidden from a query, and return the tensor."""
    if hidden is not None:
        x_BKRS.unflatten(2, (group, -1)).masked_fill_(hidden, value)
    return x_BKRS

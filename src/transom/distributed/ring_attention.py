"""Ring attention: keys and values of other ranks arrive while a rank computes with its own.

The results for the keys of each rank are merged by their log-sum-exp (Liu et al. 2023, arXiv
2310.01889). Both loops over the ranks are torch's. They expect the rows as `cut_rows` cuts them,
and compute no scores of pieces that the causal rule hides.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import notice

MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
# What the backward operator of CUDA takes besides tensors of both devices, in the order in which
# the forward operator returns it. There is no dropout, so the random state is not used.
CUDA_ONLY = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset")


@torch.compiler.disable
def ring(
    q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, group: dist.ProcessGroup
) -> Tensor | None:
    """Return the attention of this rank's queries to the keys of all ranks; see `Attend`.

    All ranks of the group call it. Rows of padding have no meaning, but they are finite. Partial
    results are merged in float32, also those of float64.

    Returns:
        None, after a notice, if `why_not` has a reason.
    """
    reason = why_not(q_BTNH, view, spec, score)
    if reason is not None:
        notice(f"parallel.context_ring: keys are gathered, since ring attention {reason}")
        return None
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, *view.states))
    out: Tensor = _Ring.apply(q, k, v, group, score.scale_for(q.size(-1)))
    return out.transpose(1, 2)


def why_not(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    """Return why the ring can't compute the attention of rows cut by `cut_rows`, or None.

    The host decides by what all ranks of a row know, so that they decide alike.
    """
    if spec.rule.kind != "causal" or not score.plain:
        return "has neither windows nor chunks, soft caps or sinks"
    if view.segments_BS is not None:
        return "needs rows of one document"
    if torch_ring() is None:
        return "needs functions that this release of torch lacks"
    cuda: Any = torch.backends.cuda
    states = (x.transpose(1, 2) for x in (q_BTNH, *view.states))
    if q_BTNH.is_cuda and not cuda.can_use_flash_attention(
        cuda.SDPAParams(*states, None, 0.0, True, True)
    ):
        return f"needs flash attention, which this GPU lacks for {q_BTNH.dtype} and these heads"
    return None


@functools.cache
def torch_ring() -> Any:
    """Return torch's private module with the loops, or None without it.

    The loops are the same in torch 2.11 to 2.13.
    """
    with contextlib.suppress(ImportError):
        found: Any = importlib.import_module(MODULE)
        # Without balance, the loops expect one piece of a row per rank.
        balanced = found._cp_options.enable_load_balance
        return found if balanced and hasattr(found, "_templated_ring_attention_backward") else None
    return None


class _Ring(torch.autograd.Function):
    """Both passes, as one function of queries, keys and values [B, heads, T, H]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, scale: float
    ) -> Tensor:
        options = {"dropout_p": 0.0, "scale": scale}
        out, lse, *rest = torch_ring()._templated_ring_attention(
            group, 2, _kernel(q), q, k, v, is_causal=True, **options
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.options = group, options | dict(zip(CUDA_ONLY, rest, strict=False))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kernel, given = _kernel(grads[0], "_backward"), (*grads, "grad_out", *ctx.saved_tensors)
        found = torch_ring()._templated_ring_attention_backward(
            ctx.group, 2, kernel, *given, is_causal=True, **ctx.options
        )
        return *found[:3], None, None


def _kernel(one: Tensor, direction: str = "") -> Any:
    """Return torch's flash attention for a device; its `direction` is "" or "_backward"."""
    where = "" if one.is_cuda else "_for_cpu"
    return getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{where}{direction}")

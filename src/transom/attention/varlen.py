"""torch's variable-length flash attention: documents, windows and chunks in one CUDA call.

It needs no mask (torch.nn.attention.varlen).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.attention.graphs import constant_in_graphs
from transom.attention.mask import MaskSpec
from transom.attention.reference import repeat_kv
from transom.attention.sdpa import by_documents, clear_padding, document_sizes
from transom.attention.view import CacheView, ScoreArgs
from transom.base.copies import to_device


def why_not(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    """Return why varlen can't compute this job, or None."""
    if not score.plain:
        return "computes neither soft caps nor sinks"
    if q_BTNH.device.type != "cuda" or q_BTNH.dtype not in (torch.bfloat16, torch.float16):
        found = f"{q_BTNH.dtype} on {q_BTNH.device.type}"
        return f"takes bfloat16 and float16 on cuda, not {found}"
    kinds = {q_BTNH.dtype, *(state.dtype for state in view.dense()[0])}
    if len(kinds) > 1:
        found = ", ".join(sorted(map(str, kinds)))
        return f"takes queries, keys and values of one dtype, not {found}"
    if not by_documents(view, spec):
        return "needs document lengths and a call that reads no cache"
    head_dim, v_dim = q_BTNH.size(-1), view.dense()[0][1].size(-1)
    if head_dim % 8 or head_dim > 256 or v_dim > head_dim:
        return f"takes head dims of 8 to 256 in steps of 8, not {head_dim} with values of {v_dim}"
    if not {"scale", "window_size"} <= set(_parameters()):
        return "needs a varlen_attn with a scale and a window_size, which this torch lacks"
    return None


def varlen(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Return softmax(q k^T scale) v under the mask rule.

    See `backends.Attend` for the arguments.
    """
    from torch.nn.attention.varlen import varlen_attn

    (k, v), _ = view.dense()
    head_dim, v_dim, repeats = q_BTNH.size(-1), v.size(-1), q_BTNH.size(2) // k.size(2)
    options: dict[str, Any] = {"enable_gqa": repeats > 1} if "enable_gqa" in _parameters() else {}
    if repeats > 1 and not options:
        k, v = repeat_kv(k, v, repeats, dim=2)
    if v_dim < head_dim:  # the kernel has one head dim, and zeros change nothing
        v = F.pad(v, (0, head_dim - v_dim))
    ends, longest = _document_ends(spec, q_BTNH.device)
    out = varlen_attn(
        q_BTNH.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        ends,
        ends,
        longest,
        longest,
        scale=score.scale_for(head_dim),
        window_size=_window(spec),
        **options,
    )
    assert isinstance(out, Tensor), "nothing else was asked for"
    return clear_padding(out.unflatten(0, q_BTNH.shape[:2])[..., :v_dim], spec)


def _window(spec: MaskSpec) -> tuple[int, int]:
    """Return how many keys to the (left, right) of its own a query sees; -1 is no limit.

    Chunks have been cut into documents of their own, which are causal.
    """
    if spec.rule.kind == "full":
        return (-1, -1)
    # Our sizes count the query's own key; those of the kernel do not.
    return (spec.rule.size - 1 if spec.rule.kind == "window" else -1, 0)


def _document_ends(spec: MaskSpec, device: torch.device) -> tuple[Tensor, int]:
    """Return where documents end in the flattened tokens, and the length of the longest.

    The ends are int32 [documents + 1] and begin with 0. The first layer of a step computes both for
    all layers of the same rule.
    """
    # A graph must not depend on what an earlier layer stored.
    tables = {} if torch.compiler.is_compiling() else spec.tables
    if "varlen" not in tables:
        assert spec.layout is not None, "checked by by_documents"
        sizes = list(document_sizes(spec.layout, spec.rule))
        ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        tables["varlen"] = (to_device(ends, device), max(sizes))
    return tables["varlen"]


@constant_in_graphs
def _parameters() -> tuple[str, ...]:
    """Return the parameters of varlen_attn, which differ between releases; () without it."""
    return _read_parameters()


@functools.cache
def _read_parameters() -> tuple[str, ...]:
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
        return tuple(inspect.signature(module.varlen_attn).parameters)
    except (ImportError, AttributeError):
        return ()

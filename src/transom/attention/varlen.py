"""torch's variable-length flash attention: packed documents, windows and chunks in one CUDA call
without a mask.
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


def why_not(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    """What keeps varlen from this job, or None."""
    if not score.plain:
        return "flash attention has neither soft-capping nor sinks here"
    if q_BTNH.device.type != "cuda" or q_BTNH.dtype not in (torch.bfloat16, torch.float16):
        return (
            f"its kernel takes bfloat16 and float16 on cuda, not {q_BTNH.dtype} on "
            f"{q_BTNH.device.type}"
        )
    kinds = {q_BTNH.dtype, *(state.dtype for state in view.dense()[0])}
    if len(kinds) > 1:
        return (
            f"its kernel takes queries, keys and values of one dtype, not "
            f"{', '.join(sorted(map(str, kinds)))}"
        )
    if not by_documents(view, spec):
        return "it needs the document lengths of a call that reads no cache"
    head_dim, v_dim = q_BTNH.size(-1), view.dense()[0][1].size(-1)
    if head_dim % 8 or head_dim > 256 or v_dim > head_dim:
        return (
            f"its kernel takes head dims in multiples of 8 up to 256, not {head_dim} with values "
            f"of {v_dim}"
        )
    if not {"scale", "window_size"} <= set(_parameters()):
        return "this torch has no varlen_attn with a scale and a window_size"
    return None


def varlen(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """softmax(q k^T scale) v inside documents under the rule; q [B, T, N, H] in, [B, T, N, v's H]
    out.
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
    """Keys to the (left, right) of a query's own, -1 without end; chunks are causal documents by
    then.
    """
    if spec.rule.kind == "full":
        return (-1, -1)
    # Our sizes count the query's own key, the kernel's do not.
    return (spec.rule.size - 1 if spec.rule.kind == "window" else -1, 0)


def _document_ends(spec: MaskSpec, device: torch.device) -> tuple[Tensor, int]:
    """Where documents end in the flattened tokens, int32 from 0, and the longest; made once per
    step and rule.
    """
    compiling = (
        torch.compiler.is_compiling()
    )  # a graph may not depend on what an earlier layer left behind
    made = None if compiling else spec.tables.get("varlen")
    if made is None:
        assert spec.layout is not None, "by_documents said so"
        sizes = list(document_sizes(spec.layout, spec.rule))
        ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
        made = (ends, max(sizes))
        if not compiling:
            spec.tables["varlen"] = made
    return made


@constant_in_graphs
def _parameters() -> tuple[str, ...]:
    """Parameters of this torch's varlen_attn, which differ between releases; none where it is
    missing.
    """
    return _read_parameters()


@functools.cache
def _read_parameters() -> tuple[str, ...]:
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
        return tuple(inspect.signature(module.varlen_attn).parameters)
    except (ImportError, AttributeError):
        return ()

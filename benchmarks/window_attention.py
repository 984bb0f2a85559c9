"""A window of 512 over 8,192 tokens: sliced SDPA against SDPA with a dense mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved
from transom.attention.mask import Layout, MaskSpec, allowed
from transom.attention.sdpa import sdpa
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule

HEADS, KV_HEADS, HEAD_DIM, WINDOW, LENGTH = 12, 4, 64, 512, 8192


def _tensors(length: int, device: torch.device, grad: bool) -> list[torch.Tensor]:
    shapes = (
        (1, length, HEADS, HEAD_DIM),
        (1, length, KV_HEADS, HEAD_DIM),
        (1, length, KV_HEADS, HEAD_DIM),
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=grad) for shape in shapes]


def _sliced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    length = q.size(1)
    positions = torch.arange(length, device=q.device)[None]
    spec = MaskSpec(LayerRule("window", WINDOW), positions, layout=Layout((length,)))
    return sdpa(q, CacheView((k, v), positions, new_at=0), spec, ScoreArgs())


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return a row of the forward, and one of forward and backward."""
    positions = torch.arange(LENGTH, device=device)[None]
    mask = allowed(LayerRule("window", WINDOW), positions, positions)[:, None]

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    out = []
    for grad in (False, True):
        tensors = _tensors(LENGTH, device, grad)

        def run(attention: Any, tensors: list[torch.Tensor] = tensors, grad: bool = grad) -> None:
            result = attention(*tensors)
            if grad:
                result.sum().backward()

        cases = {"ours": lambda run=run: run(_sliced), "dense": lambda run=run: run(dense)}
        seconds = interleaved(cases, device, rounds=3)
        out.append(
            {
                "benchmark": "window attention",
                "case": f"window {WINDOW}, {LENGTH} tokens, "
                f"{'forward + backward' if grad else 'forward'}",
                "peer": "SDPA with a dense mask",
                "seconds": round(seconds["ours"], 4),
                "peer_seconds": round(seconds["dense"], 4),
                "ratio": round(seconds["dense"] / seconds["ours"], 2),
                "target": 5.0,
            }
        )
    return out

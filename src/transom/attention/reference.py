"""Attention from the rule alone: dense, slow, obvious, and right in float64. Every backend is held
to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.attention.mask import MaskSpec, allowed
from transom.attention.view import CacheView, ScoreArgs


def repeat_kv(keys: Tensor, values: Tensor, repeats: int, dim: int) -> tuple[Tensor, Tensor]:
    """Each kv head `repeats` times along `dim`, so that query head h reads kv head h // repeats."""
    return keys.repeat_interleave(repeats, dim), values.repeat_interleave(repeats, dim)


def scores_BNTS(q_BTNH: Tensor, k_BSNH: Tensor, score: ScoreArgs) -> Tensor:
    """Scaled, soft-capped products of queries and keys, in float32 or better."""
    wide = torch.promote_types(q_BTNH.dtype, torch.float32)
    scale = score.scale_for(q_BTNH.size(-1))
    scores = torch.einsum("btnh,bsnh->bnts", q_BTNH.to(wide), k_BSNH.to(wide)) * scale
    return scores if score.softcap is None else score.softcap * torch.tanh(scores / score.softcap)


def weights_BNTS(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Attention probabilities [B, N, T, S]; a query that may see nothing has all zeros.

    With sinks a row sums to less than one: what the sink took is missing.
    """
    (k, v), k_positions = view.dense()
    k, _ = repeat_kv(k, v, q_BTNH.size(2) // k.size(2), dim=2)
    may = allowed(
        spec.rule, spec.positions_BT, k_positions, spec.segments_BT, view.segments_BS
    ).unsqueeze(1)
    fully_masked = ~may.any(-1, keepdim=True)
    scores = scores_BNTS(q_BTNH, k, score).masked_fill(~(may | fully_masked), float("-inf"))
    if score.sinks_N is not None:
        sinks = score.sinks_N.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    return scores.softmax(-1)[..., : k.size(1)].masked_fill(fully_masked, 0.0)


def reference(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """softmax(q k^T scale) v under the rule, as one dense product; returns [B, T, N, v's H] in q's
    dtype.
    """
    (k, v), _ = view.dense()
    _, v = repeat_kv(k, v, q_BTNH.size(2) // k.size(2), dim=2)
    weights = weights_BNTS(q_BTNH, view, spec, score)
    return torch.einsum("bnts,bsnh->btnh", weights, v.to(weights.dtype)).to(q_BTNH.dtype)

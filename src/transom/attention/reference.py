"""Attention from the mask rule alone: dense, slow and exact in float64.

Every backend is compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.attention.mask import MaskSpec, allowed
from transom.attention.view import CacheView, ScoreArgs


def repeat_kv(keys: Tensor, values: Tensor, repeats: int, dim: int) -> tuple[Tensor, Tensor]:
    """Repeat each key/value head `repeats` times along `dim`.

    Query head h then reads key/value head h // repeats. The name is that of Meta's reference code
    (llama3/model.py).
    """
    return keys.repeat_interleave(repeats, dim), values.repeat_interleave(repeats, dim)


def scores_BNTS(q_BTNH: Tensor, k_BSNH: Tensor, score: ScoreArgs) -> Tensor:
    """Return the scaled, soft-capped products of queries and keys in float32 or better."""
    wide = torch.promote_types(q_BTNH.dtype, torch.float32)
    scale = score.scale_for(q_BTNH.size(-1))
    scores = torch.einsum("btnh,bsnh->bnts", q_BTNH.to(wide), k_BSNH.to(wide)) * scale
    return scores if score.softcap is None else score.softcap * torch.tanh(scores / score.softcap)


def weights_BNTS(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Return the attention probabilities [B, N, T, S].

    The rows of fully masked queries, which may attend to no key, are zero. With sinks, rows sum to
    less than one.
    """
    (k, v), k_positions = view.dense()
    k, _ = repeat_kv(k, v, q_BTNH.size(2) // k.size(2), dim=2)
    segments = (spec.segments_BT, view.segments_BS)
    may = allowed(spec.rule, spec.positions_BT, k_positions, *segments).unsqueeze(1)
    fully_masked = ~may.any(-1, keepdim=True)
    scores = scores_BNTS(q_BTNH, k, score).masked_fill(~(may | fully_masked), float("-inf"))
    if score.sinks_N is not None:
        sinks = score.sinks_N.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    return scores.softmax(-1)[..., : k.size(1)].masked_fill(fully_masked, 0.0)


def reference(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Return softmax(q k^T scale) v under the mask rule as one dense product.

    See `backends.Attend` for the arguments.
    """
    (k, v), _ = view.dense()
    _, v = repeat_kv(k, v, q_BTNH.size(2) // k.size(2), dim=2)
    weights = weights_BNTS(q_BTNH, view, spec, score)
    return torch.einsum("bnts,bsnh->btnh", weights, v.to(weights.dtype)).to(q_BTNH.dtype)

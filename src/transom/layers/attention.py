"""Multi-head, grouped-query and multi-query attention; one class, told by its `LayerArgs`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from transom.args import LayerArgs, TemperatureArgs
from transom.attend.view import CacheView, Score
from transom.layers.linear import Linear
from transom.layers.norm import rmsnorm
from transom.layers.rope import rotate
from transom.layers.step import Step


class LayerCacheLike(Protocol):
    """What attention needs of a cache: hand over this call's states, get back all that may be seen."""

    def update(self, states: tuple[Tensor, ...], positions_BT: Tensor, /) -> CacheView: ...


def temperature_scale(positions_BT: Tensor, args: TemperatureArgs) -> Tensor:
    """Llama 4's query scale [B, T, 1, 1], float32; padding gets 1 since its position counts as 0."""
    steps = torch.floor((positions_BT.clamp(min=0).float() + 1.0) / args.floor_scale)
    return (1.0 + args.attn_scale * torch.log1p(steps))[..., None, None]


class Attention(nn.Module):
    """Projections, positions and norms around one `attend` call."""

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        self.layer = layer
        self.wq = Linear(layer.dim, layer.n_heads * layer.head_dim)
        self.wk = Linear(layer.dim, layer.n_kv_heads * layer.head_dim)
        self.wv = Linear(layer.dim, layer.n_kv_heads * layer.head_dim)
        self.wo = Linear(layer.n_heads * layer.head_dim, layer.dim)

    def forward(self, x_BTD: Tensor, step: Step, cache: LayerCacheLike | None = None) -> Tensor:
        layer = self.layer
        # -1, not the head count: under tensor parallelism a rank holds a share of the heads.
        q, k, v = (w(x_BTD).unflatten(-1, (-1, layer.head_dim)) for w in (self.wq, self.wk, self.wv))
        if layer.rope is not None:
            table = step.rope[layer.rope]
            q, k = rotate(q, table, layer.rope.layout), rotate(k, table, layer.rope.layout)
        if layer.use_qk_norm:  # after rotation, without weights, as Llama 4 does
            q, k = rmsnorm(q, layer.norm_eps), rmsnorm(k, layer.norm_eps)
        if layer.temperature is not None:
            q = (q * step.temperature[layer.temperature]).to(q.dtype)
        spec = step.masks[layer.rule]
        if cache is None:
            # Positions that nobody described may stand in any order: then no slot can be ruled out by its place.
            in_order = 0 if spec.layout is not None else None
            view = CacheView((k, v), step.positions_BT, spec.segments_BT, new_at=in_order)
        else:
            view = cache.update((k, v), step.positions_BT)
        out_BTNH = step.attend(q, view, spec, Score())
        return self.wo(out_BTNH.flatten(-2))

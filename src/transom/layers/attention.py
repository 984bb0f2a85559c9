"""Self-attention (multi-head, grouped-query, multi-query) and attention to a context.

`LayerArgs` says which. Grouped-query attention is that of Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerArgs, TemperatureArgs
from transom.layers.linear import Linear, products
from transom.layers.norm import make_norm, rmsnorm
from transom.layers.rope import rotate
from transom.layers.step import LayerCacheLike, Step


def temperature_scale(positions_BT: Tensor, args: TemperatureArgs) -> Tensor:
    """Return Llama 4's query scale float32 [B, T, 1, 1] of int64 positions [B, T].

    The scale grows with the logarithm of the position (meta-llama/llama-models, llama4/model.py).
    Padding gets 1.
    """
    steps = torch.floor((positions_BT.clamp(min=0).float() + 1.0) / args.floor_scale)
    return (1.0 + args.attn_scale * torch.log1p(steps))[..., None, None]


def new_view(
    states: tuple[Tensor, ...], step: Step, layer: LayerArgs, cache: LayerCacheLike | None
) -> CacheView:
    """Return the keys and values that the queries of this call may attend to.

    Args:
        states: (keys, values) of the call, each [B, T, K, H].
        step: What the layers of this call share.
        layer: Arguments of the layer.
        cache: The cache of the layer, in which the states are stored. Without one, queries attend
            to the states of the call only.
    """
    if cache is not None:
        return cache.update(states)
    spec = step.masks[layer.rule]
    # Without a layout, positions may be in any order, and no slot can be skipped by its index.
    in_order = 0 if spec.layout is not None else None
    return CacheView(states, step.positions_BT, spec.segments_BT, new_at=in_order)


class Attention(nn.Module):
    """Self-attention: projections, optional norms and rotation, one `attend` call, a projection."""

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        self.layer = layer
        q_dim, kv_dim = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
        self.wq = Linear(layer.dim, q_dim, layer.qkv_bias)
        self.wk = Linear(layer.dim, kv_dim, layer.qkv_bias)
        self.wv = Linear(layer.dim, kv_dim, layer.qkv_bias)
        self.wo = Linear(q_dim, layer.dim, layer.out_bias)
        self.q_norm = self.k_norm = None
        if layer.qk_norm != "none":
            per_head = layer.qk_norm == "head"
            self.q_norm = make_norm(
                layer.norm, layer.head_dim if per_head else q_dim, layer.norm_eps
            )
            self.k_norm = make_norm(
                layer.norm, layer.head_dim if per_head else kv_dim, layer.norm_eps
            )
        self.sinks = nn.Parameter(torch.zeros(layer.n_heads)) if layer.attn_sinks else None

    def forward(self, x_BTD: Tensor, step: Step, cache: LayerCacheLike | None = None) -> Tensor:
        """Compute self-attention of one call.

        Args:
            x_BTD: Hidden states [B, T, D], normed if the block norms before attention.
            step: What the layers of this call share: positions, rotary tables, mask specs.
            cache: The cache of this layer. The keys and values of the call are stored in it, and
                queries attend to everything in it.

        Returns:
            [B, T, D] in the dtype of `x_BTD`, not added to the residual stream. Rows of padding
            have no meaning.
        """
        layer = self.layer
        q, k, v = products(x_BTD, self.wq, self.wk, self.wv)
        # Casts after norms: under autocast their weights would make queries and keys float32.
        if self.q_norm is not None and self.k_norm is not None and layer.qk_norm == "projection":
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        # -1 instead of the number of heads: with tensor parallelism a rank has a share of them.
        q, k, v = (x.unflatten(-1, (-1, layer.head_dim)) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and layer.qk_norm == "head":
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if layer.rope is not None:
            table = step.rope[layer.rope]
            q, k = rotate(q, table, layer.rope.layout), rotate(k, table, layer.rope.layout)
        if layer.use_qk_norm:  # after the rotation and without weights, as in Llama 4
            q, k = rmsnorm(q, layer.norm_eps), rmsnorm(k, layer.norm_eps)
        if layer.temperature is not None:
            q = (q * step.temperature[layer.temperature]).to(q.dtype)
        view = new_view((k, v), step, layer, cache)
        score = ScoreArgs(layer.softmax_scale, layer.attn_softcap, self.sinks)
        return self.wo(step.attend(q, view, step.masks[layer.rule], score).flatten(-2))


class CrossAttention(nn.Module):
    """Attention from tokens to a context (Vaswani et al. 2017, arXiv 1706.03762).

    Neither has rotary positions. With a cache, keys and values of the context are computed once.
    """

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        assert layer.context_dim is not None, "a block without a context has no such sublayer"
        self.layer = layer
        q_dim, kv_dim = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
        self.wq = Linear(layer.dim, q_dim, layer.qkv_bias)
        self.wk = Linear(layer.context_dim, kv_dim, layer.qkv_bias)
        self.wv = Linear(layer.context_dim, kv_dim, layer.qkv_bias)
        self.wo = Linear(q_dim, layer.dim, layer.out_bias)

    def forward(self, x_BTD: Tensor, step: Step, cache: LayerCacheLike | None = None) -> Tensor:
        """Compute attention of one call to the context.

        Args:
            x_BTD: Hidden states [B, T, D].
            step: What the layers of this call share, with the context [B, S, C].
            cache: The cache of this layer, which may have the context already.

        Returns:
            [B, T, D] in the dtype of `x_BTD`, not added to the residual stream.
        """
        layer = self.layer
        q_BTNH = self.wq(x_BTD).unflatten(-1, (-1, layer.head_dim))
        view = cache.context if cache is not None else None
        if view is None:
            assert step.context is not None, "the model refuses a call without one"
            states = step.context.states_BSC
            k, v = (w(states).unflatten(-1, (-1, layer.head_dim)) for w in (self.wk, self.wv))
            view = CacheView((k, v), step.context.positions_BS)
            if cache is not None:
                view = cache.keep_context(view.states, view.positions_BS)
        assert step.context_mask is not None, "built with every step of such a model"
        out_BTNH = step.attend(q_BTNH, view, step.context_mask, ScoreArgs(layer.softmax_scale))
        return self.wo(out_BTNH.flatten(-2))

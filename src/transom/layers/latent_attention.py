"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437).

Keys and values of all heads are linear in one small latent per token, and one rotary key is shared
by all heads; only these two are cached. The up-projection can be applied to what was cached
(`expanded`) or moved to the other side of the products (`absorbed`): equal numbers, and each is
cheaper where it is used.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerArgs
from transom.layers.attention import new_view
from transom.layers.linear import Linear
from transom.layers.norm import make_norm
from transom.layers.rope import rotate
from transom.layers.step import LayerCacheLike, Step


class LatentAttention(nn.Module):
    """wq (or wq_a, norm, wq_b) for queries; wkv_a, norm, wkv_b for keys and values; per head [nope
    | rope].
    """

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        assert layer.mla is not None, "a block without mla_args has ordinary attention"
        self.layer, self.mla = layer, layer.mla
        mla, heads = layer.mla, layer.n_heads
        q_dim = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if mla.q_lora_rank is None:
            self.wq = Linear(layer.dim, q_dim)
        else:
            self.wq_a = Linear(layer.dim, mla.q_lora_rank, layer.qkv_bias)
            self.q_a_norm = make_norm(layer.norm, mla.q_lora_rank, mla.norm_eps)
            self.wq_b = Linear(mla.q_lora_rank, q_dim)
        self.wkv_a = Linear(layer.dim, mla.kv_lora_rank + mla.qk_rope_head_dim, layer.qkv_bias)
        self.kv_a_norm = make_norm(layer.norm, mla.kv_lora_rank, mla.norm_eps)
        self.wkv_b = Linear(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        self.wo = Linear(heads * mla.v_head_dim, layer.dim, layer.out_bias)

    def forward(self, x_BTD: Tensor, step: Step, cache: LayerCacheLike | None = None) -> Tensor:
        mla, layer = self.mla, self.layer
        q = (
            self.wq(x_BTD)
            if mla.q_lora_rank is None
            else self.wq_b(self.q_a_norm(self.wq_a(x_BTD)))
        )
        q_BTNH = q.unflatten(-1, (layer.n_heads, -1))
        q_nope, q_rope = q_BTNH.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), -1)
        latent, k_rope = (
            self.wkv_a(x_BTD).unsqueeze(-2).split((mla.kv_lora_rank, mla.qk_rope_head_dim), -1)
        )
        if layer.rope is not None:
            table = step.rope[layer.rope]
            q_rope, k_rope = (rotate(x, table, layer.rope.layout) for x in (q_rope, k_rope))
        if layer.temperature is not None:
            scale = step.temperature[layer.temperature]
            q_nope, q_rope = ((x * scale).to(x.dtype) for x in (q_nope, q_rope))
        # One tensor per token: decoding reads it as the keys of a single head without a copy.
        state = torch.cat((self.kv_a_norm(latent).to(k_rope.dtype), k_rope), -1)
        view = new_view((state,), step, layer, cache)
        form = self.absorbed if self._absorbing_is_cheaper(x_BTD.size(1), view) else self.expanded
        return self.wo(form(q_nope, q_rope, view, step).flatten(-2))

    def expanded(self, q_nope: Tensor, q_rope: Tensor, view: CacheView, step: Step) -> Tensor:
        """[B, T, N, v]: keys and values of every head are made from the latents; for many queries
        at once.
        """
        mla = self.mla
        latent, k_rope = view.states[0].split((mla.kv_lora_rank, mla.qk_rope_head_dim), -1)
        up = self.wkv_b(latent.squeeze(-2)).unflatten(-1, (self.layer.n_heads, -1))
        k_nope, v = up.split((mla.qk_nope_head_dim, mla.v_head_dim), -1)
        k = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:-1], -1)), -1)
        q = torch.cat((q_nope, q_rope), -1)
        return step.attend(
            q, replace(view, states=(k, v)), step.masks[self.layer.rule], self._score()
        )

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, view: CacheView, step: Step) -> Tensor:
        """[B, T, N, v]: queries move into the latent space, where all heads share one key; for few
        queries.
        """
        mla = self.mla
        up_NHR = self.wkv_b.weight.to(q_nope.dtype).unflatten(0, (self.layer.n_heads, -1))
        up_k, up_v = up_NHR.split((mla.qk_nope_head_dim, mla.v_head_dim), 1)
        q = torch.cat((torch.einsum("btnh,nhr->btnr", q_nope, up_k), q_rope), -1)
        # The value is the latent alone; taking the rotary part along and dropping it saves a copy
        # of the cache.
        state = view.states[0]
        shared = replace(view, states=(state, state))
        out = step.attend(q, shared, step.masks[self.layer.rule], self._score())[
            ..., : mla.kv_lora_rank
        ]
        return torch.einsum("btnr,nhr->btnh", out, up_v)

    def _score(self) -> ScoreArgs:
        mla, layer = self.mla, self.layer
        plain = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5
        return ScoreArgs(
            plain if layer.softmax_scale is None else layer.softmax_scale, layer.attn_softcap
        )

    def _absorbing_is_cheaper(self, queries: int, view: CacheView) -> bool:
        """By multiplications per head, with all slots of the view seen."""
        mla, slots = self.mla, view.states[0].size(1)
        up = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
        head = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
        expanded = slots * up + queries * slots * head
        absorbed = queries * up + queries * slots * 2 * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        return absorbed < expanded

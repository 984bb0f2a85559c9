"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437).

Keys and values of all heads are linear functions of one small latent per token, and all heads share
one rotary key. Only these two are cached. The up-projection is applied to the cached latents
(`expanded`), or moved to the other side of the products (`absorbed`). Both give the same numbers,
and each is cheaper in its own case.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerArgs
from transom.layers.attention import new_view
from transom.layers.linear import Linear, products
from transom.layers.norm import make_norm
from transom.layers.rope import rotate
from transom.layers.step import LayerCacheLike, Step
from transom.planning.counts import absorbing_is_cheaper


class LatentAttention(nn.Module):
    """Queries from wq (or wq_a, a norm and wq_b); keys and values from wkv_a, a norm and wkv_b.

    The features of a head are [qk_nope_head_dim | qk_rope_head_dim]; only the latter are rotated.
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
        """Compute self-attention of one call.

        Args:
            x_BTD: Hidden states [B, T, D], normed if the block norms before attention.
            step: What the layers of this call share.
            cache: The cache of this layer. It stores one vector per token, the normed latent and
                the rotary key: [B, T, 1, kv_lora_rank + qk_rope_head_dim].

        Returns:
            [B, T, D] in the dtype of `x_BTD`, not added to the residual stream.
        """
        mla, layer = self.mla, self.layer
        compressed = mla.q_lora_rank is not None
        q, kv = products(x_BTD, self.wq_a if compressed else self.wq, self.wkv_a)
        if compressed:
            q = self.wq_b(self.q_a_norm(q))
        # -1 instead of the number of heads: with tensor parallelism a rank has a share of them.
        q_BTNH = q.unflatten(-1, (-1, mla.qk_nope_head_dim + mla.qk_rope_head_dim))
        q_nope, q_rope = q_BTNH.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), -1)
        latent, k_rope = kv.unsqueeze(-2).split((mla.kv_lora_rank, mla.qk_rope_head_dim), -1)
        if layer.rope is not None:
            table = step.rope[layer.rope]
            q_rope, k_rope = (rotate(x, table, layer.rope.layout) for x in (q_rope, k_rope))
        if layer.temperature is not None:
            scale = step.temperature[layer.temperature]
            q_nope, q_rope = ((x * scale).to(x.dtype) for x in (q_nope, q_rope))
        # One vector per token, which decoding reads as the key of a single head without a copy.
        state = torch.cat((self.kv_a_norm(latent).to(k_rope.dtype), k_rope), -1)
        view = new_view((state,), step, layer, cache)
        count, slots = x_BTD.size(1), view.states[0].size(1)
        known = isinstance(count, int)  # an exported prefill is for any number of tokens
        absorbing = known and absorbing_is_cheaper(mla, count, slots)
        form = self.absorbed if absorbing else self.expanded
        return self.wo(form(q_nope, q_rope, view, step).flatten(-2))

    def expanded(self, q_nope: Tensor, q_rope: Tensor, view: CacheView, step: Step) -> Tensor:
        """Compute keys and values of every head from the latents; cheaper for many queries.

        Args:
            q_nope: Query features without rotation [B, T, N, qk_nope_head_dim].
            q_rope: Rotated query features [B, T, N, qk_rope_head_dim].
            view: Latents and rotary keys of the slots.
            step: What the layers of this call share.

        Returns:
            [B, T, N, v_head_dim].
        """
        mla = self.mla
        latent, k_rope = view.states[0].split((mla.kv_lora_rank, mla.qk_rope_head_dim), -1)
        up = self.wkv_b(latent.squeeze(-2)).unflatten(
            -1, (-1, mla.qk_nope_head_dim + mla.v_head_dim)
        )
        k_nope, v = up.split((mla.qk_nope_head_dim, mla.v_head_dim), -1)
        k = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:-1], -1)), -1)
        q = torch.cat((q_nope, q_rope), -1)
        return step.attend(
            q, replace(view, states=(k, v)), step.masks[self.layer.rule], self._score()
        )

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, view: CacheView, step: Step) -> Tensor:
        """Move queries into the latent space, where all heads share a key; cheaper for few queries.

        Arguments and result are those of `expanded`.
        """
        mla = self.mla
        up_NHR = self.wkv_b.weight.to(q_nope.dtype).unflatten(
            0, (-1, mla.qk_nope_head_dim + mla.v_head_dim)
        )
        up_k, up_v = up_NHR.split((mla.qk_nope_head_dim, mla.v_head_dim), 1)
        q = torch.cat((torch.einsum("btnh,nhr->btnr", q_nope, up_k), q_rope), -1)
        # Values are the latents alone. To keep the rotary part and drop it from the result saves a
        # copy of the cache.
        state = view.states[0]
        shared = replace(view, states=(state, state))
        out = step.attend(q, shared, step.masks[self.layer.rule], self._score())[
            ..., : mla.kv_lora_rank
        ]
        return torch.einsum("btnr,nhr->btnh", out, up_v)

    def _score(self) -> ScoreArgs:
        """Return the scale of the full head dim, since the absorbed form has other head dims."""
        mla, layer = self.mla, self.layer
        plain = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5
        return ScoreArgs(
            plain if layer.softmax_scale is None else layer.softmax_scale, layer.attn_softcap
        )

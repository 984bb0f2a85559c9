"""Silent bugs in masks, positions, norms, heads, experts and attention backends.

The registry is `bugs.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.mutations.planting import (
    Call,
    around_attend,
    changed,
    changed_everywhere,
    layered,
    scored,
)
from transom.attention import blockwise, mask, sdpa
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerArgs, LayerRule, RopeArgs
from transom.config.model_args import ModelArgs
from transom.layers import attention, rope
from transom.layers.attention import Attention
from transom.layers.latent_attention import LatentAttention
from transom.layers.linear import Embedding
from transom.layers.moe import LocalDispatcher, Router
from transom.layers.norm import RMSNorm
from transom.layers.step import Step
from transom.models.llm import LLM

# -- who sees whom


def ruled(change: Callable[..., tuple[Any, ...]]) -> AbstractContextManager[None]:
    """The mask rule with changed arguments."""
    return changed_everywhere(
        mask.allowed, lambda original: lambda *given: original(*change(*given))
    )


def wide_window() -> AbstractContextManager[None]:
    """The mask of a window layer allows one key too many."""

    def change(rule: LayerRule, *rest: Any) -> tuple[Any, ...]:
        return (replace(rule, size=rule.size + 1) if rule.kind == "window" else rule, *rest)

    return ruled(change)


def wide_window_everywhere() -> AbstractContextManager[None]:
    """Mask, ring and slices all use a window that is one token too wide."""

    def rule(args: ModelArgs, layer: LayerArgs) -> LayerRule:
        return (
            replace(layer.rule, size=layer.rule.size + 1)
            if layer.rule.kind == "window"
            else layer.rule
        )

    return layered(rule=rule)


def chunk_from_the_call() -> AbstractContextManager[None]:
    """Chunks start where a call starts, not at multiples of their size."""

    def change(rule: LayerRule, q: Tensor, k: Tensor, *segments: Any) -> tuple[Any, ...]:
        if rule.kind != "chunk":
            return (rule, q, k, *segments)
        first = q.clamp(min=0).amin(1, keepdim=True) % rule.size
        return (
            rule,
            torch.where(q < 0, q, q - first + rule.size),
            torch.where(k < 0, k, k - first + rule.size),
            *segments,
        )

    return ruled(change)


def visible_padding() -> AbstractContextManager[None]:
    """Padding and empty slots take part in attention."""

    def change(rule: LayerRule, q: Tensor, k: Tensor, *segments: Any) -> tuple[Any, ...]:
        return (rule, q, torch.where(k < 0, q.amax(1, keepdim=True).clamp(min=0), k), *segments)

    return ruled(change)


def leaking_segment() -> AbstractContextManager[None]:
    """Packed documents attend to each other."""

    def outer(forward: Call) -> Call:
        def wrapped(self: Attention, x: Tensor, step: Step, cache: object = None) -> Tensor:
            masks = {rule: MaskSpec(rule, spec.positions_BT) for rule, spec in step.masks.items()}
            return forward(self, x, replace(step, masks=masks), cache)

        return wrapped

    return changed(Attention, "forward", outer)


# -- positions, norms, heads


def unscaled_rope() -> AbstractContextManager[None]:
    """The RoPE frequencies are those of the original context."""

    def make(original: Call) -> Call:
        return lambda rope_args, *rest, **named: original(
            replace(rope_args, scaling=None), *rest, **named
        )

    return changed_everywhere(rope.frequencies, make)


def unfactored_yarn() -> AbstractContextManager[None]:
    """YaRN's factor of cos and sin is missing."""
    return changed_everywhere(rope.attention_factor, lambda original: lambda scaling: 1.0)


def swapped_layout() -> AbstractContextManager[None]:
    """The interleaved and the halves layout of RoPE are swapped."""
    other = {"halves": "interleaved", "interleaved": "halves"}
    return changed_everywhere(
        rope.rotate, lambda original: lambda x, table, layout: original(x, table, other[layout])
    )


def rotated_nope() -> AbstractContextManager[None]:
    """A layer without positions applies RoPE."""

    def told(args: ModelArgs, layer: LayerArgs) -> RopeArgs:
        return layer.rope or RopeArgs(
            args.rotary_dim, args.rope_theta, args.rope_layout, args.scaling
        )

    return layered(rope=told)


def norm_behind_rotation() -> AbstractContextManager[None]:
    """The learned norm of the heads is applied after RoPE."""

    def outer(forward: Call) -> Call:
        def wrapped(self: Attention, x: Tensor, step: Step, cache: object = None) -> Tensor:
            q_norm, k_norm = self.q_norm, self.k_norm
            if q_norm is None or k_norm is None or self.layer.qk_norm != "head":
                return forward(self, x, step, cache)

            def attend(q: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
                k, v = view.states
                return step.attend(q_norm(q), replace(view, states=(k_norm(k), v)), spec, score)

            self.q_norm = self.k_norm = None
            try:
                return forward(self, x, replace(step, attend=attend), cache)
            finally:
                self.q_norm, self.k_norm = q_norm, k_norm

        return wrapped

    return changed(Attention, "forward", outer)


def tiled_heads() -> AbstractContextManager[None]:
    """Query head h reads kv head h mod K instead of h div (N / K)."""

    def make(layer: Attention, attend: Call) -> Call:
        def call(q: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
            heads = q.size(2)
            order = (
                torch.arange(heads).view(-1, view.states[0].size(2)).T.flatten()
            )  # head h reads kv head h % K
            return attend(q[:, :, order], view, spec, score)[:, :, order.argsort()]

        return call

    return around_attend(make)


def padded_temperature() -> AbstractContextManager[None]:
    """The temperature of queries follows their column, not their position."""

    def make(original: Call) -> Call:
        def scale(positions: Tensor, args: object) -> Tensor:
            columns = torch.arange(positions.size(1)).expand_as(positions)
            return original(
                torch.where((positions < 0).any(1, keepdim=True), columns, positions), args
            )

        return scale

    return changed_everywhere(attention.temperature_scale, make)


def uncapped_scores() -> AbstractContextManager[None]:
    """Scores are not capped."""
    return scored(softcap=None)


def sinkless_scores() -> AbstractContextManager[None]:
    """The sinks are left out of the softmax."""
    return scored(sinks_N=None)


def unscaled_scores() -> AbstractContextManager[None]:
    """The model's own softmax scale is replaced by 1 / sqrt(H)."""
    return scored(scale=None)


def weightless_norm() -> AbstractContextManager[None]:
    """RMSNorm does not multiply by its weight."""

    def make(original: Call) -> Call:
        def forward(self: RMSNorm, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

        return forward

    return changed(RMSNorm, "forward", make)


def latent_without_rotation() -> AbstractContextManager[None]:
    """The absorbed form of latent attention leaves out the RoPE part of the query."""

    def make(original: Call) -> Call:
        def absorbed(self: object, q_nope: Tensor, q_rope: Tensor, *rest: Any) -> Tensor:
            return original(self, q_nope, torch.zeros_like(q_rope), *rest)

        return absorbed

    return changed(LatentAttention, "absorbed", make)


def uncapped_logits() -> AbstractContextManager[None]:
    """The soft cap of the logits is left out."""
    return changed(
        LLM, "finish_logits", lambda original: lambda self, raw: raw * self.args.logit_factor
    )


def untied_output() -> AbstractContextManager[None]:
    """The output is a copy of the embeddings and gives them no gradient."""

    def make(original: Call) -> Call:
        def project(self: LLM, h: Tensor) -> Tensor:
            if not self.args.tie_embeddings:
                return original(self, h)
            tied = self.tok_embeddings
            copy = Embedding(*tied.weight.shape)
            copy.weight = torch.nn.Parameter(tied.weight.detach().clone())
            self.tok_embeddings = copy
            try:
                return original(self, h)
            finally:
                self.tok_embeddings = tied

        return project

    return changed(LLM, "project", make)


# -- experts


@contextlib.contextmanager
def scaled_output() -> Iterator[None]:
    """A sigmoid router scales the output of experts, not their input."""
    kept: list[Tensor] = []

    def dispatch(original: Call) -> Call:
        def call(
            self: object, x: Tensor, ids: Tensor, scale: Tensor | None = None, **named: Any
        ) -> Any:
            kept[:] = [] if scale is None else [scale]
            return original(self, x, ids, None, **named)

        return call

    def combine(original: Call) -> Call:
        return lambda self, rows, handle, weights=None: original(
            self, rows, handle, kept[0] if kept else weights
        )

    with (
        changed(LocalDispatcher, "dispatch", dispatch),
        changed(LocalDispatcher, "combine", combine),
    ):
        yield


def renormalized_router() -> AbstractContextManager[None]:
    """The weights of the chosen experts are normalized although they should not be."""

    def make(original: Call) -> Call:
        def forward(self: Router, *given: Any) -> Any:
            told = self.moe
            self.moe = replace(told, normalize=not told.normalize)
            try:
                return original(self, *given)
            finally:
                self.moe = told

        return forward

    return changed(Router, "forward", make)


def weighing_bias() -> AbstractContextManager[None]:
    """The bias that balances experts also changes the weights of their outputs."""

    def make(original: Call) -> Call:
        def weigh(self: Router, logits: Tensor, ids: Tensor) -> Tensor:
            bias = self.choice_bias
            return original(self, logits if bias is None else logits + bias.to(logits.dtype), ids)

        return weigh

    return changed(Router, "weigh", make)


# -- backends


def wide_slices() -> AbstractContextManager[None]:
    """A kernel's blocks of a window are sliced one key too wide."""

    def make(original: Call) -> Call:
        return lambda q, k, v, window, score: original(q, k, v, window + 1, score)

    return changed(sdpa, "_by_window", make)


def nan_in_masked_rows() -> AbstractContextManager[None]:
    """A query that may attend to no key gives NaN instead of zero."""

    def make(original: Call) -> Call:
        def by_block(q: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
            may = mask.allowed(
                spec.rule, spec.positions_BT, view.positions_BS, spec.segments_BT, view.segments_BS
            )
            return original(q, view, spec, score).masked_fill(
                ~may.any(-1)[..., None, None], float("nan")
            )

        return by_block

    return changed(sdpa, "_by_block", make)


def lost_partial_block() -> AbstractContextManager[None]:
    """Keys after the last full block are left out."""

    def make(original: Call) -> Call:
        def key_blocks(self: object, start: int, stop: int) -> Iterator[tuple[int, int, Any]]:
            for low, high, hidden in original(self, start, stop):
                if low == 0 or (high - low) % blockwise.KEYS == 0:
                    yield low, high, hidden

        return key_blocks

    return changed(blockwise._Job, "key_blocks", make)

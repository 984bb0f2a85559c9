"""The one rule of who sees whom, and what a call knows about its own tokens.

Shape letters, everywhere in this project: B batch, T new tokens, S cached slots, D model dim, N
query heads, K key/value heads, H head dim, F hidden dim, E experts, A active experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from transom.config.layer_args import LayerRule


def visible(
    rule: LayerRule,
    q: Tensor,
    k: Tensor,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
) -> Tensor:
    """Bool, True where a query at position `q` may see a key at `k`, elementwise; position -1 is
    nothing.
    """
    ok = (q >= 0) & (k >= 0)
    if rule.kind != "full":
        ok = ok & (k <= q)
    if rule.kind == "window":  # `size` keys, the query's own included
        ok = ok & (k > q - rule.size)
    elif rule.kind == "chunk":  # chunks are counted in absolute positions, never from the call
        ok = ok & (
            k.div(rule.size, rounding_mode="floor") == q.div(rule.size, rounding_mode="floor")
        )
    if q_segments is not None and k_segments is not None:
        ok = ok & (q_segments == k_segments)
    return ok


def allowed(
    rule: LayerRule,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    q_segments_BT: Tensor | None = None,
    k_segments_BS: Tensor | None = None,
) -> Tensor:
    """Bool [B, T, S], True where query t may see key s; position -1 is padding or an empty slot."""
    return visible(
        rule,
        q_positions_BT.unsqueeze(-1),
        k_positions_BS.unsqueeze(-2),
        None if q_segments_BT is None else q_segments_BT.unsqueeze(-1),
        None if k_segments_BS is None else k_segments_BS.unsqueeze(-2),
    )


@dataclass(frozen=True)
class Layout:
    """What the host knows of a call's tokens, so that attention can slice instead of masking.

    `documents` are the lengths of the documents of the flattened [B * T] tokens in order, none
    crossing a row; each counts its positions from `start`. Padding may only follow the real tokens
    of a row.
    """

    documents: tuple[int, ...]
    start: int = 0
    padded: bool = False


@dataclass(frozen=True)
class MaskSpec:
    """One layer rule applied to one call: the queries' positions [B, T] and segments, and their
    layout.
    """

    rule: LayerRule
    positions_BT: Tensor
    segments_BT: Tensor | None = None
    layout: Layout | None = None

    @cached_property
    def tables(self) -> dict[str, Any]:
        """What a backend derived from this spec, by its name: made by the first layer, read by the
        others.
        """
        return {}


def create_chunked_attention_mask(
    seq_len: int, chunk_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Bool [T, T] of chunked local attention, True = may attend (meta llama4/model.py)."""
    positions = torch.arange(seq_len, device=device)[None]
    return allowed(LayerRule("chunk", chunk_size), positions, positions)[0]


def positions_from_sizes(sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Concatenated aranges [sum(sizes)]: each packed document counts from 0."""
    return torch.cat([torch.arange(size, device=device) for size in sizes])


def segments_from_sizes(sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Document index of every packed token [sum(sizes)]."""
    return torch.repeat_interleave(torch.tensor(list(sizes), device=device))

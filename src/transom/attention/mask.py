"""The mask rule, and what the host knows about the tokens of a call.

Shape letters, in the complete project: B batch, T new tokens, S cached slots, D model dim, N query
heads, K key/value heads, H head dim, F hidden dim, E experts, A active experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from transom.base.copies import to_device
from transom.config.layer_args import LayerRule


def visible(
    rule: LayerRule,
    q: Tensor,
    k: Tensor,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
) -> Tensor:
    """Return, elementwise, whether a query may attend to a key.

    Args:
        rule: The mask rule of the layer.
        q: Integer positions of queries; -1 is padding.
        k: Integer positions of keys, of a shape that broadcasts with `q`; -1 is an empty slot.
        q_segments: The document of each query, where rows are packed.
        k_segments: The document of each key.
    """
    ok = (q >= 0) & (k >= 0)
    if rule.kind != "full":
        ok = ok & (k <= q)
    if rule.kind == "window":  # `size` keys, the query's own key included
        ok = ok & (k > q - rule.size)
    elif rule.kind == "chunk":  # chunks begin at multiples of absolute positions
        k_chunk, q_chunk = (x.div(rule.size, rounding_mode="floor") for x in (k, q))
        ok = ok & (k_chunk == q_chunk)
    if q_segments is not None and k_segments is not None:
        ok = ok & (q_segments == k_segments)
    return ok


def allowed(
    rule: LayerRule,
    q_positions_BT: Tensor,
    k_positions_BS: Tensor,
    q_segments_BT: Tensor | None = None,
    k_segments_BS: Tensor | None = None,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor:
    """Return the mask bool [B, T, S], True where query t may attend to key s; see `visible`.

    `queries` and `keys` choose a block of the mask.
    """
    q, k = q_positions_BT[:, queries, None], k_positions_BS[:, None, keys]
    if q_segments_BT is None or k_segments_BS is None:
        return visible(rule, q, k)
    return visible(rule, q, k, q_segments_BT[:, queries, None], k_segments_BS[:, None, keys])


@dataclass(frozen=True)
class Layout:
    """What the host knows about the tokens of a call, so that attention can slice instead of mask.

    Attributes:
        documents: The lengths of the documents of the flattened [B * T] tokens, in order. No
            document crosses a row.
        start: The position of the first token of each document.
        padded: Whether rows may end with padding.
    """

    documents: tuple[int, ...]
    start: int = 0
    padded: bool = False


@dataclass(frozen=True)
class MaskSpec:
    """One mask rule, applied to one call.

    Attributes:
        rule: The mask rule.
        positions_BT: int64 [B, T], positions of the queries; -1 is padding.
        segments_BT: int [B, T], the document of each query, where rows are packed.
        layout: What the host knows about the tokens, if anything.
    """

    rule: LayerRule
    positions_BT: Tensor
    segments_BT: Tensor | None = None
    layout: Layout | None = None

    @cached_property
    def tables(self) -> dict[Hashable, Any]:
        """What the first layer of a step derived from this spec, for the layers after it."""
        return {}


def create_chunked_attention_mask(
    seq_len: int, chunk_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Return the mask bool [T, T] of chunked local attention, True where a token may attend.

    The name is that of Meta's reference code (llama4/model.py).
    """
    positions = torch.arange(seq_len, device=device)[None]
    return allowed(LayerRule("chunk", chunk_size), positions, positions)[0]


def positions_from_sizes(sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Return the positions int64 [sum(sizes)] of packed documents, each of which starts at 0.

    The name is that of Mistral's reference code (cache.py).
    """
    return torch.cat([torch.arange(size, device=device) for size in sizes])


def segments_from_sizes(sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Return the document index int64 [sum(sizes)] of every packed token."""
    return torch.repeat_interleave(torch.tensor(list(sizes), device=device))


def place_documents(sizes: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions and the document indices int64 [B, T] of packed rows.

    They are computed on the host: a size that depends on numbers would make it wait for a GPU.

    Args:
        sizes: The document lengths of each row. All rows have the same sum.
        device: Where the results go.
    """
    positions_BT = torch.stack([positions_from_sizes(row) for row in sizes])
    segments_BT = torch.stack([segments_from_sizes(row) for row in sizes])
    return to_device(positions_BT, device), to_device(segments_BT, device)

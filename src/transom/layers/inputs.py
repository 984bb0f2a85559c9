"""What a model is called with and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from transom.layers.moe import RouterStatistics


@dataclass(frozen=True)
class MaskedEmbedding:
    """Rows that replace token embeddings.

    Attributes:
        embedding: [B, T, D], the replacements.
        mask: bool [B, T], True where a token embedding is replaced.
    """

    embedding: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TransformerInput:
    """The input of one forward call.

    Attributes:
        tokens: Integer ids [B, T].
        tokens_position: Positions of the tokens: the position of the first token as an int, or
            integers [T] or [B, T], where -1 marks padding. By default positions start at 0. A
            cache counts positions itself.
        image_embedding: Rows that replace token embeddings, such as those of image patches.
        sizes: Document lengths in tokens where rows are packed: a flat list for one row, otherwise
            one list per row. Each document has its own positions and attends to itself only.
        segments: Integers [B, T], the document of each token, with `tokens_position` [B, T] instead
            of `sizes`: tokens of a document may then be anywhere in its row.
        lengths: int [B], the number of real tokens of each row where rows are padded on the right.
        context: [B, S, context_dim], states that cross-attention reads. All documents of a packed
            row share it. With a cache it is given once, with the first tokens.
        context_lengths: int [B], the number of real context states of each row.
        logits: Which positions get logits: `all`, the `last` real token of each row, or `none`.
    """

    tokens: Tensor
    tokens_position: int | Tensor | None = None
    image_embedding: MaskedEmbedding | None = None
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None
    segments: Tensor | None = None
    lengths: Tensor | None = None
    context: Tensor | None = None
    context_lengths: Tensor | None = None
    logits: Literal["all", "last", "none"] = "all"


@dataclass(frozen=True)
class TransformerOutput:
    """The output of one forward call.

    Attributes:
        logits: [B, T, V], [B, 1, V] for `logits="last"`, or None for `logits="none"`. A model with
            a classification head returns [B, labels], one with an embedding head None.
        hidden_BTD: Hidden states [B, T, D] after the final norm.
        router: Statistics of every mixture-of-experts layer, in order.
        pooled_BD: One vector per row [B, D] of a model with a head, otherwise None.
    """

    logits: Tensor | None
    hidden_BTD: Tensor
    router: tuple[RouterStatistics, ...] = ()
    pooled_BD: Tensor | None = None


def pad_rows(rows: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows of token ids as one tensor [B, T], padded on the right with `pad_token`, and
    their lengths [B], both int64.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    padded = [[*row, *[pad_token] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)


def batches_by_length(
    lengths: Sequence[int], batch_tokens: int, batch_rows: int | None = None, fewest: int = 1
) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of similar length, the longest first.

    Args:
        lengths: Tokens of each row.
        batch_tokens: The most tokens of a batch of more than `fewest` rows, padding included.
        batch_rows: The most rows of a batch, if there is a limit.
        fewest: The fewest rows of a batch, unless there are fewer in all. Rows that are left over
            join the last batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(fewest, batch_tokens // max(1, lengths[order[0]]))
        count = count if batch_rows is None else min(count, batch_rows)
        count = len(order) if len(order) - count < fewest else count
        yield order[:count]
        order = order[count:]

"""Labels and embeddings of whole sequences: what is minimised, how well it works, and one vector
per text.

Shape letters: B rows, T tokens, D vector, L labels, P positives, R all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import require
from transom.base.runtime import evaluating
from transom.config.layer_args import BASE_HEAD, HeadArgs
from transom.data.batch import pad_rows
from transom.data.labelled import EncodedText
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerInput, TransformerOutput
from transom.models.llm import LLM, pool
from transom.training.losses.cross_entropy import cross_entropy_sum

BATCH_TOKENS = 4096  # of one call without gradients, padding included


# -- losses
# ------------------------------------------------------------------------------------------


def head_loss_sum(
    head: HeadArgs, output: TransformerOutput, targets_B: Tensor, temperature: float = 0.05
) -> Tensor:
    """What a model with a head minimises, summed over the rows that have a target, in nats.

    Classification: -log p(label). Embedding: `contrastive_loss_sum` of the pairs in neighbouring
    rows.
    """
    if head.kind == "classification":
        assert output.logits is not None, "a classification head has logits"
        return cross_entropy_sum(output.logits, targets_B)
    assert output.pooled_BD is not None, "every head pools"
    return contrastive_loss_sum(
        output.pooled_BD[::2], output.pooled_BD[1::2], targets_B[::2], temperature
    )


def contrastive_loss_sum(
    text_BD: Tensor,
    positive_PD: Tensor,
    numbers_P: Tensor,
    temperature: float = 0.05,
    first: int = 0,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): -log softmax of products / temperature,
    own positive.

    Texts are those of the pairs from `first` on, the other positives are the negatives, except for
    those with the same number: they are the same text. Products are in float32 or better;
    normalised vectors make them cosines.
    """
    require(temperature > 0, "temperature", temperature, "expected a number above 0")
    own_B = torch.arange(first, first + len(text_BD), device=text_BD.device)
    scores_BP = _scores(text_BD, positive_PD) / temperature
    twins_BP = numbers_P[own_B, None] == numbers_P[None]
    twins_BP[torch.arange(len(own_B), device=own_B.device), own_B] = False
    return F.cross_entropy(scores_BP.masked_fill(twins_BP, -torch.inf), own_B, reduction="sum")


def _scores(text_BD: Tensor, positive_PD: Tensor) -> Tensor:
    """Products [B, P] in float32 or better."""
    wide = torch.promote_types(text_BD.dtype, torch.float32)
    with torch.autocast(
        text_BD.device.type, enabled=False
    ):  # 1 / temperature would magnify its rounding
        return text_BD.to(wide) @ positive_PD.to(wide).T


# -- scores
# ------------------------------------------------------------------------------------------


@torch.no_grad()
def score_head(model: LLM, rows: Sequence[EncodedText], temperature: float = 0.05) -> Score:
    """Return the loss in nats and the accuracy of held-out rows.

    A row is right if its label is the most likely one or, for pairs, if its own positive (or an
    equal text) is the nearest of all positives.

    Args:
        model: A model with a head.
        rows: The rows.
        temperature: What similarities are divided by, as in training.

    Raises:
        RequestError: If the model has no head.
    """
    head = model.args.head
    require(head is not None, "head", None, "expected a model with a head")
    loss, right = 0.0, 0
    if not rows:
        return Score(unit="rows", sums={"accuracy": right})
    targets_R = torch.tensor([row.target for row in rows], device=model.device)
    texts = run_rows(model, [row.ids[0] for row in rows])
    if texts.logits is not None:
        loss = float(cross_entropy_sum(texts.logits, targets_R))
        right = int((texts.logits.argmax(1) == targets_R).sum())
        return Score(loss, len(rows), unit="rows", sums={"accuracy": right})
    positive_PD = run_rows(model, [row.ids[1] for row in rows]).vectors
    for at in range(0, len(rows), 1024):  # never rows x rows at once
        text_BD = texts.vectors[at : at + 1024]
        loss += float(contrastive_loss_sum(text_BD, positive_PD, targets_R, temperature, at))
        nearest_B = _scores(text_BD, positive_PD).argmax(1)
        right += int((targets_R[nearest_B] == targets_R[at : at + 1024]).sum())
    return Score(loss, len(rows), unit="rows", sums={"accuracy": right})


class Vectors(NamedTuple):
    """Pooled vectors [R, D] of rows, and logits [R, L] where the model has labels."""

    vectors: Tensor
    logits: Tensor | None


@torch.no_grad()
def run_rows(
    model: LLM, rows: Sequence[Sequence[int]], pooling: Literal["mean", "last"] | None = None
) -> Vectors:
    """Return one vector per row of ids, in order, by the model's head.

    A language model, and the base of one in a folder without a head, are pooled by `pooling`.
    """
    head, free = model.args.head, model.args.head in (None, BASE_HEAD)
    if head is None:
        require(pooling is not None, "pooling", pooling, "a language model accepts mean or last")
    elif not free:
        expected = f"expected {head.pooling}, what the model's head does"
        require(pooling in (None, head.pooling), "pooling", pooling, expected)
    device = model.device
    vectors: dict[int, Tensor] = {}
    logits: dict[int, Tensor] = {}
    for indices in _like_lengths(rows):
        tokens_BT, lengths = (
            tensor.to(device) for tensor in pad_rows([rows[index] for index in indices])
        )
        with evaluating(model):
            output = model(TransformerInput(tokens_BT, lengths=lengths, logits="none"))
        pooled_BD = output.pooled_BD
        if pooled_BD is None or (free and pooling is not None):
            offsets_T = torch.arange(tokens_BT.size(1), device=device)
            positions_BT = torch.where(offsets_T < lengths[:, None], offsets_T, -1)
            pooled_BD = pool(output.hidden_BTD, positions_BT, pooling or "mean")
        vectors |= dict(zip(indices, pooled_BD, strict=True))
        if head is not None and output.logits is not None:
            logits |= dict(zip(indices, output.logits, strict=True))
    ordered = torch.stack([vectors[index] for index in range(len(rows))])
    return Vectors(ordered, torch.stack([logits[i] for i in range(len(rows))]) if logits else None)


def _like_lengths(rows: Sequence[Sequence[Any]]) -> Iterator[list[int]]:
    """Indices of rows in groups of like length, which waste little padding."""
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if group and (len(group) + 1) * len(rows[index]) > BATCH_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group

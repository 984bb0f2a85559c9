"""Losses and scores of models with a head, and one vector per text.

Shape letters: B rows, T tokens, D vector, L labels, P positives, R all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import expect
from transom.config.layer_args import HeadArgs
from transom.data.labelled import EncodedText
from transom.evaluation.score import Score
from transom.inference.embedding import run_rows
from transom.layers.inputs import TransformerOutput
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import cross_entropy_sum


def head_loss_sum(
    head: HeadArgs, output: TransformerOutput, targets_B: Tensor, temperature: float = 0.05
) -> Tensor:
    """Return the loss of a head, summed over the rows that have a target, in nats.

    It is -log p(label) for classification, and `contrastive_loss_sum` of pairs in neighbouring rows
    for an embedding.
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
    """Return InfoNCE (van den Oord et al. 2018, arXiv 1807.03748), summed over texts, in nats.

    It is -log softmax of the product with the own positive. The other positives are negatives,
    except those with the same number, which are the same text. Products are in float32 or better;
    of normalised vectors they are cosines.

    Args:
        text_BD: Vectors of the texts of the pairs from `first` on.
        positive_PD: Vectors of all positives.
        numbers_P: Number of each positive; equal texts have equal numbers.
        temperature: What products are divided by.
        first: Index of the first text among the pairs.
    """
    expect(temperature > 0, "temperature", temperature, "a number above 0")
    own_B = torch.arange(first, first + len(text_BD), device=text_BD.device)
    scores_BP = _scores(text_BD, positive_PD) / temperature
    twins_BP = numbers_P[own_B, None] == numbers_P[None]
    twins_BP[torch.arange(len(own_B), device=own_B.device), own_B] = False
    return F.cross_entropy(scores_BP.masked_fill(twins_BP, -torch.inf), own_B, reduction="sum")


def _scores(text_BD: Tensor, positive_PD: Tensor) -> Tensor:
    """Return products [B, P] in float32 or better."""
    wide = torch.promote_types(text_BD.dtype, torch.float32)
    # Division by the temperature would magnify the rounding of autocast.
    with torch.autocast(text_BD.device.type, enabled=False):
        return text_BD.to(wide) @ positive_PD.to(wide).T


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
    expect(head is not None, "head", None, "a model with a head")
    loss, right = 0.0, 0
    if not rows:
        return Score(unit="rows", sums={"accuracy": right})
    targets_R = torch.tensor([row.target for row in rows], device=model.device)
    texts = run_rows(model, [row.ids[0] for row in rows])
    if texts.logits is not None:
        loss = float(cross_entropy_sum(texts.logits, targets_R))
        right = int((texts.logits.argmax(1) == targets_R).sum())
    else:
        positive_PD = run_rows(model, [row.ids[1] for row in rows]).vectors
        for at in range(0, len(rows), 1024):  # never rows x rows at once
            text_BD = texts.vectors[at : at + 1024]
            loss += float(contrastive_loss_sum(text_BD, positive_PD, targets_R, temperature, at))
            nearest_B = _scores(text_BD, positive_PD).argmax(1)
            right += int((targets_R[nearest_B] == targets_R[at : at + 1024]).sum())
    return Score(loss, len(rows), unit="rows", sums={"accuracy": right})

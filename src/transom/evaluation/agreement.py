"""How much two models say the same: how far what they expect next diverges, how often their first
choice agrees.

Logits are made in chunks and compared chunk by chunk, so two models need be in memory at once only
where both are given as they are; `list(logits_of(...))` keeps what one said until the other has
been loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.runtime import evaluating
from transom.evaluation.bits import LOGITS
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

BATCH_TOKENS = 2048  # of one forward


@dataclass(frozen=True)
class Agreement:
    """Two models on the same tokens; `kl` and `nats` per token, `nats` the loss of the second where
    it has one.

    Where the first choices differ, `widest_flip` is the largest gap, in nats, that the first model
    sees between the two: small means that only near-ties fell otherwise.
    """

    tokens: int
    kl: float
    top1_agreement: float
    flips: int
    widest_flip: float
    largest_logit_difference: float
    nats: float | None = None


@torch.no_grad()
def logits_of(model: LLM, rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Float32 logits [n, V] of all positions of rows of tokens [T], in order; of a head, [rows,
    labels].
    """
    device = model.device
    headed = model.args.head is not None
    with evaluating(model):
        for tokens_BT in _batches(rows):
            output = model(
                TransformerInput(tokens_BT.to(device), logits="all" if headed else "none")
            )
            if headed:
                assert output.logits is not None, (
                    "a head without labels says nothing that could agree"
                )
                yield output.logits.float()
                continue
            for hidden_TD in output.hidden_BTD.flatten(0, 1).split(
                max(1, LOGITS // model.args.vocab_size)
            ):
                yield model.project(hidden_TD).float()


def _batches(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tokens [B, T]: neighbouring rows of one length together, so that none is padded."""
    for length, alike in itertools.groupby(rows, key=len):
        while batch := list(itertools.islice(alike, max(1, BATCH_TOKENS // length))):
            yield torch.stack(batch)


def next_tokens(rows: Iterable[Tensor]) -> Tensor:
    """The token behind every position of the rows [positions], -100 behind the last of each."""
    return torch.cat([F.pad(row[1:], (0, 1), value=-100) for row in rows])


def agreement(
    reference: Iterable[Tensor], other: Iterable[Tensor], targets: Tensor | None = None
) -> Agreement:
    """Compare the logits of two models, from `logits_of` on the same rows; KL is that of `other`
    from `reference`.

    `targets` are `next_tokens` of the rows, for the loss of `other`.
    """
    tokens = flips = scored = 0
    divergence, nats, widest, largest = 0.0, 0.0, 0.0, 0.0
    for expected_TV, said_TV in zip(reference, other, strict=True):
        expected_TV = expected_TV.to(said_TV.device)
        first, second = expected_TV.log_softmax(-1), said_TV.log_softmax(-1)
        divergence += float(_divergence(first, second).double().sum())
        gaps = first.max(-1).values - first.gather(-1, second.argmax(-1, keepdim=True)).squeeze(-1)
        flips += int((gaps > 0).sum())
        widest = max(widest, float(gaps.max()))
        largest = max(largest, float((expected_TV - said_TV).abs().max()))
        if targets is not None:
            here = targets[tokens : tokens + len(second)].to(said_TV.device)
            nats += float(F.nll_loss(second, here, reduction="sum"))
            scored += int((here >= 0).sum())
        tokens += len(second)
    if not tokens:
        raise ValueError("no tokens to compare on")
    loss = nats / scored if scored else None
    return Agreement(tokens, divergence / tokens, 1 - flips / tokens, flips, widest, largest, loss)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """sum p log(p / q) [n] of log-probabilities [n, V], as a sum of terms p (q/p - 1 - log(q/p)),
    none below zero.

    The plain sum is first-order in d = log(q/p) and drowns a small divergence in rounding; this is
    second-order.
    """
    d = second - first
    near = torch.expm1(d) - d
    p, q = first.exp(), second.exp()
    return torch.where(d.abs() < 1, p * near, q - p - p * d).sum(-1)

"""How much two models agree: the divergence of their predictions, and how often the best is equal.

Logits are computed and compared in chunks. Two models are in memory at once only if both are given
to `agreement` as `logits_of`; `list(logits_of(...))` keeps the logits of one until the other is
loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.runtime import evaluating
from transom.evaluation.bits import LOGITS
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

BATCH_TOKENS = 2048  # of one forward pass
BLOCK = 2**18  # logits compared at a time on the CPU: eight times as fast as 2**24


@dataclass(frozen=True)
class Agreement:
    """How a second model agrees with a first one on the same tokens.

    Attributes:
        tokens: Number of compared positions.
        kl: KL divergence of the second from the first model, in nats per token.
        top1_agreement: Share of positions with the same most likely token.
        flips: Number of the other positions.
        widest_flip: The largest gap, in nats, that the first model sees between the two tokens of
            a flip. A small gap means that only near-ties differ.
        largest_logit_difference: The largest absolute difference of two logits.
        nats: Cross-entropy of the second model in nats per token, if there are targets.
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
    """Yield the float32 logits [n, V] of all positions of some rows, each int64 [T], in order.

    A model with a classification head yields [rows, labels].
    """
    headed = model.args.head is not None
    at_once = max(1, LOGITS // model.args.vocab_size)
    with evaluating(model):
        for tokens_BT in batches_of(rows):
            logits: Literal["all", "none"] = "all" if headed else "none"
            output = model(TransformerInput(tokens_BT.to(model.device), logits=logits))
            if headed:
                yield output.logits.float()
                continue
            for hidden_TD in output.hidden_BTD.flatten(0, 1).split(at_once):
                yield model.project(hidden_TD).float()


def batches_of(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield tokens [B, T] of neighbouring rows of one length, so that nothing is padded."""
    for length, alike in itertools.groupby(rows, key=len):
        while batch := list(itertools.islice(alike, max(1, BATCH_TOKENS // length))):
            yield torch.stack(batch)


def next_tokens(rows: Iterable[Tensor]) -> Tensor:
    """Return the next token of each position of the rows; -100 for the last of each row."""
    return torch.cat([F.pad(row[1:], (0, 1), value=-100) for row in rows])


def agreement(
    reference: Iterable[Tensor], other: Iterable[Tensor], targets: Tensor | None = None
) -> Agreement:
    """Compare the logits of two models, from `logits_of` on the same rows.

    `targets` are the `next_tokens` of the rows, for the cross-entropy of `other`.
    """
    tokens = flips = scored = 0
    divergence, nats, widest, largest = 0.0, 0.0, 0.0, 0.0
    for expected_TV, found_TV in _blocks(zip(reference, other, strict=True)):
        expected_TV = expected_TV.to(found_TV.device)
        first, second = expected_TV.log_softmax(-1), found_TV.log_softmax(-1)
        divergence += float(_divergence(first, second).double().sum())
        gaps = first.max(-1).values - first.gather(-1, second.argmax(-1, keepdim=True)).squeeze(-1)
        flips += int((gaps > 0).sum())
        widest = max(widest, float(gaps.max()))
        largest = max(largest, float((expected_TV - found_TV).abs().max()))
        if targets is not None:
            here = targets[tokens : tokens + len(second)].to(found_TV.device)
            nats += float(F.nll_loss(second, here, reduction="sum"))
            scored += int((here >= 0).sum())
        tokens += len(second)
    if not tokens:
        raise ValueError("no tokens to compare on")
    loss = nats / scored if scored else None
    return Agreement(tokens, divergence / tokens, 1 - flips / tokens, flips, widest, largest, loss)


def _blocks(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of logits [n, V], on the CPU in blocks of rows that fit into its cache."""
    for one, other in pairs:
        rows = max(1, BLOCK // one.size(-1)) if other.device.type == "cpu" else len(one)
        yield from zip(one.split(rows), other.split(rows), strict=True)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the KL divergence [n] of log-probabilities [n, V]: sum p log(p / q).

    It is computed as sum p (q/p - 1 - log(q/p)), whose terms are never negative. The terms of the
    plain sum are first-order in d = log(q/p), so a small divergence is lost in their rounding.
    """
    d = second - first
    near = torch.expm1(d) - d
    p, q = first.exp(), second.exp()
    return torch.where(d.abs() < 1, p * near, q - p - p * d).sum(-1)

"""Held-out bits per byte and perplexity: every token of every document scored once, with as much left context
as the window allows. Bits per byte do not depend on the tokenizer, so runs and compressors can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from transom.errors import RequestError
from transom.model import LLM, TransformerInput


class Documents(Protocol):
    """What scoring needs of a token file: documents without BOS and EOS, and their UTF-8 lengths."""

    @property
    def bytes(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def document(self, index: int) -> NDArray[np.int64]: ...


LOGITS = 2**24  # held at a time: all of 4,096 positions times 128k tokens would be 2 GB


@dataclass(frozen=True)
class HeldOut:
    """A score: `nats` over `tokens` predicted, against `bytes` of text."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else float("nan")

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(min(self.nats / self.tokens, 700.0)) if self.tokens else float("nan")

    def __add__(self, other: HeldOut) -> HeldOut:
        return HeldOut(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass(frozen=True)
class _Window:
    """Input and target ids of one forward; only targets from `score_from` on count, the rest are context."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    score_from: int


@torch.no_grad()
def score(
    model: LLM,
    documents: Documents,
    *,
    bos_id: int | None,
    eos_id: int | None,
    window: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
) -> HeldOut:
    """Score documents in windows that advance by `stride` (default half a window), the end token included.

    `max_tokens` stops after whole documents; `bytes` then counts the scored ones only.
    """
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise RequestError(f"stride = {stride}: accepted is 1 to window = {window}")
    windows: list[_Window] = []
    tokens = counted_bytes = 0
    for index in range(len(documents)):
        if max_tokens is not None and tokens >= max_tokens:
            break
        # Without a BOS the EOS of the document before stands in front, so that the first token is predicted too.
        begin = [one for one in (bos_id, eos_id) if one is not None][:1]
        end = [] if eos_id is None else [eos_id]
        ids = np.concatenate([begin, documents.document(index), end]).astype(np.int64)
        windows += _windows(ids, window, stride)
        tokens += max(0, len(ids) - 1)
        counted_bytes += int(documents.bytes[index])
    was_training = model.training
    model.eval()
    windows.sort(key=lambda w: len(w.inputs))  # neighbours of like length waste little padding
    nats = sum(_nats(model, rows) for rows in _batches(windows, batch_tokens))
    model.train(was_training)
    return HeldOut(nats, tokens, counted_bytes)


def _windows(ids: NDArray[np.int64], window: int, stride: int) -> list[_Window]:
    out, scored = [], 0
    predicted = len(ids) - 1
    start = 0
    while scored < predicted:
        stop = min(start + window, predicted)
        out.append(_Window(ids[start:stop], ids[start + 1 : stop + 1], scored - start))
        scored = stop
        start += stride
    return out


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterator[Sequence[_Window]]:
    at = 0
    while at < len(windows):
        stop = at + 1
        while stop < len(windows) and (stop + 1 - at) * len(windows[stop].inputs) <= batch_tokens:
            stop += 1
        yield windows[at:stop]
        at = stop


def _nats(model: LLM, rows: Sequence[_Window]) -> float:
    device = model.tok_embeddings.weight.device
    longest = max(len(row.inputs) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full((len(rows), longest), -100)
    for b, row in enumerate(rows):
        tokens[b, : len(row.inputs)] = torch.from_numpy(row.inputs)
        targets[b, row.score_from : len(row.targets)] = torch.from_numpy(row.targets[row.score_from :])
    lengths = torch.tensor([len(row.inputs) for row in rows])
    inputs = TransformerInput(tokens.to(device), lengths=lengths.to(device), logits="none")
    hidden_BTD = model(inputs).hidden_BTD
    targets = targets.to(device)
    # Only scored positions get logits: the context in front of them has been scored before.
    scored = targets >= 0
    rows_at_once = max(1, LOGITS // model.args.vocab_size)
    pieces = zip(hidden_BTD[scored].split(rows_at_once), targets[scored].split(rows_at_once), strict=True)
    return float(sum(F.cross_entropy(model.project(h).float(), ids, reduction="sum") for h, ids in pieces))

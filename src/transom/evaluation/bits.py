"""Bits per byte and perplexity of text.

Every token of every document is scored once, with as much context before it as the window has.
Bits per byte do not depend on the tokenizer, so models can be compared with each other and with
compressors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from transom.base.copies import to_device
from transom.base.errors import RequestError
from transom.base.runtime import evaluating
from transom.data.cache import with_progress
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerInput, batches_by_length, pad_rows
from transom.models.llm import LLM

T = TypeVar("T")


class Documents(Protocol):
    """Token ids of documents without BOS and EOS, and their lengths in UTF-8 bytes."""

    @property
    def bytes(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def document(self, index: int) -> NDArray[np.int64]: ...


LOGITS = 2**24  # computed at a time; 4,096 positions with 128k logits each would take 2 GB


@dataclass(frozen=True, eq=False)
class Window:
    """The ids of one forward pass.

    Attributes:
        inputs: Input ids [T].
        targets: The next id of each input [T].
        score_from: The first scored target. The inputs before it are context.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    score_from: int


class WindowScore(NamedTuple):
    """The cross-entropy sum of a window in nats, and whether greedy decoding gives its targets."""

    nats: float
    greedy: bool


def first_documents(
    documents: Documents, bos_id: int | None, eos_id: int | None, max_tokens: int | None
) -> Sequence[int]:
    """Return the indices of the first documents with at least `max_tokens` predicted tokens.

    None stands for all documents. The framing tokens are those of `score_each`.
    """
    if max_tokens is None:
        return range(len(documents))
    tokens = 0
    for index in range(len(documents)):
        if tokens >= max_tokens:
            return range(index)
        tokens += max(0, len(_framed(documents, index, bos_id, eos_id)) - 1)
    return range(len(documents))


def _framed(
    documents: Documents, index: int, bos_id: int | None, eos_id: int | None
) -> NDArray[np.int64]:
    """Return the ids of a document between the tokens that begin and end it.

    Without a BOS it begins with the EOS of the document before, so that its first token is
    predicted as well.
    """
    begin = [one for one in (bos_id, eos_id) if one is not None][:1]
    end = [] if eos_id is None else [eos_id]
    return np.concatenate([begin, documents.document(index), end]).astype(np.int64)


def score_each(
    model: LLM,
    documents: Documents,
    *,
    bos_id: int | None,
    eos_id: int | None,
    window: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
    indices: Iterable[int] | None = None,
    progress: str = "",
) -> list[Score]:
    """Score documents one by one; no context crosses from one into the next.

    Args:
        model: The model.
        documents: The documents.
        bos_id: Id that begins a document, if there is one.
        eos_id: Id that ends a document and is predicted too, if there is one.
        window: Longest input in tokens.
        stride: Tokens by which windows advance; half a window by default.
        batch_tokens: Tokens of a batch.
        indices: The documents to score, in this order; all by default.
        progress: Name of a progress bar on standard error; none if empty.

    Returns:
        The score of each document in nats, tokens and bytes.

    Raises:
        RequestError: If `stride` is not between 1 and `window`.
    """
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise RequestError(f"stride: got {stride}; expected 1 to window = {window}")
    windows: list[Window] = []
    counts: list[tuple[int, int, int]] = []  # windows, tokens and bytes of each document
    for index in range(len(documents)) if indices is None else indices:
        ids = _framed(documents, index, bos_id, eos_id)
        own = _windows(ids, window, stride)
        windows += own
        counts.append((len(own), max(0, len(ids) - 1), int(documents.bytes[index])))
    nats = iter(score_windows(model, windows, batch_tokens, progress))
    return [
        Score(math.fsum(one.nats for one in itertools.islice(nats, own)), predicted, size)
        for own, predicted, size in counts
    ]


def _windows(ids: NDArray[np.int64], window: int, stride: int) -> list[Window]:
    out, scored = [], 0
    predicted = len(ids) - 1
    start = 0
    while scored < predicted:
        stop = min(start + window, predicted)
        out.append(Window(ids[start:stop], ids[start + 1 : stop + 1], scored - start))
        scored = stop
        start += stride
    return out


def score_windows(
    model: LLM, windows: Sequence[Window], batch_tokens: int = 4096, progress: str = ""
) -> list[WindowScore]:
    """Return the score of each window; a `progress` names a bar on standard error."""
    return in_order(scored(model, windows, batch_tokens), len(windows), progress)


def in_order(found: Iterable[tuple[int, T]], count: int, progress: str = "") -> list[T]:
    """Return the values of `count` pairs (index, value), in the order of the indices.

    A `progress` that is not empty names a bar on standard error.
    """
    values = dict(with_progress(found, progress, count, bool(progress)))
    return [values[index] for index in range(count)]


@torch.no_grad()
def scored(
    model: LLM, windows: Sequence[Window], batch_tokens: int = 4096, batch_rows: int | None = None
) -> Iterator[tuple[int, WindowScore]]:
    """Yield the index and the score of each window, in batches of `batches_by_length`.

    Windows of the same input in neighbouring places are run once.
    """
    rows: list[list[int]] = []
    for index in sorted(range(len(windows)), key=lambda index: -len(windows[index].inputs)):
        if rows and np.array_equal(windows[rows[-1][0]].inputs, windows[index].inputs):
            rows[-1].append(index)
        else:
            rows.append([index])
    lengths = [len(windows[row[0]].inputs) for row in rows]
    with evaluating(model):
        for batch in batches_by_length(lengths, batch_tokens, batch_rows):
            members = [[windows[index] for index in rows[at]] for at in batch]
            scores = _score_batch(model, members)
            yield from zip((index for at in batch for index in rows[at]), scores, strict=True)


def _score_batch(model: LLM, rows: Sequence[Sequence[Window]]) -> list[WindowScore]:
    """Return the scores of the windows of some rows. The windows of one row have one input."""
    device = model.device
    tokens_BT, lengths = pad_rows([row[0].inputs.tolist() for row in rows])
    longest = tokens_BT.size(1)
    inputs = TransformerInput(
        to_device(tokens_BT, device), lengths=to_device(lengths, device), logits="none"
    )
    hidden_BTD = model(inputs).hidden_BTD
    # Only scored positions get logits.
    members = [(b, one) for b, row in enumerate(rows) for one in row]
    counts = [len(one.targets) - one.score_from for _, one in members]
    places = torch.cat(
        [b * longest + torch.arange(one.score_from, len(one.targets)) for b, one in members]
    )
    targets = torch.cat([torch.from_numpy(one.targets[one.score_from :]) for _, one in members])
    at_once = max(1, LOGITS // model.args.vocab_size)
    nats, greedy = [], []
    columns = (to_device(column, device).split(at_once) for column in (places, targets))
    for places_n, targets_n in zip(*columns, strict=True):
        logits_nV = model.project(hidden_BTD.flatten(0, 1)[places_n]).float()
        nats.append(F.cross_entropy(logits_nV, targets_n, reduction="none"))
        greedy.append(logits_nV.argmax(-1) == targets_n)
    pieces = zip(
        torch.cat(nats).cpu().double().split(counts),
        torch.cat(greedy).cpu().split(counts),
        strict=True,
    )
    return [WindowScore(float(nats_n.sum()), bool(greedy_n.all())) for nats_n, greedy_n in pieces]

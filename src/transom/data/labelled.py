"""Texts with a label each, or in pairs that belong together: rows of files, and their batches.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json
from transom.checkpoints.load import write_text
from transom.data.batches import NO_TARGET
from transom.data.file_formats import ROW_NAMES, row_format
from transom.data.order import ShuffledItems
from transom.data.row_files import Row, notice_unread, read_rows
from transom.data.text.sources import TEXT_KEY, held_out
from transom.models.llm import TransformerInput
from transom.tokenizers.tokenizer import Tokenizer

LABEL_KEY, POSITIVE_KEY = "label", "positive"
LABELS = "labels.json"  # of a model folder: {"labels": [name, ...]}


# -- labelled text
# -----------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """One line of a file: a text with its label or, where the model embeds, with the text it
    belongs to.
    """

    id: str
    text: str
    label: int | str | None = None
    positive: str | None = None


def read_labelled(path: str | Path, kind: Literal["classification", "embedding"]) -> list[Labelled]:
    """Return the rows {"text", "label"} or {"text", "positive"} of a file; other keys are counted
    and printed.

    A label is text or a whole number, one of the two in all of a file.
    """
    file = Path(path)
    known = row_format(file) is not None and not file.is_dir()
    require(
        known,
        "data.sources",
        str(path),
        f"a model with a head accepts files that end in {ROW_NAMES}",
    )
    key = LABEL_KEY if kind == "classification" else POSITIVE_KEY
    rows: list[Labelled] = []
    unread: Counter[str] = Counter()
    for row in read_rows(file):
        rows.append(_labelled(row, key))
        unread.update(set(row.given) - {TEXT_KEY, key})
    notice_unread(file, unread)
    require(
        len(rows) > 0,
        "data.sources",
        str(path),
        f'expected a file of lines with "{TEXT_KEY}" and "{key}"',
    )
    kinds = {type(row.label) for row in rows}
    if len(kinds) > 1:
        raise RequestError(
            f"{file}: labels are text in some lines and numbers in others; expected one of them"
        )
    return rows


def _labelled(row: Row, key: str) -> Labelled:
    if row.columns is None:
        raise RequestError(f"{row.where}: {row.problem}")
    text, value = row.given.get(TEXT_KEY), row.given.get(key)
    number = key == LABEL_KEY and type(value) is int and 0 <= value < 1 << 31
    if not (isinstance(text, str) and text and (number or (isinstance(value, str) and value))):
        expected = f'expected a JSON object with a string "{TEXT_KEY}" and a string "{key}"'
        expected += " (or a whole number from 0)" if key == LABEL_KEY else ""
        raise RequestError(f"{row.where}: {str(row.given)[:60]!r}: {expected}")
    return (
        Labelled(row.id, text, label=value)
        if key == LABEL_KEY
        else Labelled(row.id, text, positive=value)
    )


def label_names(rows: Sequence[Labelled], num_labels: int) -> list[str]:
    """Names of labels 0, 1, ...: texts in alphabetical order, or the numbers themselves; too many
    are refused.
    """
    found = {row.label for row in rows}
    numbers = [label for label in found if isinstance(label, int)]
    needed = max(numbers) + 1 if numbers else len(found)
    require(
        needed <= num_labels,
        "model.head.num_labels",
        num_labels,
        f"expected {needed} or more, as in the data",
    )
    names = (
        [str(index) for index in range(needed)]
        if numbers
        else sorted(str(label) for label in found)
    )
    if needed < num_labels:
        notice(
            f"model.head.num_labels: got {num_labels}; the data has {needed} labels, the others "
            f"stay unused"
        )
    return names + [f"unused {index}" for index in range(needed, num_labels)]


def split_held_out(
    rows: Sequence[Labelled], fraction: float
) -> tuple[list[Labelled], list[Labelled]]:
    """(rows to train on, rows to measure with), by hash of their place, as documents are."""
    measured = [row for row in rows if held_out(row.id, fraction)]
    return [row for row in rows if not held_out(row.id, fraction)], measured


def write_labels(folder: Path, names: Sequence[str]) -> None:
    """Keep the names of the labels beside the weights."""
    write_text(folder / LABELS, json.dumps({"labels": list(names)}, indent=2))


def read_labels(folder: Path) -> list[str] | None:
    """The names of the labels, or None where nobody wrote any."""
    return read_json(folder / LABELS)["labels"] if (folder / LABELS).exists() else None


# -- rows and batches
# --------------------------------------------------------------------------------


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[list[int]]:
    """Return at most `most` ids of each text, with the tokens that its tokenizer puts before and
    after it.

    A token after the text (EOS, in few vocabularies) stays when the text is cut, because models
    that are pooled at the last token were trained with it. A notice counts the texts that are cut.
    """
    begin, end = tokenizer.begin, tokenizer.end
    rows = tokenizer.encode_batch(texts)
    for text, row in zip(texts, rows, strict=True):
        require(len(begin) + len(row) > 0, "text", text, "expected one that gives a token or more")
    room = most - len(begin) - len(end)
    require(
        room > 0,
        "max_seq_len",
        most,
        f"expected more than the {len(begin) + len(end)} tokens around a text",
    )
    cut = sum(len(row) > room for row in rows)
    if cut:
        notice(f"{cut} of {len(rows)} texts are longer than {most} tokens: their ends are left out")
    return [[*begin, *row[:room], *end] for row in rows]


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], lengths [B]): rows padded on the right with 0, which no position looks at."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens_BT = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row)] = torch.tensor(row)
    return tokens_BT, lengths


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Rows of one rank, with what a language model's `Batch` offers the trainer.

    `targets` [B] holds labels. Pairs lie in neighbouring rows, text and then positive; the text's
    target is the number of its positive, equal positives having equal numbers, and the positive's
    is NO_TARGET.
    """

    tokens: Tensor  # int64 [B, T]
    lengths: Tensor  # int64 [B]
    targets: Tensor  # int64 [B]
    epoch: int  # of the first row of the global batch
    rows_per_item: int = 1  # 2 for pairs
    weights: Tensor | None = None  # every target counts alike

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.lengths.sum())

    @property
    def row_length(self) -> int:
        """Tokens of the longest row."""
        return self.tokens.size(1)

    def inputs(self) -> TransformerInput:
        """What the model is called with."""
        return TransformerInput(self.tokens, lengths=self.lengths)

    def to(self, device: torch.device) -> LabelledBatch:
        """The same batch on another device."""
        tokens, lengths, targets = (t.to(device) for t in (self.tokens, self.lengths, self.targets))
        return replace(self, tokens=tokens, lengths=lengths, targets=targets)

    def micro_batches(self, count: int) -> Iterator[LabelledBatch]:
        """The rows in `count` equal groups; pairs stay together, and are negatives of their own
        group only.
        """
        rows = len(self.targets) // count
        for at in range(0, len(self.targets), rows):
            part = slice(at, at + rows)
            cut = replace(self, lengths=self.lengths[part], targets=self.targets[part])
            yield replace(cut, tokens=self.tokens[part, : int(cut.lengths.max())])


class LabelledBatches(ShuffledItems):
    """An endless run of batches in a random order per epoch; its state is a place in it, as that of
    `Batches`.
    """

    def __init__(
        self,
        rows: Sequence[Labelled],
        tokenizer: Tokenizer,
        *,
        labels: Sequence[str] | None,
        seq_len: int,
        rows_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`labels` are the names of `label_names`, None for pairs; `rows_per_step` counts lines of
        all ranks.
        """
        super().__init__(len(rows), rows_per_step, seed, rank, world_size)
        require(
            len(rows) >= rows_per_step,
            "data.batch_size",
            rows_per_step,
            f"expected at most {len(rows)} rows",
        )
        self._items = encode_rows(rows, tokenizer, labels, seq_len)

    def next(self) -> LabelledBatch:
        """This rank's lines of the next global batch; a batch may span the end of an epoch."""
        epoch = self._epoch
        batch = collate(
            [self._items[self._index(*self._place(ahead))] for ahead in self._rows], epoch
        )
        self._epoch, self._item = self._place(self._rows_per_step)
        return batch

    def largest(self, micro_batches: int) -> LabelledBatch:
        """Return the longest rows of the set, as many as one of a step's `micro_batches` takes."""
        longest = sorted(self._items, key=lambda item: max(map(len, item.ids)), reverse=True)
        return collate(longest[: self._micro_batch_items(micro_batches)])


class EncodedRow(NamedTuple):
    """Ids of a line's one or two texts, and its target."""

    ids: list[list[int]]
    target: int


def encode_rows(
    rows: Sequence[Labelled], tokenizer: Tokenizer, labels: Sequence[str] | None, most: int
) -> list[EncodedRow]:
    """Lines as ids of at most `most` tokens, labels as their places among `labels`, positives
    numbered.
    """
    ids = encode_texts(tokenizer, [row.text for row in rows], most)
    if labels is not None:
        place = {name: index for index, name in enumerate(labels)}
        for row in rows:
            require(
                str(row.label) in place,
                f"label of {row.id}",
                row.label,
                f"expected one of {list(labels)}",
            )
        return [
            EncodedRow([one], place[str(row.label)]) for one, row in zip(ids, rows, strict=True)
        ]
    positives = [row.positive or "" for row in rows]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(positives))}
    others = encode_texts(tokenizer, positives, most)
    return [EncodedRow([a, b], numbers[p]) for a, b, p in zip(ids, others, positives, strict=True)]


def collate(rows: Sequence[EncodedRow], epoch: int = 0) -> LabelledBatch:
    """One padded batch of lines of one kind."""
    tokens_BT, lengths = pad([ids for row in rows for ids in row.ids])
    per_item = len(rows[0].ids)
    targets = torch.full((len(rows), per_item), NO_TARGET)
    targets[:, 0] = torch.tensor([row.target for row in rows])
    return LabelledBatch(tokens_BT, lengths, targets.flatten(), epoch, per_item)

"""Labelled texts, and pairs of texts that belong together: rows of files and their batches.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from transom.base.errors import expect, notice
from transom.base.files import read_json, write_text
from transom.data.batch import NO_TARGET, Batch
from transom.data.order import ShuffledBatches
from transom.data.row_files import read_rows
from transom.data.row_kinds import Columns, RowKind, read_as, text_of
from transom.data.text.sources import TEXT_KEY, held_out
from transom.inference.embedding import encode_texts
from transom.layers.inputs import pad_rows
from transom.tokenizers.tokenizer import Tokenizer

LABEL_KEY, POSITIVE_KEY = "label", "positive"
LABELS = "labels.json"  # of a model folder: {"labels": [name, ...]}


# -- labelled text ---------------------------------------------------------------------------------


class LabelledText(NamedTuple):
    """One line of a file: a text with its label, or with another text that belongs to it.

    Attributes:
        id: The file and the number of the line.
        text: The text.
        label: The label, for classification.
        positive: The text that belongs to it, for embeddings.
    """

    id: str
    text: str
    label: int | str | None = None
    positive: str | None = None


def read_labelled(
    path: str | Path, kind: Literal["classification", "embedding"]
) -> list[LabelledText]:
    """Return the lines {"text", "label"} or {"text", "positive"} of a file of rows.

    A notice counts the other keys.

    Raises:
        RequestError: The file is missing or empty, a line is malformed, or labels are text in some
            lines and numbers in others.
    """
    file = Path(path)
    rows = list(read_as(file, read_rows(file), [HEAD_ROWS[kind]]))
    kinds = {type(row.label).__name__ for row in rows}
    expect(len(kinds) == 1, f"{file}: labels", sorted(kinds), "all texts or all numbers")
    return rows


def _labelled(row: Columns, id: str) -> LabelledText:
    text, label = text_of(row[TEXT_KEY], TEXT_KEY), row[LABEL_KEY]
    fits = (type(label) is int and 0 <= label < 1 << 31) or (isinstance(label, str) and label)
    expect(bool(fits), LABEL_KEY, label, "a text or a whole number from 0")
    return LabelledText(id, text, label)


def _pair(row: Columns, id: str) -> LabelledText:
    text, positive = (text_of(row[key], key) for key in (TEXT_KEY, POSITIVE_KEY))
    return LabelledText(id, text, positive=positive)


HEAD_ROWS = {
    "classification": RowKind("labelled text", (TEXT_KEY, LABEL_KEY), (), _labelled),
    "embedding": RowKind("pairs of texts", (TEXT_KEY, POSITIVE_KEY), (), _pair),
}


def label_names(rows: Sequence[LabelledText], num_labels: int) -> list[str]:
    """Return the names of the labels 0, 1, ...: texts in alphabetical order, or the numbers.

    Labels that the data does not have are called `unused N`, with a notice.

    Raises:
        RequestError: The data has more than `num_labels` labels.
    """
    found = {row.label for row in rows}
    numbers = [label for label in found if isinstance(label, int)]
    count = max(numbers, default=-1) + 1
    names = [str(label) for label in range(count)] if numbers else sorted(map(str, found))
    expected = f"{len(names)} or more, as in the data"
    expect(len(names) <= num_labels, "model.head.num_labels", num_labels, expected)
    unused = [f"unused {index}" for index in range(len(names), num_labels)]
    if unused:
        what = f"only {len(names)} of them are in the data"
        notice(f"model.head.num_labels: got {num_labels}; {what}")
    return names + unused


def split_held_out(
    rows: Sequence[LabelledText], fraction: float
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Return (rows to train on, held-out rows), by the hash of their ids as for documents."""
    measured = [row for row in rows if held_out(row.id, fraction)]
    return [row for row in rows if not held_out(row.id, fraction)], measured


def write_labels(folder: Path, names: Sequence[str]) -> None:
    """Write the names of the labels into a model folder."""
    write_text(folder / LABELS, json.dumps({"labels": list(names)}, indent=2))


def read_labels(folder: Path) -> list[str] | None:
    """Return the names of the labels of a model folder, or None if it has none."""
    return read_json(folder / LABELS)["labels"] if (folder / LABELS).exists() else None


# -- rows and batches ------------------------------------------------------------------------------


class LabelledBatches(ShuffledBatches):
    """Padded batches of labelled texts, or of pairs of texts, in random order."""

    def __init__(
        self,
        rows: Sequence[LabelledText],
        tokenizer: Tokenizer,
        *,
        labels: Sequence[str] | None,
        seq_len: int,
        rows_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Encode the texts and start at the first line.

        Args:
            rows: The lines.
            tokenizer: Encodes their texts.
            labels: The names of all labels, from `label_names`; None for pairs.
            seq_len: The longest text in tokens.
            rows_per_step: Lines of one optimizer step over all ranks.
            seed: Chooses the order of the lines.
            rank: This rank, from 0.
            world_size: Number of ranks.
        """
        self._items = encode_rows(rows, tokenizer, labels, seq_len)
        lengths = [max(map(len, item.ids)) for item in self._items]
        super().__init__(lengths, rows_per_step, seed, rank, world_size)

    def _batch(self, items: list[int]) -> Batch:
        return collate([self._items[item] for item in items])


class EncodedText(NamedTuple):
    """An encoded line: the ids of its one or two texts, and its target."""

    ids: list[list[int]]
    target: int


def encode_rows(
    rows: Sequence[LabelledText], tokenizer: Tokenizer, labels: Sequence[str] | None, most: int
) -> list[EncodedText]:
    """Return encoded lines.

    Args:
        rows: The lines.
        tokenizer: The tokenizer.
        labels: The names of all labels; the target is the place of the label among them. None for
            pairs, whose target is the number of the positive text, the same for equal texts.
        most: The most ids of a text.

    Raises:
        RequestError: A label is not one of `labels`, or a text can't be encoded.
    """
    ids = encode_texts(tokenizer, [row.text for row in rows], most)
    if labels is not None:
        place = {name: index for index, name in enumerate(labels)}
        expected = f"one of {list(labels)}"
        for row in rows:
            expect(str(row.label) in place, f"label of {row.id}", row.label, expected)
        targets = [place[str(row.label)] for row in rows]
        return [EncodedText([one], target) for one, target in zip(ids, targets, strict=True)]
    positives = [row.positive or "" for row in rows]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(positives))}
    others = encode_texts(tokenizer, positives, most)
    return [EncodedText([a, b], numbers[p]) for a, b, p in zip(ids, others, positives, strict=True)]


def collate(rows: Sequence[EncodedText]) -> Batch:
    """Return a padded batch of lines of one kind.

    The targets [B] of labelled texts are their labels. The two texts of a pair are neighbouring
    rows. The target of the first is the number of its positive text, which is the same for equal
    texts. The target of the positive is NO_TARGET.
    """
    tokens_BT, lengths = pad_rows([ids for row in rows for ids in row.ids])
    per_item = len(rows[0].ids)
    targets = torch.full((len(rows), per_item), NO_TARGET)
    targets[:, 0] = torch.tensor([row.target for row in rows])
    return Batch(tokens_BT, targets.flatten(), lengths=lengths, rows_per_item=per_item)

"""Texts with a label each, or in pairs that belong together: rows of files, and their batches.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json, write_text
from transom.data.batch import NO_TARGET, Batch, pad_rows
from transom.data.file_formats import ROW_NAMES, row_format
from transom.data.order import ShuffledBatches
from transom.data.row_files import DataRow, notice_unread, read_rows
from transom.data.text.sources import TEXT_KEY, held_out
from transom.inference.embedding import encode_texts
from transom.tokenizers.tokenizer import Tokenizer

LABEL_KEY, POSITIVE_KEY = "label", "positive"
LABELS = "labels.json"  # of a model folder: {"labels": [name, ...]}


# -- labelled text
# -----------------------------------------------------------------------------------


class LabelledText(NamedTuple):
    """One line of a file: a text with its label or, where the model embeds, with the text it
    belongs to.
    """

    id: str
    text: str
    label: int | str | None = None
    positive: str | None = None


def read_labelled(
    path: str | Path, kind: Literal["classification", "embedding"]
) -> list[LabelledText]:
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
    rows: list[LabelledText] = []
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


def _labelled(row: DataRow, key: str) -> LabelledText:
    if row.columns is None:
        raise RequestError(f"{row.where}: {row.problem}")
    text, value = row.given.get(TEXT_KEY), row.given.get(key)
    number = key == LABEL_KEY and type(value) is int and 0 <= value < 1 << 31
    if not (isinstance(text, str) and text and (number or (isinstance(value, str) and value))):
        expected = f'expected a JSON object with a string "{TEXT_KEY}" and a string "{key}"'
        expected += " (or a whole number from 0)" if key == LABEL_KEY else ""
        raise RequestError(f"{row.where}: {str(row.given)[:60]!r}: {expected}")
    return (
        LabelledText(row.id, text, label=value)
        if key == LABEL_KEY
        else LabelledText(row.id, text, positive=value)
    )


def label_names(rows: Sequence[LabelledText], num_labels: int) -> list[str]:
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
    rows: Sequence[LabelledText], fraction: float
) -> tuple[list[LabelledText], list[LabelledText]]:
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
    """Ids of a line's one or two texts, and its target."""

    ids: list[list[int]]
    target: int


def encode_rows(
    rows: Sequence[LabelledText], tokenizer: Tokenizer, labels: Sequence[str] | None, most: int
) -> list[EncodedText]:
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
            EncodedText([one], place[str(row.label)]) for one, row in zip(ids, rows, strict=True)
        ]
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

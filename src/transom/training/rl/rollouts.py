"""Questions of a step, and the answers drawn to them: what learning from rewards reads.

Shape letters: B rows, T tokens. A row is one answer behind its prompt; the `group` answers to one
prompt lie in neighbouring rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import RequestError, require
from transom.base.runtime import mixed_seed
from transom.chat.template import ChatTemplate
from transom.data.batches import NO_TARGET
from transom.data.chat.batches import TuningBatch, padded_batch
from transom.data.chat.conversations import Example
from transom.data.chat.rows import TuningRow, prompt_ids
from transom.data.order import ShuffledItems
from transom.inference.text import Completion
from transom.models.llm import TransformerInput
from transom.tokenizers.tokenizer import Tokenizer

ANSWERS = 3  # what seeds of answers are drawn for, beside the uses that `data.order.Stream` names


# -- questions
# ---------------------------------------------------------------------------------------


class Question(NamedTuple):
    """Ids of a prompt, and what its answer is judged by."""

    id: str
    ids: list[int]
    reference: Mapping[str, Any]


@dataclass(frozen=True)
class Questions:
    """Questions that leave room for an answer, and how many did not."""

    rows: list[Question]
    dropped: int

    def __str__(self) -> str:
        tokens = sum(len(row.ids) for row in self.rows)
        line = f"{len(self.rows):,} questions, {tokens:,} tokens"
        return f"{line}; {self.dropped:,} too long and left out" if self.dropped else line

    @property
    def hash(self) -> str:
        """SHA-256 in hex of every token and reference: data, tokenizer and template in one."""
        whole = hashlib.sha256()
        for row in self.rows:
            whole.update(np.asarray(row.ids, np.int32).tobytes())
            whole.update(json.dumps(row.reference, sort_keys=True).encode())
        return whole.hexdigest()


def encode_questions(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    seq_len: int,
    answer_tokens: int,
) -> Questions:
    """Prompts as the model is asked with; with `answer_tokens` behind them they are `seq_len`
    tokens at most.

    Longer ones are left out, since a question without its beginning or its end is another one;
    where none has room it is a `RequestError`.
    """
    room = seq_len - answer_tokens
    expected = f"expected less than data.seq_len = {seq_len}, which prompt and answer share"
    require(room >= 1, "finetune.answer_tokens", answer_tokens, expected)
    rows, dropped, shortest = [], 0, 0
    for example in examples:
        try:
            ids = prompt_ids(example, tokenizer, template)
        except RequestError as error:
            where = "" if str(error).startswith(example.id) else f"{example.id}: "
            raise RequestError(f"{where}{error}") from None
        if len(ids) > room:
            dropped += 1
            shortest = min(shortest or len(ids), len(ids))
        else:
            rows.append(Question(example.id, ids, example.reference))
    expected = (
        f"expected {shortest + answer_tokens} or more, so that one of {dropped} questions has room"
    )
    require(bool(rows) or not dropped, "data.seq_len", seq_len, expected)
    return Questions(rows, dropped)


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of one rank, and a seed for each of the `group` answers to be drawn to each of
    them.
    """

    rows: tuple[Question, ...]
    seeds: tuple[int, ...]
    group: int
    answer_tokens: int
    epoch: int  # of the first question of the global batch
    world_size: int = 1

    @property
    def answers(self) -> list[Question]:
        """The question of every answer."""
        return [row for row in self.rows for _ in range(self.group)]


class QuestionBatches(ShuffledItems):
    """An endless run of batches in a random order per epoch; its state is a place in it, as that of
    `Batches`.
    """

    def __init__(
        self,
        rows: Sequence[Question],
        *,
        group: int,
        answer_tokens: int,
        rows_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`rows_per_step` counts questions of all ranks."""
        super().__init__(len(rows), rows_per_step, seed, rank, world_size)
        expected = f"expected at most {len(rows)}, the number of questions"
        require(len(rows) >= rows_per_step, "data.batch_size", rows_per_step, expected)
        require(
            group >= 2,
            "finetune.group",
            group,
            "expected 2 or more: answers are compared with each other",
        )
        self._questions = rows
        self._group, self._answer_tokens, self._world_size = group, answer_tokens, world_size

    def next(self) -> QuestionBatch:
        """This rank's questions of the next global batch; a batch may span the end of an epoch."""
        epoch = self._epoch
        places = [self._place(ahead) for ahead in self._rows]
        rows = tuple(self._questions[self._index(*place)] for place in places)
        seeds = tuple(
            answer_seed(self._seed, *place, index)
            for place in places
            for index in range(self._group)
        )
        self._epoch, self._item = self._place(self._rows_per_step)
        return QuestionBatch(rows, seeds, self._group, self._answer_tokens, epoch, self._world_size)

    def largest(self, micro_batches: int) -> RolloutBatch:
        """Return the longest questions with answers of full length, as many as one of
        `micro_batches` takes.
        """
        longest = sorted(self._questions, key=lambda row: len(row.ids), reverse=True)
        chosen = longest[: self._micro_batch_items(micro_batches)]
        weights = np.ones(self._answer_tokens, np.float32)
        items = []
        for row in chosen:
            ids = np.asarray([*row.ids, *[0] * self._answer_tokens], np.int32)
            known = np.zeros(len(row.ids), np.float32)
            items.append([TuningRow(row.id, ids, np.concatenate([known, weights]))] * self._group)
        rows = padded_batch(items)
        count = len(rows.tokens)
        nothing = torch.zeros(count)
        drawn = torch.zeros(rows.tokens.shape)
        return RolloutBatch(rows, nothing, nothing, nothing.bool(), drawn, count * self._world_size)


def answer_seed(seed: int, epoch: int, item: int, index: int) -> int:
    """Return the seed of answer `index` to item `item` of an epoch, which depends on nothing
    else.
    """
    return mixed_seed(seed, ANSWERS, epoch, item, index)


# -- answers
# -----------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """An answer, and the log-probability in nats that each of its tokens had when it was drawn."""

    completion: Completion
    log_probs: list[float]


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Answers behind their prompts, with what a language model's `Batch` offers the trainer; groups
    stay together.

    Tokens of an answer are targets, the one that ends it too.
    """

    rows: TuningBatch
    advantages: Tensor  # float32 [B]
    rewards: Tensor  # float32 [B]
    cut: Tensor  # bool [B]: whether an answer was ended by its length
    # float32 [B, T], log-probability of each target as it was drawn, 0 where there is none
    drawn: Tensor
    whole_rows: int  # of the step, all ranks and micro-batches together

    @classmethod
    def of(
        cls, batch: QuestionBatch, drawn: Sequence[Drawn], rewards_B: Tensor, advantages_B: Tensor
    ) -> RolloutBatch:
        """The answers to a batch of questions, `group` to each of them in order."""
        rows = [_row(row, one) for row, one in zip(batch.answers, drawn, strict=True)]
        items = [rows[at : at + batch.group] for at in range(0, len(rows), batch.group)]
        padded = padded_batch(items, batch.epoch)
        known = torch.tensor([value for one in drawn for value in one.log_probs])
        drawn_BT = torch.zeros(padded.tokens.shape).masked_scatter(
            padded.targets != NO_TARGET, known
        )
        cut_B = torch.tensor([one.completion.finish_reason == "length" for one in drawn])
        return cls(padded, advantages_B, rewards_B, cut_B, drawn_BT, len(rows) * batch.world_size)

    @property
    def tokens(self) -> Tensor:
        """Ids [B, T], padded on the right."""
        return self.rows.tokens

    @property
    def targets(self) -> Tensor:
        """The next token [B, T] where it is one of the answer, else NO_TARGET."""
        return self.rows.targets

    @property
    def weights(self) -> Tensor | None:
        """Every token of an answer counts alike."""
        return None

    @property
    def group(self) -> int:
        """Answers to each question."""
        return self.rows.rows_per_item

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.rows.real_tokens

    @property
    def row_length(self) -> int:
        """Tokens of the longest row."""
        return self.rows.row_length

    def inputs(self) -> TransformerInput:
        """What the model is called with."""
        return self.rows.inputs()

    def to(self, device: torch.device) -> RolloutBatch:
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("advantages", "rewards", "cut", "drawn")
        }
        return replace(self, rows=self.rows.to(device), **moved)

    def micro_batches(self, count: int) -> Iterator[RolloutBatch]:
        """The rows in `count` equal parts, each of whole groups."""
        size = len(self.advantages) // count
        for at, rows in zip(
            range(0, len(self.advantages), size), self.rows.micro_batches(count), strict=True
        ):
            part = slice(at, at + size)
            yield replace(
                self,
                rows=rows,
                advantages=self.advantages[part],
                rewards=self.rewards[part],
                cut=self.cut[part],
                drawn=self.drawn[part, : rows.tokens.size(1)],
            )


def _row(question: Question, drawn: Drawn) -> TuningRow:
    ids = np.asarray([*question.ids, *drawn.completion.tokens], np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[len(question.ids) :] = 1.0
    return TuningRow(question.id, ids, weights)

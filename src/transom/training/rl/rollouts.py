"""Questions of a step, and the answers drawn to them: what learning from rewards reads.

Shape letters: B rows, T tokens. A row is one answer behind its prompt; the `group` answers to one
prompt lie in neighbouring rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import RequestError, require
from transom.base.runtime import mixed_seed
from transom.chat.template import ChatTemplate
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.batches import padded_batch
from transom.data.chat.conversations import ChatExample
from transom.data.chat.rows import prompt_ids
from transom.data.chat.turns import EncodedChat
from transom.data.order import ShuffledBatches
from transom.inference.text import Completion
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
    examples: Iterable[ChatExample],
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
    world_size: int = 1

    @property
    def answers(self) -> list[Question]:
        """The question of every answer."""
        return [row for row in self.rows for _ in range(self.group)]


class QuestionBatches(ShuffledBatches):
    """Batches of questions in random order, for GRPO."""

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
        """Start at the first question.

        Args:
            rows: The questions.
            group: Answers to sample for each question.
            answer_tokens: The longest answer in tokens.
            rows_per_step: Questions of one optimizer step over all ranks.
            seed: Chooses the order of the questions and the seeds of the answers.
            rank: This rank, from 0.
            world_size: Number of ranks.
        """
        lengths = [len(row.ids) for row in rows]
        super().__init__(lengths, rows_per_step, seed, rank, world_size, "questions")
        expected = "expected 2 or more: answers are compared with each other"
        require(group >= 2, "finetune.group", group, expected)
        self._questions = rows
        self._group, self._answer_tokens, self._world_size = group, answer_tokens, world_size

    def _load(self, places: Sequence[tuple[int, int]]) -> QuestionBatch:
        rows = tuple(self._questions[self._index(*place)] for place in places)
        group = range(self._group)
        seeds = tuple(answer_seed(self._seed, *place, at) for place in places for at in group)
        return QuestionBatch(rows, seeds, self._group, self._answer_tokens, self._world_size)

    def _batch(self, items: list[int]) -> Batch:
        """Return a batch of these questions with answers of the full length, for a dry run."""
        answer = Completion("", [0] * self._answer_tokens, "length")
        drawn = Drawn(answer, [0.0] * self._answer_tokens)
        rows = tuple(self._questions[item] for item in items)
        batch = QuestionBatch(rows, (), self._group, self._answer_tokens, self._world_size)
        zeros_B = torch.zeros(len(batch.answers))
        return rollout_batch(batch, [drawn] * len(batch.answers), zeros_B, zeros_B)


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


def rollout_batch(
    batch: QuestionBatch, drawn: Sequence[Drawn], rewards_B: Tensor, advantages_B: Tensor
) -> Batch:
    """Return a batch of sampled answers after their prompts; the answers to a question are
    neighbours.

    The targets are the tokens of the answers, including the tokens that end them. `extras` has:

    - `advantages` and `rewards`, float32 [B]
    - `cut`, bool [B]: whether the answer ended because of its length
    - `drawn`, float32 [B, T]: the log-probability of each target when it was sampled, 0 elsewhere

    Args:
        batch: The questions.
        drawn: The answers, `batch.group` to each question in order.
        rewards_B: Their rewards, float32 [B].
        advantages_B: Their advantages, float32 [B].
    """
    rows = [_row(row, one) for row, one in zip(batch.answers, drawn, strict=True)]
    padded = padded_batch([rows[at : at + batch.group] for at in range(0, len(rows), batch.group)])
    known = torch.tensor([value for one in drawn for value in one.log_probs])
    has_target_BT = padded.targets != NO_TARGET
    extras = {
        "advantages": advantages_B,
        "rewards": rewards_B,
        "cut": torch.tensor([one.completion.finish_reason == "length" for one in drawn]),
        "drawn": torch.zeros(padded.tokens.shape).masked_scatter(has_target_BT, known),
    }
    return replace(padded, extras=extras)


def _row(question: Question, drawn: Drawn) -> EncodedChat:
    ids = np.asarray([*question.ids, *drawn.completion.tokens], np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[len(question.ids) :] = 1.0
    return EncodedChat(question.id, ids, weights)

"""The questions of a step, and the batch of their sampled answers.

Shape letters: B rows, T tokens. A row is one answer after its prompt. The `group` answers to one
question are neighbours.
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

from transom.base.errors import Problem, RequestError, expect
from transom.base.runtime import mixed_seed
from transom.chat.template import ChatTemplate
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.batches import padded_batch
from transom.data.chat.conversations import ChatExample
from transom.data.chat.rows import prompt_ids
from transom.data.chat.turns import EncodedChat
from transom.data.order import ShuffledBatches
from transom.inference.text import Completion
from transom.planning.tables import counted
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.rl.rewards import Reward

ANSWERS = 3  # the use of the seeds of answers, beside those of `data.order.Stream`


# -- questions -------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A question: the ids of its prompt, and the reference that judges its answers."""

    id: str
    ids: list[int]
    reference: Mapping[str, Any]


@dataclass(frozen=True)
class Questions:
    """Questions that leave room for an answer, and the number of those that do not."""

    rows: list[Question]
    dropped: int

    def __str__(self) -> str:
        tokens = sum(len(row.ids) for row in self.rows)
        dropped = f"; {self.dropped:,} too long and left out" if self.dropped else ""
        return f"{counted(len(self.rows), 'question')}, {counted(tokens, 'token')}{dropped}"

    @property
    def hash(self) -> str:
        """SHA-256 of all tokens and references, which depend on data, tokenizer and template."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.asarray(row.ids, np.int32).tobytes())
            digest.update(json.dumps(row.reference, sort_keys=True).encode())
        return digest.hexdigest()


def encode_questions(
    examples: Iterable[ChatExample],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    seq_len: int,
    answer_tokens: int,
    reward: Reward | None = None,
    problems: list[Problem] | None = None,
) -> Questions:
    """Encode the prompts of examples. Those that leave no room for an answer are left out.

    Args:
        examples: The examples.
        tokenizer: The tokenizer.
        template: The chat template, if an example needs one.
        seq_len: Tokens of a prompt and its answer together.
        answer_tokens: Tokens of the longest answer.
        reward: Has to be able to judge the answers to each question, if it is given.
        problems: Receives the examples that can't be used. If it is None, the first of them raises
            an error, and so does a set without a question that leaves room for an answer.

    Raises:
        RequestError: An example cannot be encoded or judged, or no prompt leaves room.
    """
    room = seq_len - answer_tokens
    expected = f"less than data.seq_len = {seq_len}, which prompt and answer share"
    expect(room >= 1, "finetune.answer_tokens", answer_tokens, expected)
    rows, too_long = [], []
    for example in examples:
        try:
            ids = prompt_ids(example, tokenizer, template)
            if reward is not None:
                reward.check(example.reference, example.id)
        except RequestError as error:
            problem = Problem(example.id, str(error).removeprefix(f"{example.id}: "))
            if problems is None:
                raise RequestError(": ".join(problem)) from None
            problems.append(problem)
            continue
        if len(ids) > room:
            too_long.append(len(ids))
        else:
            rows.append(Question(example.id, ids, example.reference))
    if too_long and not rows and problems is None:
        least = min(too_long) + answer_tokens
        expected = f"{least} or more, so that one of {len(too_long)} questions has room"
        expect(False, "data.seq_len", seq_len, expected)
    return Questions(rows, len(too_long))


@dataclass(frozen=True)
class QuestionBatch:
    """The questions of one rank for one step, before their answers are sampled.

    Attributes:
        rows: The questions.
        seeds: A seed for each answer: `group` seeds for the first question, and so on.
        group: Answers to each question.
    """

    rows: tuple[Question, ...]
    seeds: tuple[int, ...]
    group: int

    @property
    def answers(self) -> list[Question]:
        """The question of each answer."""
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
        self._questions = rows
        self._group, self._answer_tokens = group, answer_tokens

    def _load(self, places: Sequence[tuple[int, int]]) -> QuestionBatch:
        rows = tuple(self._questions[self._index(*place)] for place in places)
        group = range(self._group)
        seeds = tuple(answer_seed(self._seed, *place, at) for place in places for at in group)
        return QuestionBatch(rows, seeds, self._group)

    def _batch(self, items: list[int]) -> Batch:
        """Return a batch of these questions with answers of the full length, for a dry run."""
        rows = tuple(self._questions[item] for item in items)
        batch = QuestionBatch(rows, (), self._group)
        ids = [0] * self._answer_tokens
        answer = SampledAnswer(Completion("", ids, "length"), [0.0] * len(ids))
        zeros_B = torch.zeros(len(batch.answers))
        return rollout_batch(batch, [answer] * len(batch.answers), zeros_B, zeros_B)


def answer_seed(seed: int, epoch: int, item: int, index: int) -> int:
    """Return the seed of answer `index` to item `item` of an epoch."""
    return mixed_seed(seed, ANSWERS, epoch, item, index)


# -- answers ---------------------------------------------------------------------------------------


class SampledAnswer(NamedTuple):
    """An answer, and the log-probability in nats with which each of its tokens was sampled."""

    completion: Completion
    log_probs: list[float]


def rollout_batch(
    batch: QuestionBatch,
    answers: Sequence[SampledAnswer],
    rewards_B: Tensor,
    advantages_B: Tensor,
) -> Batch:
    """Return a batch of answers after their prompts; the answers to one question are neighbours.

    The targets are the tokens of the answers, including the tokens that end them. `extras` has:

    - `advantages` and `rewards`, float32 [B]
    - `cut`, bool [B]: whether the answer ended because of its length
    - `sampled`, float32 [B, T]: the log-probability of each target when it was sampled, 0 elsewhere

    Args:
        batch: The questions.
        answers: The answers, `batch.group` to each question in order.
        rewards_B: Their rewards, float32 [B].
        advantages_B: Their advantages, float32 [B].
    """
    rows = [_row(row, one) for row, one in zip(batch.answers, answers, strict=True)]
    padded = padded_batch([rows[at : at + batch.group] for at in range(0, len(rows), batch.group)])
    log_probs = torch.tensor([value for one in answers for value in one.log_probs])
    has_target_BT = padded.targets != NO_TARGET
    extras = {
        "advantages": advantages_B,
        "rewards": rewards_B,
        "cut": torch.tensor([one.completion.finish_reason == "length" for one in answers]),
        "sampled": torch.zeros(padded.tokens.shape).masked_scatter(has_target_BT, log_probs),
    }
    return replace(padded, extras=extras)


def _row(question: Question, answer: SampledAnswer) -> EncodedChat:
    ids = np.asarray([*question.ids, *answer.completion.tokens], np.int32)
    weights = (np.arange(len(ids)) >= len(question.ids)).astype(np.float32)
    return EncodedChat(question.id, ids, weights)

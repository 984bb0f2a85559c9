"""The rows of a fine-tuning run: read, written by the chat template, split, counted, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transom.base.errors import notice, require
from transom.chat.template import ChatTemplate
from transom.checkpoints.files.generation_config import stop_tokens_of
from transom.data.batch import Batch
from transom.data.chat.batches import ChatBatches, padded_batch
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import read_splits
from transom.data.chat.rows import EncodedChats, encode_examples, template_for
from transom.data.order import Batches
from transom.data.text.sources import require_whole
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.defaults import RowChoice, finetune_rows, require_comparable
from transom.training.finetune.args import FinetuneArgs, require_kinds
from transom.training.loop.ranks import Ranks
from transom.training.loop.run_data import NOTHING_HELD_OUT, TOKENS, RunData
from transom.training.rl.rewards import Reward, open_reward
from transom.training.rl.rollouts import QuestionBatches, encode_questions

BATCH_TOKENS = 8192  # of a batch of held-out rows, padding included


@dataclass(frozen=True)
class FinetuneData:
    """The batches of a run, the choice of their size, its held-out batches, rows and chat
    template.
    """

    batches: Batches
    choice: RowChoice
    hashes: dict[str, str]
    template: ChatTemplate | None
    train: EncodedChats | None = None  # None for questions
    held_out: Sequence[Any] = ()  # batches, or questions
    reward: Reward | None = None  # of answers to questions
    stop_tokens: tuple[int, ...] = ()  # that end an answer

    def as_run_data(self, base_fingerprint: str) -> RunData:
        """For the trainer; a base that has changed is data that has changed."""
        hashes = {**self.hashes, "the base": base_fingerprint}
        size = self.choice.batch_size
        return RunData(
            self.batches,
            hashes,
            size,
            self.held_out,
            template=self.template,
            stop_tokens=self.stop_tokens,
        )


def open_finetune_data(
    args: TrainArgs,
    finetune: FinetuneArgs,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    base: Path,
    ranks: Ranks,
) -> FinetuneData:
    """Rows of every source, their counts said; what cannot be learnt from in this way is a
    `RequestError`.
    """
    train, measured, hashes = read_all(args, finetune)
    template = template_for([*train, *measured], tokenizer, template)
    if finetune.objective == "grpo":
        data = _questions(args, finetune, train, measured, tokenizer, template, base, ranks)
        return replace(data, hashes={**hashes, **data.hashes})
    ends = stop_tokens_of(base, tokenizer, template)
    encode = partial(
        encode_examples,
        tokenizer=tokenizer,
        template=template,
        seq_len=args.data.seq_len + 1,  # the last token of a row is a target only
        train_on=finetune.train_on,
        truncate=finetune.truncate,
        stop_tokens=ends,
    )
    rows = encode(train)
    held = encode(measured, may_be_empty=True) if measured else None
    if held is not None and not held.items:
        notice(f"held out: {held.counts}; no token with loss is left, so there is no score")
        held = None
    if held is not None and finetune.objective == "kto" and len(held.items) == 1:
        notice("held out: 1 example; kto has no other one to compare it with, so there is no score")
        held = None
    lengths = [max(len(row.ids) for row in item) - 1 for item in rows.items]
    choice = finetune_rows(lengths, args, finetune, ranks.world_size)
    if finetune.packing and not choice.packing and ranks.verbose:
        notice(
            f"finetune.packing: got true; rows of {finetune.objective} are padded, because each "
            "answer is a row of its own"
        )
    require_comparable(choice, finetune.objective, ranks.world_size)
    batches = ChatBatches(
        rows,
        seq_len=args.data.seq_len,
        rows_per_step=choice.batch_size,
        seed=args.seed,
        packing=choice.packing,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    if ranks.verbose:
        fill = (
            ""
            if batches.fill is None
            else f"; packed into {batches.items_per_epoch:,} rows, {batches.fill:.0%} full"
        )
        notice(f"training set: {rows.counts}{fill}")
        notice(f"held out: {held.counts}" if held else NOTHING_HELD_OUT)
        if rows.counts.without_end:
            notice(
                f"{rows.counts.without_end} answers do not teach where to stop: `transom data "
                f"check` names reasons"
            )
    hashes = {**hashes, TOKENS: _hash(rows, held)}
    kept = list(held_batches(held)) if held else []
    return FinetuneData(batches, choice, hashes, template, rows, kept, stop_tokens=ends)


def _questions(
    args: TrainArgs,
    finetune: FinetuneArgs,
    train: list[ChatExample],
    measured: list[ChatExample],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    base: Path,
    ranks: Ranks,
) -> FinetuneData:
    """Questions with a known answer, and what judges the answers that are drawn to them."""
    reward = open_reward(finetune.reward)
    asked, held = (
        encode_questions(
            examples,
            tokenizer,
            template,
            seq_len=args.data.seq_len,
            answer_tokens=finetune.answer_tokens,
        )
        for examples in (train, measured)
    )
    reward.check((row.id, row.reference) for row in (*asked.rows, *held.rows))
    choice = finetune_rows([len(row.ids) for row in asked.rows], args, finetune, ranks.world_size)
    if ranks.verbose:
        notice(f"to learn from: {asked}; held out: {held}")
    batches = QuestionBatches(
        asked.rows,
        group=finetune.group,
        answer_tokens=finetune.answer_tokens,
        rows_per_step=choice.batch_size,
        seed=args.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return FinetuneData(
        batches,
        choice,
        {TOKENS: asked.hash + held.hash, "the reward": reward.hash},
        template,
        held_out=held.rows,
        reward=reward,
        stop_tokens=stop_tokens_of(base, tokenizer, template),
    )


def read_all(
    args: TrainArgs, finetune: FinetuneArgs
) -> tuple[list[ChatExample], list[ChatExample], dict[str, str]]:
    """Return examples to train on and to measure with, and a hash of each source."""
    train: list[ChatExample] = []
    measured: list[ChatExample] = []
    hashes: dict[str, str] = {}
    paths = [source.path for source in args.data.source_list]
    require(len(set(paths)) == len(paths), "data.sources", paths, "expected every set once")
    for source in args.data.source_list:
        require_whole(source, "fine-tuning")
        one, other = read_splits(source.path, args.data.held_out)
        train, measured = train + one, measured + other
        hashes[source.label] = _hash_examples(one, other)
    require_kinds((*train, *measured), finetune.objective)
    return train, measured, hashes


def _hash_examples(*parts: Sequence[ChatExample]) -> str:
    """Return the SHA-256 in hex of examples as they were read."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        for example in part:
            whole.update(repr(example).encode(errors="surrogatepass"))
    return whole.hexdigest()


def held_batches(rows: EncodedChats) -> Iterator[Batch]:
    """All rows, padded, those of like length together; pairs stay pairs."""
    for group in groups_of(rows):
        yield _padded(rows, group)


def groups_of(rows: EncodedChats) -> list[list[int]]:
    """Items of like length, as many as fit into a batch; never one alone, which kto could not
    mismatch.
    """
    groups: list[list[int]] = []
    for at in sorted(
        range(len(rows.items)), key=lambda at: max(len(row.ids) for row in rows.items[at])
    ):
        longest = max(len(row.ids) for row in rows.items[at])
        full = groups and (len(groups[-1]) + 1) * rows.rows_per_item * longest > BATCH_TOKENS
        if not groups or (full and len(groups[-1]) > 1):
            groups.append([])
        groups[-1].append(at)
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2] += groups.pop()
    return groups


def _padded(rows: EncodedChats, chosen: Sequence[int]) -> Batch:
    labels = [] if rows.labels is None else [rows.labels[at] for at in chosen]
    return padded_batch([rows.items[at] for at in chosen], labels=labels)


def _hash(*parts: EncodedChats | None) -> str:
    """SHA-256 in hex of every token and what it counts: data, tokenizer and template in one."""
    whole = hashlib.sha256()
    for rows in parts:
        for item in () if rows is None else rows.items:
            for row in item:
                whole.update(row.ids.tobytes())
                whole.update(row.weights.tobytes())
                whole.update(len(row.ids).to_bytes(8, "little"))
        if rows is not None and rows.labels is not None:
            whole.update(bytes(rows.labels))
    return whole.hexdigest()

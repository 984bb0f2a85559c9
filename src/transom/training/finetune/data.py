"""The data of a fine-tuning run: examples, their rows, and batches to train on and to measure
with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transom.base.errors import Problem, expect, notice
from transom.chat.template import ChatTemplate
from transom.checkpoints.files.generation_config import stop_tokens_of
from transom.checkpoints.files.location import ModelLocation
from transom.data.batch import Batch
from transom.data.chat.batches import ChatBatches, padded_batch
from transom.data.chat.finetune_sets import Examples, split_examples
from transom.data.chat.rows import ChatEncoder, EncodedChats, template_for
from transom.data.chat.shards import prepare_chats
from transom.data.text.sources import require_whole
from transom.distributed.ranks import Ranks
from transom.layers.inputs import batches_by_length
from transom.planning.tables import counted
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.defaults import RowChoice, choose_rows
from transom.training.finetune.args import require_kinds
from transom.training.loop.run_data import NOTHING_HELD_OUT, TOKENS, RunData
from transom.training.rl.rewards import Reward, open_reward
from transom.training.rl.rollouts import QuestionBatches, Questions, encode_questions

BATCH_TOKENS = 8192  # of a batch of held-out rows, padding included


@dataclass(frozen=True, kw_only=True)
class FinetuneData(RunData):
    """The data of a fine-tuning run.

    Attributes:
        choice: How the rows are laid into steps.
        train: The rows to train on; None for questions.
        reward: Judges the answers to questions.
    """

    choice: RowChoice
    train: EncodedChats | None = None
    reward: Reward | None = None


def open_finetune_data(
    args: TrainArgs,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    base: Path,
    ranks: Ranks,
    base_fingerprint: str = "",
) -> FinetuneData:
    """Open the data of a fine-tuning run and print what it consists of.

    Args:
        args: The config of the run.
        tokenizer: The tokenizer of the base, with the new tokens of the run.
        template: The chat template; None is the default one if an example needs one.
        base: The folder of the base.
        ranks: The ranks of the run.
        base_fingerprint: The hash of the weights of the base. A run can't be resumed on another
            base.

    Raises:
        RequestError: The objective of the run can't learn from these examples.
    """
    objective = args.finetune_settings.objective
    train, measured, hashes = find_all(args)
    hashes["the base"] = base_fingerprint
    encoder = chat_encoder(args, (*train, *measured), tokenizer, template, base)
    if objective == "grpo":
        return _questions(args, train, measured, encoder, ranks, hashes)
    progress = ranks.verbose
    with ranks.notices_of_first():
        rows = prepare_chats(train, encoder, args.data.cache_dir, progress=progress)
        rows.check()
        held = prepare_chats(measured, encoder, args.data.cache_dir, progress=progress)
    if any(measured) and not held.items:
        notice(f"held out: {held}; no token with loss is left, so there is no score")
    if objective == "kto" and len(held.items) == 1:
        notice("held out: 1 example; kto has no other one to compare it with, so there is no score")
        held = EncodedChats([])
    choice = choose_rows(rows.lengths, args, ranks.row_ranks)
    if args.finetune_settings.packing and not choice.packing:
        ranks.say(
            f"finetune.packing: got true; rows of {objective} are padded, because each "
            "answer is a row of its own"
        )
    packed = f"; packed into {counted(choice.rows, 'row')}, {choice.fill:.0%} full"
    ranks.say(f"training set: {rows}{packed if choice.packing else ''}")
    ranks.say(f"held out: {held}" if held.items else NOTHING_HELD_OUT)
    if endless := rows.counts["without_end"]:
        reasons = "`transom data check` names reasons"
        ranks.say(f"{endless} answers do not teach where to stop: {reasons}")
    batches = ChatBatches(
        rows,
        packs=choice.packs,
        rows_per_step=choice.batch_size,
        seed=args.seed,
        rank=ranks.row_rank,
        world_size=ranks.row_ranks,
    )
    return FinetuneData(
        batches,
        {**hashes, TOKENS: _hash(rows, held)},
        choice.batch_size,
        template=encoder.template,
        stop_tokens=encoder.stop_tokens,
        choice=choice,
        train=rows,
        held_out=held_batches(held),
    )


def chat_encoder(
    args: TrainArgs,
    examples: Iterable[Examples],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    base: Path | ModelLocation,
) -> ChatEncoder:
    """Return the encoder of a run. The last token of a row is a target only.

    Without a template it uses the default one if an example needs one.
    """
    finetune, size = args.finetune_settings, args.data.seq_len + 1
    template = template_for(examples, tokenizer, template)
    ends = tuple(stop_tokens_of(base, tokenizer, template))
    return ChatEncoder(tokenizer, template, size, finetune.train_on, finetune.truncate, ends)


def _questions(
    args: TrainArgs,
    train: Sequence[Examples],
    measured: Sequence[Examples],
    encoder: ChatEncoder,
    ranks: Ranks,
    hashes: dict[str, str],
) -> FinetuneData:
    """Return the data of a run that learns from rewards: questions, and what judges the answers."""
    finetune = args.finetune_settings
    reward = open_reward(finetune.reward)
    asked, held = (questions_of(examples, args, encoder, reward) for examples in (train, measured))
    choice = choose_rows([len(row.ids) for row in asked.rows], args, ranks.row_ranks)
    ranks.say(f"training set: {asked}; held out: {held}")
    batches = QuestionBatches(
        asked.rows,
        group=finetune.group,
        answer_tokens=finetune.answer_tokens,
        rows_per_step=choice.batch_size,
        seed=args.seed,
        rank=ranks.row_rank,
        world_size=ranks.row_ranks,
    )
    return FinetuneData(
        batches,
        {**hashes, TOKENS: asked.hash + held.hash, "the reward": reward.hash},
        choice.batch_size,
        template=encoder.template,
        stop_tokens=encoder.stop_tokens,
        choice=choice,
        held_out=held.rows,
        reward=reward,
    )


def questions_of(
    parts: Iterable[Examples],
    args: TrainArgs,
    encoder: ChatEncoder,
    reward: Reward,
    problems: list[Problem] | None = None,
) -> Questions:
    """Return the questions of a run in some examples, see `encode_questions`."""
    return encode_questions(
        chain(*parts),
        encoder.tokenizer,
        encoder.template,
        seq_len=args.data.seq_len,
        answer_tokens=args.finetune_settings.answer_tokens,
        reward=reward,
        problems=problems,
    )


def find_all(args: TrainArgs) -> tuple[list[Examples], list[Examples], dict[str, str]]:
    """Return examples to train on and to measure with, and a hash of each source."""
    train: list[Examples] = []
    measured: list[Examples] = []
    hashes: dict[str, str] = {}
    paths = [source.path for source in args.data.source_list]
    expect(len(set(paths)) == len(paths), "data.sources", paths, "every set once")
    for source in args.data.source_list:
        require_whole(source, "fine-tuning")
        parts = split_examples(source.path, args.data.held_out)
        train.append(parts[0])
        measured.append(parts[1])
        hashes[source.label] = hashlib.sha256("".join(p.sha256 for p in parts).encode()).hexdigest()
    for part in (*train, *measured):
        require_kinds(part.kinds, args.finetune_settings.objective)
    return train, measured, hashes


def held_batches(rows: EncodedChats) -> list[Batch]:
    """Return all rows in padded batches of similar length. The rows of a pair stay together.

    No batch has a single item, unless there is no other one, because kto compares items, and ranks
    share the batches.
    """
    lengths, tokens = (rows.lengths + 1).tolist(), BATCH_TOKENS // rows.rows_per_item
    groups = batches_by_length(lengths, tokens, fewest=2)
    return [padded_batch([rows.items[at] for at in group]) for group in groups]


def _hash(*parts: EncodedChats) -> str:
    """Return the SHA-256 in hex of all tokens, weights and labels."""
    digest = hashlib.sha256()
    for rows in parts:
        for row in chain(*rows.items):
            digest.update(row.ids.tobytes() + row.weights.tobytes())
            digest.update(len(row.ids).to_bytes(8, "little"))
        digest.update(bytes(row.label for row in chain(*rows.items) if row.label is not None))
    return digest.hexdigest()

"""A data set as a fine-tuning run would train on it: counts of its rows, and what can't be used.

It is opened with the tokenizer, the chat template and the settings of a model; no weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import Problem, expect, notice
from transom.checkpoints.files.layout import is_model
from transom.checkpoints.files.location import find_model
from transom.checkpoints.open_model import open_text
from transom.checkpoints.read_args import lacks_vocabulary, read_args
from transom.data.chat.conversations import ExampleKind
from transom.data.chat.finetune_sets import Examples, find_examples, split_examples
from transom.data.chat.rows import COUNTS, ChatEncoder
from transom.data.chat.shards import prepare_chats
from transom.training.config import TrainArgs
from transom.training.defaults import choose_rows
from transom.training.finetune.args import FinetuneArgs, objectives_of, require_kinds
from transom.training.finetune.config import finetune_args
from transom.training.finetune.data import chat_encoder, questions_of
from transom.training.rl.rewards import open_reward

SEQ_LEN = 4096  # tokens of the longest row for a tokenizer without a model


@dataclass(frozen=True)
class FinetuneSet:
    """A data set and how a fine-tuning run would encode it.

    Attributes:
        args: The config of the run, except what depends on the number of rows.
        model: The model or its location, for messages.
        train: The examples to train on.
        measured: The held-out examples.
        encoder: The tokenizer, the chat template and the settings.
        problems: The malformed rows, if they are collected.
    """

    args: TrainArgs
    model: str
    train: Examples
    measured: Examples
    encoder: ChatEncoder
    problems: list[Problem]


def open_finetune_set(
    model: str,
    data: str,
    overrides: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    *,
    split: str = "train",
    revision: str | None = None,
    collect: bool = True,
) -> FinetuneSet:
    """Read a data set with the config that `finetune_args` makes of the same arguments.

    If the default objective can't learn from the rows, the first one that can is taken, with a
    notice.

    Args:
        model: Folder or hub id of a model, or of a tokenizer without a model.
        data: File, folder or name of the data set.
        overrides: Words such as `finetune.method=full`.
        config: Fields as in config.yaml.
        split: `train`, `valid` or `test`. Only `train` is split into two parts.
        revision: Branch, tag or commit of a hub id.
        collect: Whether malformed rows are collected. Otherwise the first one raises an error.

    Raises:
        RequestError: There is no such model or data, or the config is wrong.
    """
    location = find_model(model, revision, settings_only=True)
    if lacks_vocabulary(location.model):
        location = find_model(model, revision)
    if not is_model(location.model):
        if not any(word.startswith("data.seq_len=") for word in overrides):
            notice(f"{location}: a tokenizer without a model; rows have at most {SEQ_LEN} tokens")
        overrides = [f"data.seq_len={SEQ_LEN}", *overrides]
    args = finetune_args(model, [data], overrides, config, location)
    problems: list[Problem] = []
    found = problems if collect else None
    if split == "train":
        train, measured = split_examples(data, args.data.held_out, found)
    else:
        train, measured = find_examples(data, split, found), Examples(data)
    kinds = {**measured.kinds, **train.kinds}
    kind: ExampleKind = next(iter(kinds), "chat")
    fitting = objectives_of(kind)
    is_default = args.finetune_settings.objective == FinetuneArgs.objective
    if is_default and FinetuneArgs.objective != fitting[0]:
        notice(f"rows of kind {kind}: checked for `transom finetune --objective {fitting[0]}`")
        words = [*overrides, f"finetune.objective={fitting[0]}"]
        args = finetune_args(model, [data], words, config, location)
    finetune = args.finetune_settings
    require_kinds(kinds, finetune.objective)
    if is_model(location.model):
        most = read_args(location.model).max_seq_len
        expected = f"at most {most}, the model's max_seq_len"
        expect(args.data.seq_len <= most, "data.seq_len", args.data.seq_len, expected)
    else:
        expect(args.data.seq_len >= 2, "data.seq_len", args.data.seq_len, "2 or more")
    text = open_text(location, chat_template=finetune.template)
    tokenizer = text.tokenizer
    if finetune.new_tokens:
        tokenizer = tokenizer.with_special(finetune.new_tokens)
    encoder = chat_encoder(args, (train, measured), tokenizer, text.template, location)
    return FinetuneSet(args, str(location), train, measured, encoder, problems)


def check_rows(data: FinetuneSet) -> dict[str, Any]:
    """Encode a data set and return counts of its rows, and the steps they make on one device.

    Examples that can't be encoded are added to `data.problems`.
    """
    asks = list({**data.train.kinds, **data.measured.kinds}) == ["answer"]
    counts, lengths = _count_prompts(data) if asks else _count_rows(data)
    more = {"held_out": len(data.measured), "malformed_rows": len(data.problems)}
    if not len(lengths):
        return {**counts, **more}
    choice = choose_rows(lengths, data.args)
    steps: dict[str, Any] = {"packing": choice.packing}
    if choice.packing:
        steps |= {"packed_rows": choice.rows, "fill": round(choice.fill, 4)}
    return {**counts, **more, **steps, "rows_per_step": choice.batch_size, "steps": choice.steps}


def _count_rows(data: FinetuneSet) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Return counts of the rows to train on, and the tokens of each."""
    cache, problems = data.args.data.cache_dir, data.problems
    encoded = prepare_chats([data.train], data.encoder, cache, problems=problems)
    prepare_chats([data.measured], data.encoder, cache, problems=problems)
    rows = [row.ids for item in encoded.items for row in item]
    bos = data.encoder.tokenizer.bos_id
    longest = {
        "longest": max(map(len, rows), default=0),
        "with_bos": sum(bos is not None and int(row[0]) == bos for row in rows),
    }
    return {**{name: encoded.counts[name] for name in COUNTS}, **longest}, encoded.lengths


def _count_prompts(data: FinetuneSet) -> tuple[dict[str, Any], list[int]]:
    """Return counts of the prompts whose answers the reward can judge, and the tokens of each."""
    reward = open_reward(data.args.finetune_settings.reward)
    asked, _ = (
        questions_of([part], data.args, data.encoder, reward, data.problems)
        for part in (data.train, data.measured)
    )
    lengths = [len(row.ids) for row in asked.rows]
    counts = {"examples": len(data.train), "rows": len(lengths), "tokens": sum(lengths)}
    return {**counts, "longest": max(lengths, default=0), "too_long": asked.dropped}, lengths

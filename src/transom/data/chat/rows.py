"""Examples as rows of tokens with a loss weight for each token, and counts of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import Problem, RequestError, expect, located, notice
from transom.chat.built_in import fitting, named
from transom.chat.fingerprint import template_hash
from transom.chat.template import ChatTemplate
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import Examples
from transom.data.chat.messages import Messages
from transom.data.chat.turns import EncodedChat, Turns, bare_row, text_row
from transom.planning.tables import counted, counted_words
from transom.tokenizers.tokenizer import Tokenizer

ALONE = ("chat", "completion")  # kinds of examples that are not compared with others
TrainOn = Literal["assistant", "all"]
Truncate = Literal["cut", "drop"]
NEEDS_TEMPLATE = "a model with a chat template for conversations, or a template by name"


# What became of the examples of a set, by the name of a count. Tokens are those of rows that are
# kept, and answers are those that have loss.
COUNTS = {
    "examples": "examples",
    "rows": "rows to train on",
    "tokens": "tokens in these rows",
    "trained_tokens": "tokens with loss",
    "truncated": "rows cut at the end",
    "dropped": "examples left out for their length",
    "fully_masked": "examples left out because no token has loss",
    "beyond": "examples left out because the answers begin after seq_len",
    "without_end": "answers without an end-of-turn token",
    "split_rows": "additional rows, because the template changes earlier turns",
    "unlike_prompt": "answers whose prompt has other tokens on its own",
    "apart": "answers tokenized separately from the prompt",
    "alike": "pairs left out because both rows are equal",
    "dropped_reasoning": "reasoning texts that the template drops from old turns",
    "left_out": "texts of messages and tools that the template leaves out",
    "unknown": "unknown tokens, for text that the vocabulary can't write",
}


@dataclass(frozen=True, eq=False)
class EncodedChats:
    """Encoded examples.

    Attributes:
        items: One row per item, or the chosen row and the rejected row of a pair.
        counts: What became of the examples, by the names of `COUNTS`.
    """

    items: Sequence[tuple[EncodedChat, ...]]
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return one line with the size of the set and every other count that is not 0."""
        counts = self.counts
        size = f"{counted(counts['examples'], 'example')}, {counted(counts['tokens'], 'token')}"
        others = [counted_words(counts[one], COUNTS[one]) for one in [*COUNTS][4:] if counts[one]]
        return "; ".join([f"{size}, {counts['trained_tokens']:,} of them with loss", *others])

    @property
    def rows_per_item(self) -> int:
        """Return 2 for pairs and 1 otherwise."""
        return len(self.items[0]) if self.items else 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the input tokens of the longest row of each item, int64 [items]."""
        longest = [max(len(row.ids) for row in item) for item in self.items]
        return np.asarray(longest, np.int64) - 1

    @property
    def compared(self) -> bool:
        """Return whether answers are compared: the items are pairs or have labels."""
        return bool(self.items) and (len(self.items[0]) > 1 or self.items[0][0].label is not None)

    def check(self) -> None:
        """Raise `RequestError` if there is no row."""
        expected = "a set with a token to learn"
        expect(bool(self.items), "data", f"nothing to train on ({self})", expected)


def template_for(
    examples: Iterable[ChatExample | Examples], tokenizer: Tokenizer, found: ChatTemplate | None
) -> ChatTemplate | None:
    """Return `found`, or a built-in template if it is None and an example needs one.

    It is the template that the vocabulary is made for, or the plain one. A notice names it.

    Raises:
        RequestError: The vocabulary has no token that could end an answer.
    """
    if found is not None or not any(example.needs_template for example in examples):
        return found
    ready = fitting(tokenizer) or named("plain")
    assert ready is not None, "the plain template is built in"
    can_end = ready.name != "plain" or tokenizer.eos_id is not None
    expected = "a tokenizer with a token that ends a turn, for conversations"
    expect(can_end, "tokenizer", "no EOS token", expected)
    origin = f"the built-in template {ready.name}"
    notice(f"no chat template: conversations are rendered by {origin}")
    return ChatTemplate(ready.source(tokenizer), tokenizer, origin=origin, stop=ready.stop)


def prompt_ids(
    example: ChatExample, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[int]:
    """Return the token ids of an example's prompt, as at inference."""
    if template is None and example.bare:
        return tokenizer.encode_prompt(str(example.messages[0]["content"]))
    expect(template is not None, f"{example.id}: chat template", None, NEEDS_TEMPLATE)
    assert template is not None
    return template.encode(_unweighted(example.messages), example.tools)


def _unweighted(messages: Messages) -> list[dict[str, object]]:
    """Return messages without the field that templates don't know."""
    return [{key: one for key, one in message.items() if key != "weight"} for message in messages]


@dataclass(frozen=True)
class ChatEncoder:
    """Turns examples into rows of tokens.

    Texts are encoded as plain text, and without a template prompts that are texts, too. All other
    examples need a template.

    Attributes:
        tokenizer: The tokenizer.
        template: The chat template; None if there is none.
        seq_len: The longest row in tokens, 2 or more. The last token of a row is a target only.
        train_on: Whether the assistant's messages have loss, or all tokens.
        truncate: Whether longer rows are cut at their end or their examples are dropped.
        stop_tokens: Ids that end an answer, besides those of the template and the tokenizer.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    seq_len: int
    train_on: TrainOn = "assistant"
    truncate: Truncate = "cut"
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expect(self.seq_len >= 2, "seq_len", self.seq_len, "2 tokens or more")
        known = self.train_on in get_args(TrainOn)
        expect(known, "train_on", self.train_on, "assistant or all")

    @property
    def key(self) -> list[Any]:
        """Return everything that the rows of an example depend on, as JSON values."""
        tokenizer, template = self.tokenizer, self.template
        special = sorted(tokenizer.special_tokens.items())
        named = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin, tokenizer.stop_ids, special]
        written: list[Any] = []
        if template is not None:
            now = str(template.now or date.today()) if template.reads_time else None
            written = [template_hash(template), template.stop_tokens, now]
        settings = [self.seq_len, self.train_on, self.truncate, sorted(self.stop_tokens)]
        return [tokenizer.hash, named, written, settings]

    def encode(
        self, examples: Iterable[ChatExample], problems: list[Problem] | None = None
    ) -> EncodedChats:
        """Return the rows of examples.

        Args:
            examples: Examples of one kind: pairs, labelled answers, or others.
            problems: Receives the examples that can't be encoded. If it is None, the first of them
                raises `RequestError`.
        """
        template, tokenizer = self.template, self.tokenizer
        turns = None if template is None else Turns(template, tokenizer, self.stop_tokens)
        counts: Counter[str] = Counter()
        items: list[tuple[EncodedChat, ...]] = []
        for example in examples:
            counts["examples"] += 1
            with located(example.id, problems):
                made = self._items(example, turns)
                counts["split_rows"] += len(made) - 1
                items += [rows for item in made if (rows := self._fit(item, example, counts))]
        if turns is not None:
            counts.update(dropped_reasoning=turns.dropped, left_out=turns.left_out)
        return EncodedChats(items, counts)

    def _items(self, example: ChatExample, turns: Turns | None) -> list[tuple[EncodedChat, ...]]:
        """Return one item or more, each of one row, or of two rows for a pair."""
        if example.kind == "answer":
            raise RequestError("row: got a prompt without an answer; expected one, except for grpo")
        if example.kind == "text":
            return [(text_row(self.tokenizer, example.text, example.weight),)]
        first = 0 if example.kind == "chat" else len(example.messages)
        rows = [
            self._conversation(example, (*example.messages, *answer), first, turns)
            for answer in example.answers or ((),)
        ]
        if example.kind in ALONE:
            return [(row,) for row in rows[0]]
        expected = "answers of one turn, because this template changes earlier turns"
        most = max(map(len, rows))
        expect(most == 1, "answers", f"{most} rows", expected)
        return [tuple(row for (row,) in rows)]

    def _conversation(
        self, example: ChatExample, messages: Messages, first: int, turns: Turns | None
    ) -> list[EncodedChat]:
        """Return rows with loss on the assistant's messages from number `first` on.

        The prompt of a completion may be a conversation with answers of its own.
        """
        everything = self.train_on == "all" and example.kind in ALONE
        if turns is None:
            expect(example.bare, "chat template", None, NEEDS_TEMPLATE)
            prompt, answer = (str(message["content"]) for message in messages)
            return [bare_row(self.tokenizer, prompt, answer, example.weight, all_tokens=everything)]
        plain, tools = _unweighted(messages), example.tools
        given = [message.get("weight", 1.0) for message in messages]
        if everything:
            expected = "1 for every message if all tokens are trained on"
            expect(all(weight == 1.0 for weight in given), "weight", min(given), expected)
            return [turns.whole(plain, tools, example.weight)]
        weights = [
            weight * example.weight if message["role"] == "assistant" and at >= first else 0.0
            for at, (message, weight) in enumerate(zip(messages, given, strict=True))
        ]
        return turns.rows(plain, tools, weights) or [turns.whole(plain, tools, 0.0)]

    def _fit(
        self, item: tuple[EncodedChat, ...], example: ChatExample, counts: Counter[str]
    ) -> tuple[EncodedChat, ...]:
        """Return the rows of an item within `seq_len`, or none if they have no loss; count them."""
        size = self.seq_len
        too_long = sum(len(row.ids) > size for row in item)
        if too_long and self.truncate == "drop":
            counts["dropped"] += 1
            return ()
        rows = tuple(
            EncodedChat(example.id, row.ids[:size], row.weights[:size], label=example.label)
            for row in item
        )
        if not all(row.weights.any() for row in rows):
            counts["beyond" if all(row.weights.any() for row in item) else "fully_masked"] += 1
            return ()
        if len(rows) == 2 and np.array_equal(rows[0].ids, rows[1].ids):  # their losses cancel out
            counts["alike"] += 1
            return ()
        answers = [one for row in item for one in row.answers if one.start < size]
        unknown = -1 if self.tokenizer.unk_id is None else self.tokenizer.unk_id
        counts.update(
            truncated=too_long,
            rows=len(rows),
            tokens=sum(len(row.ids) for row in rows),
            trained_tokens=sum(int(np.count_nonzero(row.weights)) for row in rows),
            without_end=sum(not one.ended or one.stop > size for one in answers),
            unlike_prompt=sum(not one.like_prompt for one in answers),
            apart=sum(one.apart for one in answers),
            unknown=sum(int(np.count_nonzero(row.ids == unknown)) for row in rows),
        )
        return rows

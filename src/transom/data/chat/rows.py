"""Examples as rows of tokens with a loss weight for each token, and counts of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from datetime import date
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, notice, require
from transom.base.fields import describe
from transom.chat.built_in import fitting, named
from transom.chat.fingerprint import template_hash
from transom.chat.template import ChatTemplate
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import Examples
from transom.data.chat.messages import Messages
from transom.data.chat.turns import EncodedChat, Turns, bare_row, text_row
from transom.data.row_kinds import Problem
from transom.tokenizers.tokenizer import Tokenizer

TrainOn = Literal["assistant", "all"]
Truncate = Literal["cut", "drop"]
NEEDS_TEMPLATE = "expected a model with a chat template for conversations, or a template by name"


@dataclass(frozen=True)
class ChatCounts:
    """Counts of the examples of a set and of what became of them.

    Tokens are those of the rows that are kept, and answers are those that have loss.
    """

    examples: int = describe(0, "examples")
    rows: int = describe(0, "rows to train on")
    tokens: int = describe(0, "tokens in these rows")
    trained_tokens: int = describe(0, "tokens with loss")
    truncated: int = describe(0, "rows cut at their end")
    dropped: int = describe(0, "examples left out because they are too long")
    fully_masked: int = describe(0, "examples left out because no token has loss")
    beyond: int = describe(0, "examples left out because their answers begin after seq_len")
    without_end: int = describe(0, "answers without an end-of-turn token")
    split_rows: int = describe(0, "additional rows, because the template changes earlier turns")
    unlike_prompt: int = describe(0, "answers whose prompt has other tokens on its own")
    apart: int = describe(0, "answers tokenized separately from their prompt")
    alike: int = describe(0, "pairs left out because their rows are equal")
    dropped_reasoning: int = describe(0, "reasoning texts that the template drops from old turns")
    left_out: int = describe(0, "texts of messages and tools that the template leaves out")

    def __add__(self, other: ChatCounts) -> ChatCounts:
        return ChatCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        """Return one line with the size of the set and every other count that is not 0."""
        size = f"{self.examples:,} examples, {self.tokens:,} tokens"
        counts = zip(fields(self)[4:], astuple(self)[4:], strict=True)
        others = [f"{count:,} {one.metadata['help']}" for one, count in counts if count]
        return "; ".join([f"{size}, {self.trained_tokens:,} of them with loss", *others])


@dataclass(frozen=True, eq=False)
class EncodedChats:
    """Encoded examples.

    Attributes:
        items: One row per item, or the chosen row and the rejected row of a pair.
        counts: What became of the examples.
        labels: Whether the answer of each item is a good one, for labelled answers.
        left_out: How many texts of each kind the chat template leaves out.
    """

    items: Sequence[tuple[EncodedChat, ...]]
    counts: ChatCounts = field(default_factory=ChatCounts)
    labels: Sequence[bool] | None = None
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def rows_per_item(self) -> int:
        """Return 2 for pairs and 1 otherwise."""
        return len(self.items[0]) if self.items else 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the input tokens of the longest row of each item, int64 [items]."""
        longest = [max(len(row.ids) for row in item) for item in self.items]
        return np.asarray(longest, np.int64) - 1

    def check(self, *, may_be_empty: bool = False) -> None:
        """Print which kinds of texts are left out. Raise `RequestError` if there is no row."""
        if self.left_out:
            kinds = [f"{kind} ({count:,})" for kind, count in sorted(self.left_out.items())]
            notice(f"the chat template leaves out: {', '.join(kinds)}")
        expected = "expected a set with a token to learn"
        if not self.items and not may_be_empty:
            raise RequestError(f"data: got nothing to train on ({self.counts}); {expected}")


def default_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the built-in template that a vocabulary is made for, or the plain one, with a notice.

    Raises:
        RequestError: The vocabulary has no token that could end an answer.
    """
    ready = fitting(tokenizer) or named("plain")
    assert ready is not None, "the plain template is built in"
    can_end = ready.name != "plain" or tokenizer.eos_id is not None
    expected = "expected a tokenizer with a token that ends a turn, for conversations"
    require(can_end, "tokenizer", "no EOS token", expected)
    notice(f"no chat template: conversations are rendered by the built-in template {ready.name}")
    origin = f"the built-in template {ready.name}"
    return ChatTemplate(ready.source(tokenizer), tokenizer, origin=origin, stop=ready.stop)


def template_for(
    examples: Iterable[ChatExample | Examples], tokenizer: Tokenizer, found: ChatTemplate | None
) -> ChatTemplate | None:
    """Return `found`, or the default template if it is None and an example needs one."""
    if found is None and any(example.needs_template for example in examples):
        return default_template(tokenizer)
    return found


def prompt_ids(
    example: ChatExample, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[int]:
    """Return the token ids of an example's prompt, as at inference."""
    if template is None and example.bare:
        return tokenizer.encode_prompt(str(example.messages[0]["content"]))
    require(template is not None, f"{example.id}: chat template", None, NEEDS_TEMPLATE)
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
        require(self.seq_len >= 2, "seq_len", self.seq_len, "expected 2 tokens or more")
        known = self.train_on in get_args(TrainOn)
        require(known, "train_on", self.train_on, "expected assistant or all")

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
        labels: list[bool] = []
        for example in examples:
            counts["examples"] += 1
            try:
                made = self._items(example, turns)
            except RequestError as error:
                if problems is None:
                    raise RequestError(f"{example.id}: {error}") from None
                problems.append(Problem(example.id, str(error)))
                continue
            counts["split_rows"] += len(made) - 1
            kept = [rows for item in made if (rows := self._fit(item, example.id, counts))]
            items += kept
            labels += [] if example.label is None else [example.label] * len(kept)
        if turns is not None:
            counts["dropped_reasoning"], counts["left_out"] = turns.dropped, turns.left_out.total()
        alike = len({len(item) for item in items}) < 2 and len(labels) in (0, len(items))
        require(alike, "examples", "several kinds", "expected pairs or labels for all, or for none")
        left_out = Counter() if turns is None else turns.left_out
        return EncodedChats(items, ChatCounts(**counts), labels or None, left_out)

    def _items(self, example: ChatExample, turns: Turns | None) -> list[tuple[EncodedChat, ...]]:
        """Return one item or more, each of one row, or of two rows for a pair."""
        if example.kind == "answer":
            raise RequestError("row: got a prompt without an answer; expected one, except for grpo")
        if example.kind == "text":
            return [(text_row(self.tokenizer, example.text, example.weight),)]
        if turns is None and example.bare:
            return [tuple(self._bare(example, answer) for answer in example.answers)]
        require(turns is not None, "chat template", None, NEEDS_TEMPLATE)
        assert turns is not None
        if example.kind in ("chat", "completion"):
            messages = sum(example.answers, example.messages)
            # The prompt of a completion may be a conversation with answers of its own.
            first = len(example.messages) if example.kind == "completion" else 0
            return [(row,) for row in self._conversation(example, messages, first, turns)]
        first = len(example.messages)
        rows = [
            self._conversation(example, example.messages + answer, first, turns)
            for answer in example.answers
        ]
        expected = "expected answers of one turn, because this template changes earlier turns"
        most = max(map(len, rows))
        require(most == 1, "answers", f"{most} rows", expected)
        return [tuple(row for (row,) in rows)]

    def _bare(self, example: ChatExample, answer: Messages) -> EncodedChat:
        """Return the row of a prompt and an answer that are one plain text each."""
        prompt, text = str(example.messages[0]["content"]), str(answer[0]["content"])
        everything = self.train_on == "all" and example.kind == "completion"
        return bare_row(self.tokenizer, prompt, text, example.weight, all_tokens=everything)

    def _conversation(
        self, example: ChatExample, messages: Messages, first: int, turns: Turns
    ) -> list[EncodedChat]:
        """Return rows with loss on the assistant's messages from number `first` on."""
        plain, tools = _unweighted(messages), example.tools
        given = [message.get("weight", 1.0) for message in messages]
        if self.train_on == "all" and example.kind in ("chat", "completion"):
            expected = "expected 1 for every message if all tokens are trained on"
            require(all(weight == 1.0 for weight in given), "weight", min(given), expected)
            return [turns.whole(plain, tools, example.weight)]
        weights = [
            weight * example.weight if message["role"] == "assistant" and at >= first else 0.0
            for at, (message, weight) in enumerate(zip(messages, given, strict=True))
        ]
        return turns.rows(plain, tools, weights) or [turns.whole(plain, tools, 0.0)]

    def _fit(
        self, item: tuple[EncodedChat, ...], id: str, counts: Counter[str]
    ) -> tuple[EncodedChat, ...]:
        """Return the rows of an item within `seq_len`, or none if they have no loss; count them."""
        size = self.seq_len
        too_long = sum(len(row.ids) > size for row in item)
        if too_long and self.truncate == "drop":
            counts["dropped"] += 1
            return ()
        rows = tuple(EncodedChat(id, row.ids[:size], row.weights[:size]) for row in item)
        if not all(row.weights.any() for row in rows):
            counts["beyond" if all(row.weights.any() for row in item) else "fully_masked"] += 1
            return ()
        if len(rows) == 2 and np.array_equal(rows[0].ids, rows[1].ids):  # their losses cancel out
            counts["alike"] += 1
            return ()
        counts["truncated"] += too_long
        counts["rows"] += len(rows)
        counts["tokens"] += sum(len(row.ids) for row in rows)
        counts["trained_tokens"] += sum(int(np.count_nonzero(row.weights)) for row in rows)
        for answer in (one for row in item for one in row.answers if one.start < size):
            counts["without_end"] += not answer.ended or answer.stop > size
            counts["unlike_prompt"] += not answer.like_prompt
            counts["apart"] += answer.apart
        return rows

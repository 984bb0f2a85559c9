"""Examples as rows of tokens, what each token counts in the loss, and counts of all that was left
out. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, notice, require
from transom.chat.built_in import fitting, named
from transom.chat.template import ChatTemplate
from transom.data.chat.conversations import ChatExample, Messages
from transom.data.chat.finetune_sets import Problem
from transom.data.chat.turns import Turns, Written, bare_row, text_row
from transom.tokenizers.tokenizer import Tokenizer

TrainOn = Literal["assistant", "all"]
Truncate = Literal["cut", "drop"]


class EncodedChat(NamedTuple):
    """Ids of one sequence, and the weight of each as a target: 0 is context only, as the first
    always is.
    """

    id: str
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass
class ChatCounts:
    """What became of the examples; tokens are those of rows kept."""

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0  # of a weight above 0
    truncated: int = 0  # rows cut at their end, as they are longer than allowed
    dropped: int = 0  # examples left out for their length
    fully_masked: int = 0  # examples left out because no token of them carries loss
    beyond: int = 0  # examples left out because what carries loss begins behind the longest row
    without_end: int = (
        0  # answers with loss that no token ends which ends a turn, cut ones among them
    )
    split_rows: int = (
        0  # rows beyond one per conversation, where a template writes earlier turns otherwise
    )
    unlike_prompt: int = (
        0  # answers with loss behind other tokens than those that the model is asked with
    )
    # answers with loss whose first token is another than in the prompt and answer as one text
    apart: int = 0
    alike: int = 0  # pairs left out because both answers have the same tokens
    dropped_reasoning: int = (
        0  # texts of reasoning that the template writes for the answer they led to only
    )
    left_out: int = 0  # other texts of messages and tools that the template writes nowhere
    rendered_anew: int = (
        0  # conversations that are rendered again for every answer, which takes longer
    )

    def __str__(self) -> str:
        """One line: what there is, and what is not as one would expect."""
        line = (
            f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} of "
            f"them with loss"
        )
        words = {
            "truncated": "rows cut at their end",
            "dropped": "examples too long and left out",
            "fully_masked": "examples without loss left out",
            "beyond": "examples left out whose answers begin beyond seq_len",
            "without_end": "answers without an end of turn",
            "split_rows": "rows more, since the template writes earlier turns otherwise",
            "unlike_prompt": "answers behind other tokens than those of their prompt alone",
            "apart": "answers encoded apart from their prompt, with which they would share a token",
            "alike": "pairs left out whose answers have the same tokens in their rows",
            "dropped_reasoning": "texts of reasoning that the template drops from earlier turns",
            "left_out": "texts of messages and tools that the template leaves out",
            "rendered_anew": "conversations rendered again for every answer, as the template "
            "requires",
        }
        return "; ".join(
            [line, *(f"{n:,} {said}" for name, said in words.items() if (n := getattr(self, name)))]
        )


@dataclass(frozen=True)
class EncodedChats:
    """Items of one row each, or of a chosen row and a rejected one; `labels` of items, where
    answers have one.
    """

    items: list[tuple[EncodedChat, ...]]
    counts: ChatCounts
    labels: list[bool] | None = None

    @property
    def rows_per_item(self) -> int:
        """2 for pairs."""
        return len(self.items[0]) if self.items else 1


def default_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The built-in template that a vocabulary is made for, else the plain one, which needs an EOS
    alone; said.
    """
    ready = fitting(tokenizer) or named("plain")
    assert ready is not None, "the plain template is built in"
    can_end = ready.name != "plain" or tokenizer.eos_id is not None
    require(
        can_end,
        "tokenizer",
        "without EOS",
        "valid only for conversations is one with a token that ends a turn",
    )
    notice(f"no chat template: conversations are written by the built-in one called {ready.name}")
    return ChatTemplate(
        ready.source(tokenizer),
        tokenizer,
        origin=f"the built-in template {ready.name}",
        stop=ready.stop,
    )


def template_for(
    examples: Iterable[ChatExample], tokenizer: Tokenizer, found: ChatTemplate | None
) -> ChatTemplate | None:
    """The template found in a folder; where there is none and conversations have to be written, the
    default one.
    """
    if found is None and any(example.kind != "text" and not example.bare for example in examples):
        return default_template(tokenizer)
    return found


def encode_examples(
    examples: Iterable[ChatExample],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    seq_len: int,
    train_on: TrainOn = "assistant",
    truncate: Truncate = "cut",
    stop_tokens: Collection[int] = (),
    problems: list[Problem] | None = None,
    may_be_empty: bool = False,
) -> EncodedChats:
    """Rows of at most `seq_len` tokens, longer ones cut at their end or left out; no row at all is
    refused.

    `stop_tokens` end an answer besides those that template and tokenizer know.

    Texts, and without a template prompts that are texts, are plain text; what else there is needs a
    template. An example that it cannot write is refused or, where a list is given, added to
    `problems`, and then nothing is.
    """
    require(seq_len >= 2, "seq_len", seq_len, "expected 2 tokens or more")
    encoder = _Encoder(tokenizer, template, train_on, stop_tokens)
    counts = ChatCounts()
    items: list[tuple[EncodedChat, ...]] = []
    labels: list[bool] = []
    kinds: set[bool] = set()
    for example in examples:
        counts.examples += 1
        try:
            written = encoder.items(example)
        except RequestError as error:
            if problems is None:
                raise RequestError(f"{example.id}: {error}") from None
            problems.append(Problem(example.id, str(error)))
            continue
        kinds.add(example.kind == "pair")
        require(len(kinds) == 1, "examples", example.kind, "expected pairs alone, or none at all")
        counts.split_rows += len(written) - 1
        kept = [
            rows for item in written if (rows := _fit(item, example.id, seq_len, truncate, counts))
        ]
        items += kept
        labels += [] if example.label is None else [example.label] * len(kept)
    if encoder.turns is not None:
        left_out = encoder.turns.left_out
        counts.dropped_reasoning, counts.left_out = encoder.turns.dropped, left_out.total()
        counts.rendered_anew = encoder.turns.rendered_anew
        if left_out:
            kinds_left = ", ".join(
                f"{kind} ({count:,})" for kind, count in sorted(left_out.items())
            )
            notice(f"the chat template leaves out: {kinds_left}")
    require(
        len(labels) in (0, len(items)),
        "label",
        None,
        "expected one for every example, or for none",
    )
    if not items and problems is None and not may_be_empty:
        raise RequestError(
            f"data: nothing to train on ({counts}); expected a set with a token to learn"
        )
    return EncodedChats(items, counts, labels or None)


def prompt_ids(
    example: ChatExample, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[int]:
    """Ids of an example's prompt as the model is asked with it, for answers that are still to be
    drawn.
    """
    if template is None and example.bare:
        return tokenizer.encode_prompt(str(example.messages[0]["content"]))
    require(template is not None, f"{example.id}: chat template", None, NEEDS_TEMPLATE)
    assert template is not None
    return template.encode(_unweighted(example.messages), example.tools)


NEEDS_TEMPLATE = "valid only for conversations is a model with one, or a template by name"


class _Encoder:
    """Examples to rows, by what each of them is."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        train_on: TrainOn,
        stop_tokens: Collection[int],
    ) -> None:
        require(train_on in ("assistant", "all"), "train_on", train_on, "expected assistant or all")
        self._tokenizer, self._train_on = tokenizer, train_on
        self.turns = None if template is None else Turns(template, tokenizer, stop_tokens)

    def items(self, example: ChatExample) -> list[tuple[Written, ...]]:
        """One item or more, each of one row, or of two for a pair."""
        if example.kind == "answer":
            raise RequestError(
                "a prompt with an answer to compare with: accepted where rewards are what is "
                "learnt from"
            )
        if example.kind == "text":
            return [(text_row(self._tokenizer, example.text, example.weight),)]
        if self.turns is None and example.bare:
            return [tuple(self._bare(example, answer) for answer in example.answers)]
        if example.kind in ("chat", "completion"):
            messages = sum(example.answers, example.messages)
            first = (
                len(example.messages) if example.kind == "completion" else 0
            )  # a prompt may be a conversation
            return [(row,) for row in self._conversation(example, messages, first)]
        rows = [
            self._conversation(example, example.messages + a, len(example.messages))
            for a in example.answers
        ]
        expected = (
            "expected answers of one turn, as this template writes earlier turns otherwise "
            "than last ones"
        )
        require(
            all(len(one) == 1 for one in rows),
            "answers",
            f"of {max(map(len, rows))} rows",
            expected,
        )
        return [tuple(one[0] for one in rows)]

    def _bare(self, example: ChatExample, answer: Messages) -> Written:
        prompt, said = str(example.messages[0]["content"]), str(answer[0]["content"])
        everything = self._train_on == "all" and example.kind == "completion"
        return bare_row(self._tokenizer, prompt, said, example.weight, all_tokens=everything)

    def _conversation(self, example: ChatExample, messages: Messages, first: int) -> list[Written]:
        """Rows of one conversation, with loss on the assistant's messages from number `first`
        on.
        """
        require(self.turns is not None, "chat template", None, NEEDS_TEMPLATE)
        assert self.turns is not None
        plain = _unweighted(messages)
        said = [message["role"] == "assistant" for message in messages]
        given = [message.get("weight", 1.0) for message in messages]
        if self._train_on == "all" and example.kind in ("chat", "completion"):
            alike = all(weight == 1.0 for weight in given)
            require(
                alike,
                "weight",
                min(given),
                "expected 1 for every message where all tokens are trained on",
            )
            return [self.turns.whole(plain, example.tools, example.weight)]
        weights = [
            weight * example.weight if one and at >= first else 0.0
            for at, (one, weight) in enumerate(zip(said, given, strict=True))
        ]
        return self.turns.rows(plain, example.tools, weights) or [
            self.turns.whole(plain, example.tools, 0.0)
        ]


def _unweighted(messages: Messages) -> list[dict[str, object]]:
    """Messages as a template knows them."""
    return [
        {key: value for key, value in message.items() if key != "weight"} for message in messages
    ]


def _fit(
    item: tuple[Written, ...], id: str, seq_len: int, truncate: Truncate, counts: ChatCounts
) -> tuple[EncodedChat, ...]:
    """Return the rows of an item within `seq_len` tokens, counted; none where they would train
    nothing.
    """
    too_long = sum(len(row.ids) > seq_len for row in item)
    if too_long and truncate == "drop":
        counts.dropped += 1
        return ()
    rows = tuple(
        EncodedChat(id, np.asarray(r.ids[:seq_len], np.int32), r.weights[:seq_len]) for r in item
    )
    if not all(row.weights.any() for row in rows):
        whole = all(row.weights.any() for row in item)
        counts.beyond += whole
        counts.fully_masked += not whole
        return ()
    if len(rows) == 2 and np.array_equal(rows[0].ids, rows[1].ids):  # their losses would cancel out
        counts.alike += 1
        return ()
    counts.truncated += too_long
    counts.rows += len(rows)
    counts.tokens += sum(len(row.ids) for row in rows)
    counts.trained_tokens += sum(int(np.count_nonzero(row.weights)) for row in rows)
    for row in item:
        begun = [answer for answer in row.answers if answer.start < seq_len]
        counts.without_end += sum(not answer.ended or answer.stop > seq_len for answer in begun)
        counts.unlike_prompt += sum(not answer.like_prompt for answer in begun)
        counts.apart += sum(answer.apart for answer in begun)
    return rows

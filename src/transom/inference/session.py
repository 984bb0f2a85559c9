"""A conversation with a model: turns in, reasoning and answers out, and a cache that grows with it.

This module neither prints answers nor reads input: the command line does, and a server could.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transom.base.errors import RequestError, notice
from transom.base.runtime import mixed_seed
from transom.chat.marking import common_prefix
from transom.chat.reasoning import Markers, Piece, Splitter, marker_ids
from transom.chat.template import ChatTemplate
from transom.inference.loop import truncate_after_interrupt
from transom.inference.sampling import SamplingArgs
from transom.inference.text import Completion, TextStream, stream_text
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer


class Framing(Protocol):
    """How turns become the tokens that a model continues."""

    begin: str  # the words that every answer begins with

    def reset(self, system: str) -> None:
        """Begin anew with `system` in front."""

    def prompt(self, turn: str) -> list[int]:
        """Return the ids of the conversation with `turn`, without adding it."""

    def keep(self, turn: str, ids: list[int], answer: Answer, answer_ids: list[int]) -> None:
        """Add a turn, its prompt `ids`, and the answer with its ids without stop tokens."""

    def saved(self) -> str:
        """Return the conversation as the text of a file."""


class GrowingText:
    """One text: each turn on a new line, followed by its answer."""

    begin = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset("")

    def reset(self, system: str) -> None:
        """Begin anew with `system` on the first line."""
        self.system, self.text = system, ""
        self.ids: list[int] = []

    def added(self, turn: str) -> str:
        """Return what `turn` adds to the text."""
        if not self.ids:
            return f"{self.system}\n{turn}" if self.system else turn
        return turn if self.text.endswith("\n") else f"\n{turn}"

    def prompt(self, turn: str) -> list[int]:
        """Return the ids so far and those of the new line."""
        added = self.added(turn)
        return (
            self.ids + self.tokenizer.encode(added)
            if self.ids
            else self.tokenizer.encode_prompt(added)
        )

    def keep(self, turn: str, ids: list[int], answer: Answer, answer_ids: list[int]) -> None:
        """Add the turn and the answer; a stop token ends the answer, not the text."""
        completion = answer.completion
        self.text += self.added(turn) + completion.text + completion.stop_string
        self.ids = ids + answer_ids

    def saved(self) -> str:
        """Return the text."""
        return self.text


class Messages:
    """Messages that a chat template writes anew for every turn."""

    def __init__(self, template: ChatTemplate, values: dict[str, Any], begin: str = "") -> None:
        """`begin` are words that every answer begins with; the model goes on from them."""
        self.template, self.values, self.begin = template, values, begin
        self.messages: list[dict[str, str]] = []

    def reset(self, system: str) -> None:
        """Begin anew with `system` as the first message."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt(self, turn: str) -> list[int]:
        """Return the ids of all messages, and of the head of an answer or of its first words."""
        messages = [*self.messages, {"role": "user", "content": turn}]
        if not self.begin:
            return self.template.encode(messages, **self.values)
        messages.append({"role": "assistant", "content": self.begin})
        return self.template.encode(messages, continue_final_message=True, **self.values)

    def keep(self, turn: str, ids: list[int], answer: Answer, answer_ids: list[int]) -> None:
        """Add both messages; an answer that was cut short stays as it is.

        Reasoning has a key of its own, from which the template writes what the model reads again.
        """
        message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        self.messages += [{"role": "user", "content": turn}, message]

    def saved(self) -> str:
        """Return one line of a chat data set."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"


class Answer:
    """Yields the pieces of reasoning and of answer to show; afterwards it has both as texts.

    `begin` is the text that the model continued. With `hidden` the pieces are yielded as the model
    writes them, and these control tokens belong to neither text.
    """

    def __init__(
        self,
        turn: str,
        ids: list[int],
        texts: TextStream,
        splitter: Splitter | None,
        hidden: Sequence[str] | None,
        begin: str,
    ) -> None:
        self.turn, self.ids, self.begin = turn, ids, begin
        self.completion: Completion = texts.completions[0]
        self._texts, self._splitter = texts, splitter
        self._hidden = (
            None if hidden is None else re.compile("|".join(map(re.escape, hidden)) or "(?!)")
        )

    def __iter__(self) -> Iterator[Piece]:
        yield from self._pieces(self.begin)
        for (text,) in self._texts:
            yield from self._pieces(text)
        if self._splitter is not None:
            rest = self._splitter.finish()
            yield from rest if self._hidden is None else ()

    def _pieces(self, text: str) -> list[Piece]:
        pieces: list[Piece] = [("answer", text)] if text else []
        if self._splitter is None:
            return pieces
        if self._hidden is None:
            return self._splitter.push(text)
        self._splitter.push(self._hidden.sub("", text))
        return pieces

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        return (
            self.begin + self.completion.text if self._splitter is None else self._splitter.answer
        )

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "" if self._splitter is None else self._splitter.reasoning


@dataclass(frozen=True)
class AnswerArgs:
    """How answers are sampled, and where they end."""

    sampling: SamplingArgs
    max_tokens: int
    stop_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    prefill_step_size: int = 512
    show_special: bool = False  # show answers as the model writes them, with control tokens


class Session:
    """A conversation, and a cache of its beginning, so that only new tokens are run."""

    def __init__(
        self,
        model: LLM,
        tokenizer: Tokenizer,
        framing: Framing,
        args: AnswerArgs,
        room: int,
        markers: Markers | None = None,
        when_full: str = "expected a new conversation",
    ) -> None:
        """`room` is the most tokens of the conversation; `when_full` tells what to do when it is
        full.
        """
        self.model, self.tokenizer, self.framing, self.args = model, tokenizer, framing, args
        self.room, self.markers, self.when_full = room, markers, when_full
        self.cache = model.make_cache(1, room)
        self.cached: list[int] = []  # the ids of the tokens in the cache
        self.turns = 0

    def ask(self, turn: str) -> Answer:
        """Return the answer to `turn`, which is generated while it is iterated; call `keep`
        afterwards.

        A `RequestError` leaves the conversation unchanged.
        """
        ids = self.framing.prompt(turn)
        left = self.room - len(ids)
        if left < 1:
            raise RequestError(f"{len(ids)} tokens with this turn: {self.full}")
        self._roll_back_to(ids)
        markers, tokenizer = self.markers, self.tokenizer
        shown = marker_ids(tokenizer) if markers is None else markers.control_ids(tokenizer)
        texts = self._continued(ids, min(self.args.max_tokens, left), shown)
        hidden = [word for word, id in tokenizer.special_tokens.items() if id not in shown]
        begin = self.framing.begin
        splitter = None if markers is None else markers.splitter(begun=bool(begin))
        return Answer(turn, ids, texts, splitter, hidden if self.args.show_special else None, begin)

    def keep(self, answer: Answer, *, interrupted: bool = False) -> None:
        """Add an answer, as far as it was generated."""
        completion = answer.completion
        self.turns += 1
        answer_ids = [id for id in completion.tokens if id not in self.args.stop_tokens]
        self.framing.keep(answer.turn, answer.ids, answer, answer_ids)
        if interrupted:
            in_flight = 1 if completion.tokens else self.args.prefill_step_size
            truncate_after_interrupt(
                self.cache, at_most=len(answer.ids) + len(completion.tokens), in_flight=in_flight
            )
        elif (
            completion.finish_reason == "length"
            and self.room - len(answer.ids) <= self.args.max_tokens
        ):
            notice(self.full, again=True)
        self.cached = (answer.ids + completion.tokens)[: int(self.cache.lengths_B[0])]

    def forget(self) -> None:
        """Empty the cache, whose keys and values are those of other weights."""
        self.cache.reset()
        self.cached = []

    @property
    def full(self) -> str:
        """The sentence about a context that is full."""
        return f"the context of {self.room} tokens is full; {self.when_full}"

    def _roll_back_to(self, ids: list[int]) -> None:
        """Roll the cache back to the tokens that it shares with the beginning of `ids[:-1]`.

        A template may write an answer differently than the model did: its end of turn, its
        reasoning.
        """
        same = common_prefix(self.cached, ids[:-1])
        beyond = len(self.cached) - same
        if beyond and not self.cache.rollback(beyond, beyond):
            self.cache.reset()  # a ring has overwritten tokens that it needs
            same = 0
        self.cached = self.cached[:same]

    def _continued(self, ids: list[int], max_new_tokens: int, shown: Sequence[int]) -> TextStream:
        """Return the model's continuation of `ids`, not started yet."""
        args = self.args
        return stream_text(
            self.model,
            self.tokenizer,
            [ids],
            max_new_tokens=max_new_tokens,
            sampling=args.sampling,
            seeds=[mixed_seed(args.sampling.seed, self.turns)],  # every turn has draws of its own
            stop=args.stop,
            stop_tokens=args.stop_tokens,
            prefill_step_size=args.prefill_step_size,
            cache=self.cache,
            kept="all" if args.show_special else shown,
        )

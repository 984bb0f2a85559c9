"""A conversation with a model: turns in, reasoning and answers out, and a cache that grows along.

Nothing here prints or reads: the command line shows what comes, and a server would send it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transom.chat.reasoning import Markers, Piece, Splitter, marker_ids
from transom.chat.template import ChatTemplate
from transom.errors import RequestError, notice
from transom.generation.loop import settle
from transom.generation.sampling import SamplingArgs
from transom.generation.text import Completion, TextStream, stream_text
from transom.model import LLM
from transom.runtime import mixed_seed
from transom.tokenizer import Tokenizer


class Framing(Protocol):
    """How turns become the tokens that a model continues."""

    begin: str  # the words that every answer begins with

    def reset(self, system: str) -> None:
        """Begin anew with `system` in front."""

    def prompt(self, turn: str) -> list[int]:
        """Return the ids of the conversation and `turn`; nothing is kept yet."""

    def keep(self, turn: str, ids: list[int], answer: Answer, said: list[int]) -> None:
        """Take up a turn, its prompt `ids`, and the answer, whose ids but for stop tokens are `said`."""

    def saved(self) -> str:
        """Return the conversation as the text of a file."""


class GrowingText:
    """One text: every turn on a new line, every answer behind it."""

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
        return self.ids + self.tokenizer.encode(added) if self.ids else self.tokenizer.encode_prompt(added)

    def keep(self, turn: str, ids: list[int], answer: Answer, said: list[int]) -> None:
        """A stop token ends the answer, not the text: the next turn continues it."""
        completion = answer.completion
        self.text += self.added(turn) + completion.text + completion.stop_string
        self.ids = ids + said

    def saved(self) -> str:
        """Return the text."""
        return self.text


class Messages:
    """Messages, written by a chat template as a whole every time."""

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

    def keep(self, turn: str, ids: list[int], answer: Answer, said: list[int]) -> None:
        """Add both messages; what is cut short stays as it is.

        Reasoning has a key of its own, from which the template writes what its model is to read again.
        """
        message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        self.messages += [{"role": "user", "content": turn}, message]

    def saved(self) -> str:
        """Return one line of a chat data set."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"


class Answer:
    """Iterate for what is to be shown, as pieces of reasoning and of answer; then it holds both.

    `begin` are the words that the model went on from. With `hidden` the pieces are shown as they come, and those
    control tokens are no part of either.
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
        self._hidden = None if hidden is None else re.compile("|".join(map(re.escape, hidden)) or "(?!)")

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
        """The answer so far, without its reasoning."""
        return self.begin + self.completion.text if self._splitter is None else self._splitter.answer

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "" if self._splitter is None else self._splitter.reasoning


@dataclass(frozen=True)
class AnswerArgs:
    """How answers are drawn, and where they end."""

    sampling: SamplingArgs
    max_tokens: int
    stop_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    prefill_step_size: int = 512
    show_special: bool = False  # answers are shown as the model writes them, control tokens included


class Session:
    """A conversation, and a cache that holds the beginning of it: only what is new is run."""

    def __init__(
        self,
        model: LLM,
        tokenizer: Tokenizer,
        framing: Framing,
        args: AnswerArgs,
        room: int,
        markers: Markers | None = None,
        when_full: str = "accepted is a new conversation",
    ) -> None:
        """`room` is the number of tokens that the conversation may grow to, `when_full` the advice then."""
        self.model, self.tokenizer, self.framing, self.args = model, tokenizer, framing, args
        self.room, self.markers, self.when_full = room, markers, when_full
        self.cache = model.make_cache(1, room)
        self.held: list[int] = []  # the ids that the cache holds
        self.turns = 0

    def ask(self, turn: str) -> Answer:
        """Return the answer to `turn`, which runs as it is iterated; `keep` it afterwards.

        A `RequestError` leaves the conversation as it was.
        """
        ids = self.framing.prompt(turn)
        left = self.room - len(ids)
        if left < 1:
            raise RequestError(f"{len(ids)} tokens with this turn: {self.full}")
        self._hold_only(ids)
        markers, tokenizer = self.markers, self.tokenizer
        shown = marker_ids(tokenizer) if markers is None else markers.control_ids(tokenizer)
        texts = self._continued(ids, min(self.args.max_tokens, left), shown)
        hidden = [word for word, id in tokenizer.special_tokens.items() if id not in shown]
        begin = self.framing.begin
        splitter = None if markers is None else markers.splitter(begun=bool(begin))
        return Answer(turn, ids, texts, splitter, hidden if self.args.show_special else None, begin)

    def keep(self, answer: Answer, *, interrupted: bool = False) -> None:
        """Take up an answer as far as it has come."""
        completion = answer.completion
        self.turns += 1
        said = [id for id in completion.tokens if id not in self.args.stop_tokens]
        self.framing.keep(answer.turn, answer.ids, answer, said)
        if interrupted:
            in_flight = 1 if completion.tokens else self.args.prefill_step_size
            settle(self.cache, at_most=len(answer.ids) + len(completion.tokens), in_flight=in_flight)
        elif completion.finish_reason == "length" and self.room - len(answer.ids) <= self.args.max_tokens:
            notice(self.full, again=True)
        self.held = (answer.ids + completion.tokens)[: int(self.cache.lengths_B[0])]

    def forget(self) -> None:
        """Empty the cache, whose keys and values are those of other weights."""
        self.cache.reset()
        self.held = []

    @property
    def full(self) -> str:
        """The sentence for a context without room."""
        return f"the context of {self.room} tokens is full; {self.when_full}"

    def _hold_only(self, ids: list[int]) -> None:
        """Make the cache hold a beginning of `ids`, and leave at least one to run.

        A template may write an answer otherwise than the model did: its end of turn, its reasoning.
        """
        pairs = zip(self.held, ids[:-1], strict=False)
        same = next((at for at, (held, id) in enumerate(pairs) if held != id), min(len(self.held), len(ids) - 1))
        beyond = len(self.held) - same
        if beyond and not self.cache.rollback(beyond, beyond):
            self.cache.reset()  # a ring has overwritten what it needs
            same = 0
        self.held = self.held[:same]

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

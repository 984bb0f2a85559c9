"""Conversations as tokens, and which of them each answer is. No torch.

An answer is what stands behind the tokens of its prompt, written as it is when the model is asked; that the tokens
of the conversation begin with those is checked for every answer. Where a template does not write an earlier answer
as it writes a last one (Qwen3 leaves out what was thought), the conversation becomes several rows, and in each of
them the answers that carry loss are written as the model has to say them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.chat.sandbox import GENERATION
from transom.chat.template import ChatTemplate
from transom.errors import RequestError
from transom.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]] | None


class Answer(NamedTuple):
    """The tokens [start, stop) of an answer, if one that ends a turn is there, if those before are the prompt's."""

    start: int
    stop: int
    ended: bool
    like_prompt: bool = True


@dataclass
class Written:
    """A row: ids, the weight of each as a target, and its answers."""

    ids: list[int]
    weights: NDArray[np.float32]
    answers: list[Answer]


class _Said(NamedTuple):
    """A conversation that ends with an answer: its ids, True for those of that answer."""

    ids: list[int]
    mask: NDArray[np.bool_]
    answer: Answer


class Turns:
    """Writes conversations with one template and tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._stops = frozenset((*template.stop_tokens, *tokenizer.stop_ids))
        end = None if template.end_of_turn is None else tokenizer.token_to_id(template.end_of_turn)
        marked = any(GENERATION.search(source) for source in template.sources.values())
        # A word of the vocabulary that is no control token may stand in the answer itself.
        self._by_prompt = not marked and (end is None or end in tokenizer.special_ids)
        self._special = tokenizer.special_ids

    def rows(self, messages: Sequence[Mapping[str, Any]], tools: Tools, weights: Sequence[float]) -> list[Written]:
        """Rows that hold every message with a weight above 0 as an answer with loss, mostly one row for all.

        `weights` are those of the messages; a row ends with its last answer.
        """
        rows: list[Written] = []
        for at in reversed([at for at, weight in enumerate(weights) if weight > 0]):
            said = self._answer(messages[: at + 1], tools)
            self._check_calls(messages[at], said, f"messages[{at}]")
            stop = said.answer.stop
            row = next((row for row in rows if row.ids[:stop] == said.ids[:stop]), None)
            if row is None:
                row = Written(said.ids[:stop], np.zeros(stop, np.float32), [])
                rows.append(row)
            row.weights[:stop][said.mask[:stop]] = weights[at]
            row.answers.insert(0, said.answer)
        return rows[::-1]

    def _check_calls(self, message: Mapping[str, Any], said: _Said, name: str) -> None:
        """Refuse a template without words for calls of tools: an empty answer would be learnt in their place."""
        calls = [call.get("function", call).get("name") for call in message.get("tool_calls") or ()]
        if not calls:
            return
        text = self._tokenizer.decode(said.ids[said.answer.start : said.answer.stop], skip_special=False)
        lost = next((call for call in calls if str(call) not in text), None)
        if lost is not None:
            raise RequestError(
                f"{name}: {self._template.origin} leaves out the call of {lost!r}; accepted for tool_calls is a "
                "template that writes them"
            )

    def whole(self, messages: Sequence[Mapping[str, Any]], tools: Tools, weight: float) -> Written:
        """The whole conversation with one weight for every token but the first."""
        ids = self._template.encode(messages, tools, add_generation_prompt=False)
        return Written(ids, _all_but_first(len(ids), weight), [])

    def _answer(self, messages: Sequence[Mapping[str, Any]], tools: Tools) -> _Said:
        prompt = self._template.encode(messages[:-1], tools) if len(messages) > 1 else []
        if self._by_prompt and prompt:
            ids = self._template.encode(messages, tools, add_generation_prompt=False)
            if ids[: len(prompt)] == prompt and len(ids) > len(prompt):
                behind = range(len(prompt), len(ids))
                stop = next((at + 1 for at in behind if ids[at] in self._stops & self._special), len(ids))
                mask = np.zeros(len(ids), np.bool_)
                mask[len(prompt) : stop] = True
                return _Said(ids, mask, Answer(len(prompt), stop, ids[stop - 1] in self._stops))
        ids, said = self._template.encode_with_mask(messages, tools)
        mask = np.asarray(said, np.bool_)
        like_prompt = ids[: len(prompt)] == prompt
        mask[: len(prompt) if like_prompt else _last_run(mask)] = False
        if not mask.any():
            raise RequestError(
                f"messages[{len(messages) - 1}]: {self._template.origin} marks nothing of this answer; accepted is "
                "a template whose {% generation %} blocks hold what the assistant says"
            )
        places = np.flatnonzero(mask)
        start, stop = int(places[0]), int(places[-1]) + 1
        ended = any(ids[at] in self._stops for at in places)
        if not ended and stop < len(ids) and ids[stop] in self._stops:  # a block that leaves the end of turn out
            mask[stop] = ended = True
            stop += 1
        return _Said(ids, mask, Answer(start, stop, ended, like_prompt))


def text_row(tokenizer: Tokenizer, text: str, weight: float) -> Written:
    """Return a document behind what its tokenizer puts in front, then EOS; loss on all but the first token."""
    ids = [*tokenizer.encode_prompt(text), *(() if tokenizer.eos_id is None else (tokenizer.eos_id,))]
    return Written(ids, _all_but_first(len(ids), weight), [])


def bare_row(tokenizer: Tokenizer, prompt: str, answer: str, weight: float, *, all_tokens: bool = False) -> Written:
    """A prompt and its answer, one behind the other as plain text, EOS behind them; loss on the answer and EOS.

    The prompt's ids are those it has alone, as when the model is asked. Where the answer's first word would grow
    into one token with the end of the prompt, the answer is encoded apart; a vocabulary that cannot do so without a
    space between the two (SentencePiece) keeps that token, which then carries loss.
    """
    begin, joint = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(prompt + answer)
    ids, start = joint, len(begin)
    if joint[: len(begin)] != begin:
        apart = begin + tokenizer.encode(answer)
        if tokenizer.decode(apart) == tokenizer.decode(joint):
            ids = apart
        else:
            pairs = zip(begin, joint, strict=False)
            start = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(begin), len(joint)))
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = [*ids, *end]
    weights = _all_but_first(len(ids), weight)
    if not all_tokens:
        weights[:start] = 0.0
    like_prompt = ids[: len(begin)] == begin
    return Written(ids, weights, [Answer(start, len(ids), bool(end), like_prompt)])


def _all_but_first(count: int, weight: float) -> NDArray[np.float32]:
    """Weights of targets: nothing stands in front of the first token that could predict it."""
    weights = np.full(count, weight, np.float32)
    weights[:1] = 0.0
    return weights


def _last_run(mask: NDArray[np.bool_]) -> int:
    """Where the last stretch of True begins, the length where there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask]).astype(np.int8)) == 1)
    return int(edges[-1]) if len(edges) else len(mask)

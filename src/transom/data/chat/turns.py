"""Encode conversations and find the tokens of each answer of the assistant.

A conversation is encoded once. An answer starts after its generation prompt. For every answer, the
tokens before it are compared with those of the prompt alone. Some templates write an earlier answer
differently from the last one (Qwen3 drops its reasoning). The conversation then becomes several
rows, and each answer with loss is in a row that writes it as the model has to generate it.

Text that a template leaves out is refused if it is the content of a message, a tool call, the name
of a tool, or reasoning that is missing even in the row of its own answer. Other text that is left
out is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, notice
from transom.chat.conversation import Conversation
from transom.chat.marking import Marked, Path, Text, common_prefix
from transom.chat.messages import REASONING
from transom.chat.template import ChatTemplate
from transom.tokenizers.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]] | None


class AnswerSpan(NamedTuple):
    """The tokens [start, stop) of one answer of the assistant.

    Attributes:
        start: The first token.
        stop: One past the last token.
        ended: Whether one of the tokens ends the turn.
        like_prompt: Whether the tokens before it are those of its generation prompt.
        apart: Whether it was encoded separately, because a token of the joint text would contain
            the end of the prompt and the beginning of the answer.
    """

    start: int
    stop: int
    ended: bool
    like_prompt: bool = True
    apart: bool = False


class EncodedChat(NamedTuple):
    """One row of tokens.

    Attributes:
        id: The example that it comes from.
        ids: Token ids, int32 [T].
        weights: Loss weight of each token as a target, float32 [T]. 0 is context only; the first
            token is always 0, because nothing before it could predict it.
        answers: Where its answers are, if they are known.
        label: Whether its answer is a good one, for labelled answers.
    """

    id: str
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    answers: tuple[AnswerSpan, ...] = ()
    label: bool | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        weights: NDArray[np.float32] | float,
        answers: Sequence[AnswerSpan] = (),
    ) -> EncodedChat:
        """Return a row without an id; one number is the weight of all tokens but the first."""
        if isinstance(weights, float):
            weights = np.full(len(ids), weights, np.float32)
            weights[:1] = 0.0
        return cls("", np.asarray(ids, np.int32), weights, tuple(answers))


# The indices of the tokens of an answer, and `ended` and `like_prompt` of its `AnswerSpan`.
_Found = tuple[NDArray[np.int64], bool, bool]
NOT_FOUND: _Found = np.zeros(0, np.int64), False, False


class Turns:
    """Encodes conversations with one template, and counts the texts that the template leaves out.

    A notice names their kinds.

    Attributes:
        left_out: Texts that are in no row.
        dropped: Reasoning texts that are only in the row of their own answer.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, stop_tokens: Collection[int] = ()
    ) -> None:
        """Encode with a template and its tokenizer.

        Args:
            template: The chat template.
            tokenizer: The tokenizer.
            stop_tokens: Ids that end an answer, besides those of the template and the tokenizer.
        """
        self._template = template
        self._stops = frozenset((*stop_tokens, *template.stop_tokens, *tokenizer.stop_ids))
        self.dropped = self.left_out = 0

    def rows(
        self, messages: Sequence[Mapping[str, Any]], tools: Tools, weights: Sequence[float]
    ) -> list[EncodedChat]:
        """Return rows in which every message with a weight above 0 is an answer with loss.

        Most templates need one row for a conversation. A row ends with its last answer.

        Args:
            messages: The conversation.
            tools: Descriptions of functions, or None.
            weights: The loss weight of each message.

        Raises:
            RequestError: The template does not show where an answer begins and ends, or leaves out
                a part of a message.
        """
        talk = self._conversation(messages, tools)
        rows: list[_RenderedRow] = []
        counted = [at for at, weight in enumerate(weights) if weight > 0]
        for at, (first, prompt) in zip(counted[::-1], talk.answers(counted[::-1]), strict=True):
            if any(row.add(at, first.text, prompt, weights[at]) for row in rows):
                continue
            rows.append(_RenderedRow(self._template, first, self._stops, rows[0] if rows else None))
            if not rows[-1].add(at, first.text, prompt, weights[at]):
                self._count_left_out(talk, rows[-1:], [at])  # a better reason, if there is one
                raise RequestError(
                    f"messages[{at}]: {self._template.origin} does not tell where this answer "
                    "begins and ends; expected a template that writes it after its generation "
                    "prompt, or in {% generation %} blocks"
                )
        self._count_left_out(talk, rows, counted)
        return [row.written() for row in reversed(rows)]

    def whole(
        self, messages: Sequence[Mapping[str, Any]], tools: Tools, weight: float
    ) -> EncodedChat:
        """Return the complete conversation, with one weight for every token but the first."""
        talk = self._conversation(messages, tools)
        row = _RenderedRow(self._template, talk, self._stops)
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        self._count_left_out(talk, [row], answers[-1:])
        return EncodedChat.of(row.ids[row.first :], float(weight))

    def _conversation(self, messages: Sequence[Mapping[str, Any]], tools: Tools) -> Conversation:
        talk, end = self._template.conversation(messages, tools), self._template.end_of_turn
        # The end of a turn may be a word that is not a control token.
        return replace(talk, control_words=[*talk.control_words, *([end] if end else [])])

    def _count_left_out(
        self, talk: Conversation, rows: Sequence[_RenderedRow], answers: Sequence[int]
    ) -> None:
        """Count the texts that are in no row. Raise `RequestError` for words or calls of messages.

        Without them the model would learn an empty answer instead of a call, or an answer without
        its question. Reasoning only has to be in the row of its own answer, because many templates
        drop it from earlier turns on purpose.
        """
        found: dict[Path, list[Text]] = {}
        for text in (text for row in rows for text in row.chat.texts):
            found.setdefault(text.path, []).append(text)
        for path, texts in found.items():
            missing = [text for text in texts if text.lost or text.cut]
            everywhere = len(missing) == len(texts)
            here = path[1] in answers and everywhere
            if missing and _is_reasoning(missing, talk) and not here:
                self.dropped += len(missing)
            elif missing and everywhere:
                text, kind = missing[0], missing[0].kind(talk.given)
                content = path[0] == "messages" and path[2] in ("content", "tool_calls", *REASONING)
                if text.lost and (content or path[-2:] == ("function", "name")):
                    words = " ".join(text.value.split())[:60]
                    what = f"{self._template.origin} leaves out {kind}: {words!r}"
                    expected = "expected a template that writes it, or data without it"
                    raise RequestError(f"{path[0]}[{path[1]}]: {what}; {expected}")
                self.left_out += 1
                what = kind if text.lost else f"a part of {kind}"
                notice(f"{self._template.origin} leaves out: {what}")


def _is_reasoning(texts: Sequence[Text], talk: Conversation) -> bool:
    """Return whether texts are reasoning, in their own field or in a part of the content."""
    path = texts[0].path
    if path[0] != "messages" or talk.messages[int(path[1])]["role"] != "assistant":
        return False
    return path[2] in REASONING or (path[2] == "content" and all(text.cut for text in texts))


def _before(chat: Marked, end: int) -> list[tuple[int, int]]:
    """Return the protected spans that begin before `end`."""
    return [span for span in chat.protected if span[0] < end]


class _RenderedRow:
    """A rendered conversation, encoded once, and the answers found in it."""

    def __init__(
        self,
        template: ChatTemplate,
        talk: Conversation,
        stops: frozenset[int],
        like: _RenderedRow | None = None,
    ) -> None:
        self._template, self._talk, self._stops = template, talk, stops
        self.chat = talk.marked
        self.ids = self._encoded(like)
        self.first = template.first_of(self.ids)
        self._weights = np.zeros(len(self.ids), np.float32)
        self._answers: list[AnswerSpan] = []
        self._controls = self.chat.control_tokens(template.tokenizer, self.ids)

    def _encoded(self, like: _RenderedRow | None) -> list[int]:
        """Return the ids. Those up to the last control token that `like` shares are copied."""
        controls = [] if like is None else like._controls
        same = 0 if like is None else common_prefix(like.chat.text, self.chat.text)
        start, token = next(((a, t) for a, b, t in reversed(controls) if b <= same), (0, 0))
        if like is None or _before(like.chat, start) != _before(self.chat, start):
            return self._template.ids_of(self.chat)
        return like.ids[:token] + self._template.ids_of(self.chat.part(start))

    def add(self, at: int, whole: str, prompt: str | None, weight: float) -> bool:
        """Give message `at` loss as an answer. Return False if the row does not contain it.

        Args:
            at: The number of the message.
            whole: The text of the conversation up to and including the message.
            prompt: The text of its generation prompt; None if the template writes none.
            weight: Its loss weight.
        """
        same = common_prefix(self.chat.text, whole)
        asked = bool(prompt) and whole.startswith(str(prompt))
        start = len(str(prompt)) if asked else None
        if start is None and prompt is not None:
            start = self._template.answer_start(whole, prompt)
        look = self._in_blocks if self._talk.template.generation else self._after_prompt
        places, ended, like_prompt = look(at, whole, same, start)
        like_prompt = like_prompt and asked
        if not len(places):
            return False
        answer = AnswerSpan(int(places[0]), int(places[-1]) + 1, ended, like_prompt)
        if self._answers and answer.stop > self._answers[0].start:
            return False
        self._weights[places] = weight
        self._answers.insert(0, answer)
        return True

    def written(self) -> EncodedChat:
        """Return the row up to the end of its last answer."""
        first, stop = self.first, self._answers[-1].stop
        moved = [
            one._replace(start=one.start - first, stop=one.stop - first) for one in self._answers
        ]
        return EncodedChat.of(self.ids[first:stop], self._weights[first:stop], moved)

    def _after_prompt(self, at: int, whole: str, same: int, start: int | None) -> _Found:
        """Return the tokens of message `at` up to the first that ends a turn, or to the end."""
        if start is None or start > same:
            return NOT_FOUND
        begin, _, like_prompt = self._count(start)
        end, stop = next(self._ends(start), (len(whole) + 1, None))
        ended, alike = end <= len(whole), True
        if stop is None or not ended:
            _, stop, alike = self._count(end if ended else len(whole))
        if (end if ended else len(whole)) > same or not (ended or alike) or begin >= stop:
            return NOT_FOUND
        return np.arange(begin, stop), ended, like_prompt

    def _ends(self, start: int) -> Iterator[tuple[int, int | None]]:
        """Yield where turns end after `start`: a place in the text, and the token if known."""
        word, tokenizer = self._template.end_of_turn, self._template.tokenizer
        if word is not None and tokenizer.token_to_id(word) not in tokenizer.special_ids:
            yield from ((end, None) for _, end in self.chat.template_words([word]) if end > start)
            return
        for _, end, token in self._controls:
            if end > start and self.ids[token] in self._stops:
                yield end, token + 1

    def _in_blocks(self, at: int, whole: str, same: int, start: int | None) -> _Found:
        """Return the tokens in the generation blocks of message `at`, and the end of its turn."""
        if start is None:  # blocks after the messages before
            (before,) = self._talk.beginnings([(at, False)])
            start = common_prefix(before or "", whole)
        spans = [(max(a, start), b) for a, b in self.chat.spans if start < b <= same]
        bounds = ((self._count(a)[0], self._count(b)[1]) for a, b in spans)
        places = np.asarray([place for bound in bounds for place in range(*bound)], np.int64)
        if not len(places):
            return NOT_FOUND
        ended = any(self.ids[one] in self._stops for one in places)
        stop = int(places[-1]) + 1
        if not ended and stop < len(self.ids) and self.ids[stop] in self._stops:
            places, ended = np.append(places, stop), True  # the block does not contain the end
        like_prompt = self._count(start)[2]
        return (places, ended, like_prompt) if ended or same == len(whole) else NOT_FOUND

    def _count(self, length: int) -> tuple[int, int, bool]:
        """Return how many tokens end in the first `length` characters, how many begin in them, and
        whether they are the same tokens as those of these characters alone.

        Text is encoded separately between control tokens, so only the text after the last one is
        encoded again.
        """
        before = ((a, t) for a, b, t in reversed(self._controls) if b <= length)
        start, token = next(before, (0, 0))
        alone = self._template.ids_of(self.chat.part(start, length))
        count = token + common_prefix(alone, self.ids[token : token + len(alone)])
        first, size, decode = count, 0, partial(self._template.tokenizer.decode, skip_special=False)
        characters = len(decode(alone[count - token :]))
        while size < characters and count < len(self.ids):
            count += 1
            size = len(decode(self.ids[first:count]))
        return count - (size > characters), count, first - token == len(alone)


def text_row(tokenizer: Tokenizer, text: str, weight: float) -> EncodedChat:
    """Return a document between the tokens that its tokenizer puts first and EOS. All tokens but
    the first have loss.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = [*tokenizer.encode_prompt(text), *end]
    return EncodedChat.of(ids, float(weight))


def bare_row(
    tokenizer: Tokenizer, prompt: str, answer: str, weight: float, *, all_tokens: bool = False
) -> EncodedChat:
    """Return a prompt, its answer and EOS as plain text, with loss on the answer and EOS.

    The ids of the prompt are those that it has alone, as at inference. If a token of the joint text
    contains the end of the prompt and the beginning of the answer, the answer is encoded
    separately. A vocabulary that can't do this without a space between the two (SentencePiece)
    keeps the token, which then has loss.
    """
    begin, joint = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(prompt + answer)
    ids, start, separable = joint, len(begin), False
    if joint[: len(begin)] != begin:
        apart = begin + tokenizer.encode(answer)
        if separable := tokenizer.decode(apart) == tokenizer.decode(joint):
            ids = apart
        else:
            pairs = zip(begin, joint, strict=False)
            differ = (at for at, (one, other) in enumerate(pairs) if one != other)
            start = next(differ, min(len(begin), len(joint)))
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = [*ids, *end]
    answer_span = AnswerSpan(start, len(ids), bool(end), ids[: len(begin)] == begin, separable)
    row = EncodedChat.of(ids, float(weight), [answer_span])
    if not all_tokens:
        row.weights[:start] = 0.0
    return row

"""Separate the reasoning of a model from its answer.

Models write their reasoning between two markers (`<think>`, `</think>`) or into channels of its own
(gpt-oss). The markers come from the chat template, which writes them, or from the vocabulary.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transom.chat.marking import common_prefix
from transom.chat.template import ANSWER, PROBE, QUESTION, ChatTemplate
from transom.tokenizers.tokenizer import Tokenizer

Kind = Literal["reasoning", "answer"]
Piece = tuple[Kind, str]
# Markers to look for in vocabularies and in templates that do not write the reasoning of earlier
# turns.
PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),
)
START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CHANNELS = (START, CHANNEL, MESSAGE, END)
FINAL = "final"  # the channel of the answer
LONGEST_HEADER = 200  # characters: a model that writes more without <|message|> writes no channels
THOUGHT = "Qx7thought"


@dataclass(frozen=True)
class Markers:
    """How a model sets its reasoning apart.

    Attributes:
        opens: The marker before the reasoning; empty with channels.
        closes: The marker after the reasoning.
        channels: Whether the model writes channels instead.
        head: The template's prompt for an answer, which may open the reasoning.
    """

    opens: str
    closes: str
    channels: bool = False
    head: str = ""

    def splitter(self, *, begun: bool = False) -> Splitter:
        """Return a splitter for one answer after the template's prompt for it.

        With `begun`, the model continues the first words of an answer instead.
        """
        splitter: Splitter = (
            ChannelSplitter() if self.channels else PairSplitter(self.opens, self.closes)
        )
        opened = f"{CHANNEL}{FINAL}{MESSAGE}" if self.channels else ""
        splitter.begin(opened if begun else self.head)
        return splitter

    def control_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the ids of the control tokens in the markers, which the text must show."""
        words = CHANNELS if self.channels else (self.opens, self.closes)
        special = tokenizer.special_tokens
        return tuple(
            id for spelling, id in special.items() if any(spelling in word for word in words)
        )


def find_markers(template: ChatTemplate, **values: Any) -> Markers | None:
    """Return the markers of a model's reasoning; None if neither template nor vocabulary has any.

    `values` are those that the chat gives the template, which may switch reasoning off.
    """
    special = template.tokenizer.special_tokens
    head = ""
    bare, asked = (template.probe(QUESTION, prompt=prompt, **values) for prompt in (False, True))
    if bare is not None and asked is not None:
        head = asked[common_prefix(asked, bare) :]
    if all(word in special for word in CHANNELS):
        return Markers("", "", channels=True, head=head)
    written = _written(template)
    if written is not None:
        return Markers(*written, head=head)
    for opens, closes in PAIRS:
        named = opens in head or any(closes in source for source in template.sources.values())
        known = all(template.tokenizer.token_to_id(word) is not None for word in (opens, closes))
        if named or known:
            return Markers(opens, closes, head=head)
    return None


def _written(template: ChatTemplate) -> tuple[str, str] | None:
    """Return the markers that a template writes around reasoning, or None."""
    asked = template.probe(QUESTION, prompt=True)
    text = template.probe(QUESTION, {**ANSWER, "reasoning_content": THOUGHT}) or ""
    found = re.search(f"{THOUGHT}(.*?){PROBE}", text, re.DOTALL)
    if asked is None or found is None or not text.startswith(asked.rstrip()):
        return None
    asked = asked.rstrip()
    opens, closes = text[len(asked) : found.start()].strip(), found[1].strip()
    if not opens:  # the prompt for the answer has opened the reasoning
        opens = next((one for one, other in PAIRS if other == closes), asked.rpartition("\n")[2])
    return (opens, closes) if closes else None


def split(text: str, markers: Markers | None, *, begun: bool = False) -> tuple[str, str]:
    """Return the reasoning and the answer of a complete text."""
    if markers is None:
        return "", text
    splitter = markers.splitter(begun=begun)
    splitter.push(text)
    splitter.finish()
    return splitter.reasoning, splitter.answer


def marker_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of all known control tokens that set reasoning apart."""
    special = tokenizer.special_tokens
    groups = [group for group in (*PAIRS, CHANNELS) if all(word in special for word in group)]
    return tuple(special[word] for group in groups for word in group)


class Splitter(ABC):
    """Separates reasoning and answer while the text of an answer arrives piece by piece."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = markers
        self._find = re.compile(
            "|".join(re.escape(one) for one in sorted(markers, key=len, reverse=True))
        )
        self._waiting = ""  # the end of the text, as far as it may begin a marker
        self._texts: dict[Kind, str] = {"reasoning": "", "answer": ""}
        self._reasoned = False  # whether there was any reasoning, even an empty one

    @property
    def reasoning(self) -> str:
        """The reasoning so far, without markers and without line ends around it."""
        return self._texts["reasoning"].strip("\n")

    @property
    def answer(self) -> str:
        """The answer so far, without line ends between it and the reasoning."""
        return self._texts["answer"]

    def begin(self, head: str) -> None:
        """Read the template's prompt for the answer, which may end inside the reasoning."""
        for text, marker in self._cut(head):
            self._take(text, marker)
        self._waiting = ""

    def push(self, text: str) -> list[Piece]:
        """Return the pieces that can be shown after `text`; the beginning of a marker waits."""
        return [piece for part, marker in self._cut(text) for piece in self._take(part, marker)]

    def finish(self) -> list[Piece]:
        """Return the pieces that waited for more text, when no more comes."""
        text, self._waiting = self._waiting, ""
        return self._take(text, False) + self._rest()

    def _cut(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (text, False) and (marker, True) in order."""
        text = self._waiting + text
        start = 0
        for found in self._find.finditer(text):
            if found.start() > start:
                yield text[start : found.start()], False
            yield found[0], True
            start = found.end()
        most = min(len(text) - start, max(map(len, self._markers)) - 1)
        heads = (
            size
            for size in range(most, 0, -1)
            if any(m.startswith(text[-size:]) for m in self._markers)
        )
        end = len(text) - next(heads, 0)
        self._waiting = text[end:]
        if end > start:
            yield text[start:end], False

    @abstractmethod
    def _take(self, text: str, marker: bool) -> list[Piece]:
        """Return the pieces for a marker, or for text without one."""

    @abstractmethod
    def _rest(self) -> list[Piece]:
        """Return the pieces that wait for more than the rest of a marker."""

    def _piece(self, kind: Kind, text: str) -> list[Piece]:
        if self._reasoned and not self._texts[kind]:
            text = text.lstrip("\n")
        self._texts[kind] += text
        return [(kind, text)] if text else []


class PairSplitter(Splitter):
    """Reasoning between two markers before the answer.

    A marker inside the answer is a word of the answer. If the end of the reasoning comes without
    its beginning, all text before it was reasoning.
    """

    def __init__(self, opens: str, closes: str) -> None:
        super().__init__((opens, closes))
        self._opens, self._closes = opens, closes
        self._state: Literal["start", "reasoning", "answer"] = "start"
        self._space = ""  # white space at the beginning, which may precede a marker

    def begin(self, head: str) -> None:
        """Find out from the template's prompt whether the answer begins inside the reasoning."""
        for text in self._find.findall(head):
            self._state, self._reasoned = ("reasoning" if text == self._opens else "answer"), True

    def _take(self, text: str, marker: bool) -> list[Piece]:
        if marker and text == self._opens and self._state == "start":
            self._state, self._reasoned, self._space = "reasoning", True, ""
            return []
        if marker and text == self._closes and self._state == "reasoning":
            self._state = "answer"
            return []
        if marker and text == self._closes and not self._reasoned:
            self._texts = {"reasoning": self._texts["answer"] + self._space, "answer": ""}
            self._state, self._reasoned, self._space = "answer", True, ""
            return [("reasoning", "")]
        if self._state == "reasoning":
            return self._piece("reasoning", text)
        if self._state == "start" and not text.strip():
            self._space += text
            return []
        self._state = "answer"
        return self._piece("answer", self._spaced(text))

    def _rest(self) -> list[Piece]:
        return self._piece("answer", self._spaced(""))

    def _spaced(self, text: str) -> str:
        """Return the white space that waited, followed by `text`."""
        text, self._space = self._space + text, ""
        return text


class ChannelSplitter(Splitter):
    """Messages in channels: the channel `final` is the answer, all others are reasoning.

    Messages of one kind are joined by line ends. Text of a model that writes no channels is the
    answer.
    """

    def __init__(self) -> None:
        super().__init__(CHANNELS)
        self._header: str | None = ""  # of the next message; None inside a message
        self._in_channel = False  # whether the header has reached the name of its channel
        self._kind: Kind = "answer"

    def _take(self, text: str, marker: bool) -> list[Piece]:
        if not marker and self._header is None:
            return self._piece(self._kind, text)
        if not marker:
            self._header = (self._header or "") + text
            return self._rest() if len(self._header) > LONGEST_HEADER else []
        if text == MESSAGE:
            self._kind = "answer" if FINAL in (self._header or "").split() else "reasoning"
            self._reasoned |= self._kind == "reasoning"
            self._header = None
            return self._piece(self._kind, "\n") if self._texts[self._kind] else []
        if text == CHANNEL:
            self._header, self._in_channel = f"{self._header or ''} ", True
            return []
        pieces = self._rest()
        self._header, self._in_channel = "", False
        return pieces

    def _rest(self) -> list[Piece]:
        """Return a header as text if it has no channel, since then it was not a header."""
        text = (
            ""
            if self._header is None or self._in_channel
            else self._header.removeprefix("assistant")
        )
        if text:
            self._header = None
            self._kind = "answer"
        return self._piece("answer", text)

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
        opens: The marker before the reasoning; empty if the model writes channels.
        closes: The marker after the reasoning; empty if the model writes channels.
        head: The template's prompt for an answer, which may open the reasoning.
    """

    opens: str
    closes: str
    head: str = ""

    @property
    def channels(self) -> bool:
        """Whether the model writes its reasoning into channels of its own."""
        return not self.closes

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
    bare, asked = (template.probe(QUESTION, prompt=prompt, **values) for prompt in (False, True))
    head = "" if bare is None or asked is None else asked[common_prefix(asked, bare) :]
    if all(word in special for word in CHANNELS):
        return Markers("", "", head)
    if (written := _written(template)) is not None:
        return Markers(*written, head)
    for opens, closes in PAIRS:
        named = opens in head or any(closes in source for source in template.sources.values())
        known = all(template.tokenizer.token_to_id(word) is not None for word in (opens, closes))
        if named or known:
            return Markers(opens, closes, head)
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
        longest_first = sorted(markers, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first)))
        self._waiting = ""  # the end of the text, as far as it may begin a marker
        self._kind: Kind | None = None  # of the text that follows; None until it is known
        self._undecided = ""  # the text whose kind is not known yet
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
        self.push(head)
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
        ends = (text[-size:] for size in range(most, 0, -1))
        self._waiting = next(
            (end for end in ends if any(m.startswith(end) for m in self._markers)), ""
        )
        end = len(text) - len(self._waiting)
        if end > start:
            yield text[start:end], False

    def _take(self, text: str, marker: bool) -> list[Piece]:
        """Return the pieces for a marker, or for text without one."""
        if marker:
            return self._mark(text)
        if self._kind is not None:
            return self._piece(self._kind, text)
        self._undecided += text
        return self._rest() if self._is_answer() else []

    @abstractmethod
    def _mark(self, marker: str) -> list[Piece]:
        """Return the pieces for a marker."""

    @abstractmethod
    def _is_answer(self) -> bool:
        """Whether the undecided text is the answer, whatever follows."""

    @abstractmethod
    def _rest(self) -> list[Piece]:
        """Return the undecided text as the answer."""

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

    def begin(self, head: str) -> None:
        """Find out from the template's prompt whether the answer begins inside the reasoning."""
        for marker in self._find.findall(head):
            self._kind, self._reasoned = ("reasoning" if marker == self._opens else "answer"), True

    def _mark(self, marker: str) -> list[Piece]:
        if marker == self._opens and self._kind is None:
            self._kind, self._reasoned, self._undecided = "reasoning", True, ""
            return []
        if marker == self._closes and self._kind == "reasoning":
            self._kind = "answer"
            return []
        if marker == self._closes and not self._reasoned:
            self._texts = {"reasoning": self._texts["answer"] + self._undecided, "answer": ""}
            self._kind, self._reasoned, self._undecided = "answer", True, ""
            return [("reasoning", "")]
        return self._take(marker, False)

    def _is_answer(self) -> bool:
        return bool(self._undecided.strip())

    def _rest(self) -> list[Piece]:
        text, self._undecided = self._undecided, ""
        self._kind = self._kind or "answer"
        return self._piece("answer", text)


class ChannelSplitter(Splitter):
    """Messages in channels: the channel `final` is the answer, all others are reasoning.

    Messages of one kind are joined by line ends. Text of a model that writes no channels is the
    answer. The undecided text is the header of the next message.
    """

    def __init__(self) -> None:
        super().__init__(CHANNELS)
        self._in_channel = False  # whether the header has reached the name of its channel

    def _mark(self, marker: str) -> list[Piece]:
        if marker == MESSAGE:
            self._kind = "answer" if FINAL in self._undecided.split() else "reasoning"
            self._undecided = ""
            self._reasoned |= self._kind == "reasoning"
            return self._piece(self._kind, "\n") if self._texts[self._kind] else []
        pieces: list[Piece] = []
        header = f"{self._undecided} " if self._kind is None else " "
        if marker != CHANNEL:
            pieces, header = self._rest(), ""
        self._kind, self._undecided, self._in_channel = None, header, marker == CHANNEL
        return pieces

    def _is_answer(self) -> bool:
        return len(self._undecided) > LONGEST_HEADER

    def _rest(self) -> list[Piece]:
        """Return a header as text if it has no channel, since then it was not a header."""
        undecided = self._kind is None and not self._in_channel
        text = self._undecided.removeprefix("assistant") if undecided else ""
        if text:
            self._kind, self._undecided = "answer", ""
        return self._piece("answer", text)

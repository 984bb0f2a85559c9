"""Separate the reasoning of a model from its answer.

Models write their reasoning between two markers (`<think>`, `</think>`) or into channels of its own
(gpt-oss). The markers come from the chat template, which writes them, or from the vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from transom.chat.marking import common_prefix
from transom.chat.template import ANSWER, PROBE, QUESTION, ChatTemplate
from transom.tokenizers.stream import overlap
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
# What stands between two messages in channels, in a text that has <|end|> before each channel. A
# pattern with a fixed beginning is found fifteen times as fast, and a stream looks for it often.
BETWEEN = re.compile(r"<\|(?:end\|>|start\|>(?:[^<]*(?=<\|end\|><\|channel\|>)|(?:assistant)?))")
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
        if self.channels:
            return Splitter(self, f"{CHANNEL}{FINAL}{MESSAGE}" if begun else self.head)
        either = "|".join(map(re.escape, (self.opens, self.closes)))
        return Splitter(self, "" if begun else "".join(re.findall(either, self.head)))

    def separate(self, text: str) -> dict[Kind, str]:
        """Return reasoning and answer of a text that may end anywhere."""
        if self.channels:
            return _separate_channels(text)
        before, closed, after = text.partition(self.closes)
        opened = before.lstrip().startswith(self.opens)
        if not opened and not closed:
            return {"reasoning": "", "answer": text}
        before = before.lstrip().removeprefix(self.opens) if opened else before
        return {"reasoning": before.strip("\n"), "answer": after.lstrip("\n")}

    def undecided(self, text: str) -> int:
        """Return how many characters at the end of a text may be shown only after more of it."""
        header = text[text.rfind(START) :] if self.channels and START in text else ""
        if header and not any(marker in header for marker in (MESSAGE, END)):
            return len(header) if len(header) <= LONGEST_HEADER else 0
        words = CHANNELS if self.channels else (self.opens, self.closes)
        waiting = max(overlap(text, word) for word in words)
        blank = not text[: len(text) - waiting].strip()  # a marker may still come first
        return len(text) if blank else waiting

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


def _separate_channels(text: str) -> dict[Kind, str]:
    """Return reasoning and answer of a text in channels.

    The channel `final` is the answer, and all others are reasoning. Messages of one kind are joined
    by line ends. Text of a model that writes no channels is the answer.
    """
    parts: dict[Kind, str] = {"reasoning": "", "answer": ""}
    for message in BETWEEN.split(text.replace(CHANNEL, END + CHANNEL)):
        header, is_message, words = message.partition(MESSAGE)
        final = FINAL in header.replace(CHANNEL, " ").split()
        if is_message and words:
            kind: Kind = "answer" if final else "reasoning"
            parts[kind] += f"\n{words}" if parts[kind] else words
        elif not is_message and CHANNEL not in header:
            parts["answer"] += header
    return {"reasoning": parts["reasoning"].strip("\n"), "answer": parts["answer"]}


def marker_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of all known control tokens that set reasoning apart."""
    special = tokenizer.special_tokens
    groups = [group for group in (*PAIRS, CHANNELS) if all(word in special for word in group)]
    return tuple(special[word] for group in groups for word in group)


class Splitter:
    """Separates reasoning and answer while the text of an answer arrives piece by piece.

    The text so far is separated again with every piece, and what is new in the result is returned.

    Args:
        markers: How the model sets its reasoning apart.
        begin: The markers in front of the text, which may open the reasoning.
    """

    def __init__(self, markers: Markers, begin: str) -> None:
        self._markers, self._text = markers, begin
        self._parts: dict[Kind, str] = {"reasoning": "", "answer": ""}

    @property
    def reasoning(self) -> str:
        """The reasoning so far, without markers and without line ends around it."""
        return self._parts["reasoning"]

    @property
    def answer(self) -> str:
        """The answer so far, without line ends between it and the reasoning."""
        return self._parts["answer"]

    def push(self, text: str) -> list[Piece]:
        """Return the pieces that can be shown after `text`; the beginning of a marker waits."""
        self._text += text
        return self._show(self._text[: len(self._text) - self._markers.undecided(self._text)])

    def finish(self) -> list[Piece]:
        """Return the pieces that waited for more text, when no more comes."""
        return self._show(self._text)

    def _show(self, text: str) -> list[Piece]:
        """Return what is new in the reasoning and the answer of the text so far."""
        pieces: list[Piece] = []
        parts, before = self._markers.separate(text), self._parts
        if not parts["answer"].startswith(before["answer"]):
            # The end of the reasoning came without its beginning: the answer was reasoning.
            pieces, before = [("reasoning", "")], {**parts, "answer": ""}
        self._parts = parts
        new: list[Piece] = [(kind, part[len(before[kind]) :]) for kind, part in parts.items()]
        return pieces + [piece for piece in new if piece[1]]

"""Which words of a rendered chat are the template's and which came in with the messages.

A rendered chat is one text, and a message that spells `<|eot_id|>` looks in it like the end of a turn. So the
chat is rendered a second time with invisible marks around such words. Where both renderings agree but for the
marks, the marks tell the two kinds apart; where a template's logic depends on such a word, the chat is refused.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transom.errors import RequestError
from transom.tokenizer import Tokenizer

# Names of the parts of a message that templates build control tokens from (`'<|' + role + '|>'`).
NAMING = ("role", "type")


@dataclass(frozen=True)
class Marks:
    """Four characters that occur in none of the texts at hand: around words of users, around what is said."""

    user: tuple[str, str]
    said: tuple[str, str]

    @classmethod
    def unused_in(cls, texts: Iterable[str]) -> Marks:
        """Marks out of Unicode's private planes."""
        used = set().union(*texts)
        free = (character for code in range(0xF0000, 0x110000) if (character := chr(code)) not in used)
        first, second, third, fourth = islice(free, 4)
        return cls((first, second), (third, fourth))

    @property
    def all(self) -> str:
        """The four of them."""
        return "".join(self.user + self.said)


@dataclass
class Marked:
    """A rendered chat without its marks, and what they said, as offsets in characters of `text`."""

    text: str = ""
    # What came in with a message and spells a control token, and points that no control token reaches across.
    protected: list[tuple[int, int]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # what `{% generation %}` encloses


def strings(value: Any) -> Iterator[str]:
    """Every string of plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from (*strings(key), *strings(one))
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


class Marker:
    """Puts marks into what users said, and takes them out of what was rendered."""

    def __init__(self, words: Iterable[str], marks: Marks) -> None:
        longest_first = sorted(words, key=len, reverse=True)
        self.marks = marks
        self._words = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._heads = frozenset(word[:size] for word in longest_first for size in range(1, len(word)))
        self._tails = frozenset(word[size:] for word in longest_first for size in range(1, len(word)))
        opened, closed = map(re.escape, marks.user)
        self._found = re.compile(f"{opened}(?:{self._words.pattern}){closed}|[{re.escape(marks.all)}]")

    def mark(self, value: Any, naming: bool = False) -> Any:
        """A copy with marks around control words, and at ends where one could grow together with its neighbour."""
        if isinstance(value, dict):
            return {self._words.sub(self._around, key): self.mark(one, key in NAMING) for key, one in value.items()}
        if isinstance(value, list):
            return [self.mark(one) for one in value]
        if not isinstance(value, str):
            return value
        marked = self._words.sub(self._around, value)
        if naming:
            return marked
        seam, sizes = self.marks.user[1], range(1, 1 + max(map(len, self._heads), default=0))
        before = seam if any(value[:size] in self._tails for size in sizes) else ""
        after = seam if any(value[-size:] in self._heads for size in sizes) else ""
        return f"{before}{marked}{after}"

    def words_in(self, text: str) -> list[str]:
        """The control words that a text spells."""
        return self._words.findall(text)

    def _around(self, word: re.Match[str]) -> str:
        return f"{self.marks.user[0]}{word[0]}{self.marks.user[1]}"

    def strip(self, rendered: str) -> Marked:
        """The text without marks, and where they were."""
        out, pieces, length, start = Marked(), [], 0, 0
        opened: list[int] = []
        for found in self._found.finditer(rendered):
            pieces.append(rendered[start : found.start()])
            length += len(pieces[-1])
            start, mark = found.end(), found[0]
            if len(mark) > 1:
                pieces.append(mark[1:-1])
                out.protected.append((length, length + len(mark) - 2))
                length += len(mark) - 2
            elif mark == self.marks.said[0]:
                opened.append(length)
            elif mark == self.marks.said[1] and opened:
                out.spans.append((opened.pop(), length))
            elif mark in self.marks.user:
                out.protected.append((length, length))
        out.text = "".join([*pieces, rendered[start:]])
        return out


# -- which token stands where ------------------------------------------------------------------------


def token_ranges(tokenizer: Tokenizer, ids: list[int], text: str, what: str) -> list[tuple[int, int]]:
    """The characters of `text` that each id stands for, checked: what the ids decode to is the text.

    Tokens that share a character (its bytes) have the same range. White space may lie between tokens that
    swallow it, and before the first, where some vocabularies write a space of their own.
    """
    ranges: list[tuple[int, int]] = []
    held, at = 0, 0
    pieces = _pieces(tokenizer, ids)
    for count, piece in pieces:
        held += count
        if not piece:
            continue
        found = next((start for start in _starts(text, at) if text.startswith(piece, start)), None)
        if found is None and text.startswith(piece.lstrip(" "), at):
            found, piece = at, piece.lstrip(" ")
        if found is None:
            raise RequestError(
                f"{what}: its tokens decode to {piece[:20]!r} where the text has {text[at : at + 20]!r}; accepted "
                "for a loss mask is a tokenizer that keeps text as it is"
            )
        at = found + len(piece)
        ranges += [(found, at)] * held
        held = 0
    return ranges + [(at, at)] * held


def _starts(text: str, at: int) -> Iterator[int]:
    """Here, and behind any white space that follows."""
    yield at
    while at < len(text) and text[at].isspace():
        at += 1
        yield at


def _pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
    """(ids taken, the text they complete): "" while a character is unfinished."""
    decoder = tokenizer.stream(skip_special=False)
    for id in ids:
        if id in tokenizer.special_ids:
            yield 0, decoder.finish()
            yield 1, tokenizer.id_to_token(id) or ""
        else:
            yield 1, decoder.push(id)
    yield 0, decoder.finish()


def mask_of(ranges: Iterable[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> list[bool]:
    """True for each token that stands for a character of a span; the ranges come in the order of the text."""
    mask: list[bool] = []
    left = deque(sorted(spans))
    for start, stop in ranges:
        while left and left[0][1] <= start:
            left.popleft()
        mask.append(bool(left) and left[0][0] < stop)
    return mask

"""Tells which words of a rendered chat come from the template or the messages, and which texts are
left out.

A rendered chat is one text, and a message that spells `<|eot_id|>` looks in it like the end of a
turn. So the chat is rendered a second time with invisible marks around such words. Where both
renderings agree but for the marks, the marks tell the two kinds apart; where a template's logic
depends on such a word, the chat is refused.

Every text of the messages and tools has marks of its own, which tell where the template writes it.
If the marks of a text are missing, the template leaves it out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

from transom.base.errors import RequestError
from transom.chat.messages import REASONING
from transom.tokenizers.tokenizer import Tokenizer

# Names of the parts of a message that templates build control tokens from (`'<|' + role + '|>'`).
NAMING = ("role", "type")
# Names of parts that templates compare or leave out on purpose, and so are not expected to write.
KEYS = (*NAMING, "id", "tool_call_id", "call_id", "required")
# A word that no template looks for: it is not in angle or square brackets and does not follow a
# slash.
WORD = re.compile(r"(?<![\w<\[|/\\{])[^\W_]\w*(?![\w>\]|}])")
CLOSED = re.compile(r"</\w+>\s*$")

Path = tuple[str | int, ...]  # keys and numbers that lead to a text: ("messages", 0, "content")


@dataclass(frozen=True)
class Marks:
    """Pairs of marker characters that no text of this conversation contains.

    `user` encloses control words in messages, `said` the template's generation blocks, `text` the
    number of a text.
    """

    user: tuple[str, str]
    said: tuple[str, str]
    text: tuple[str, str]
    tag: str

    @classmethod
    def unused_in(cls, texts: Iterable[str]) -> Marks:
        """Marks out of Unicode's private planes."""
        used = set().union(*texts)
        free = (
            character for code in range(0xF0000, 0x110000) if (character := chr(code)) not in used
        )
        one, two, three, four, five, six, seven = islice(free, 7)
        return cls((one, two), (three, four), (five, six), seven)


@dataclass
class Text:
    """A text of the messages or tools by its path; `marks` counts its marks, `offsets` are of
    written ones.
    """

    path: Path
    value: str
    marks: int = 0
    offsets: list[int] = field(default_factory=list)
    written: set[int] = field(default_factory=set)  # which of its marks

    def found_in(self, text: str) -> Text:
        """Return this text as found by its words, for templates that write something else if there
        are marks.
        """
        words = self.value.strip()
        there = any(
            one in text
            for one in (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
        )
        return Text(
            self.path, self.value, self.marks, [], set(range(self.marks)) if there else set()
        )

    @property
    def lost(self) -> bool:
        """Whether the template writes nothing of it."""
        return not self.written

    @property
    def cut(self) -> bool:
        """Whether the template writes only a part of it."""
        return 0 < len(self.written) < self.marks


@dataclass
class Marked:
    """A rendered chat without its marks, and what they said, as offsets in characters of `text`."""

    text: str = ""
    # What came in with a message and spells a control token, and points that no control token
    # reaches across.
    protected: list[tuple[int, int]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # what `{% generation %}` encloses
    # The texts of the messages and tools, by number; None if marks would change what the template
    # writes.
    texts: list[Text] | None = None

    def first_offset(self, message: int) -> int | None:
        """Return the first character known to belong to a text of this message, or None."""
        return min(self._offsets.get(message, ()), default=None)

    def last_offset(self, message: int) -> int | None:
        """Return the last character known to belong to a text of this message, or None."""
        return max(self._offsets.get(message, ()), default=None)

    @cached_property
    def _offsets(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for one in self.texts or ():
            if one.path[0] == "messages":
                found.setdefault(int(one.path[1]), []).extend(one.offsets)
        return found


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning of two texts or two lists."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    low, high = 0, limit  # the same up to `low`, different before `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


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


def kind_of(text: Text, given: Mapping[str, Any]) -> str:
    """Return the kind of a text in words: `content of system`, `description of tools`."""
    names = [part for part in text.path if isinstance(part, str)]
    if text.path[0] != "messages":
        return f"{names[-1]} of {names[0]}"
    role = given["messages"][text.path[1]]["role"]
    return f"{'tool_calls' if 'tool_calls' in names else names[1]} of {role}"


class Marker:
    """Puts marks into what users said, and takes them out of what was rendered."""

    def __init__(self, words: Iterable[str], marks: Marks, texts: bool = False) -> None:
        longest_first = sorted(words, key=len, reverse=True)
        self.marks = marks
        self.texts: list[Text] | None = [] if texts else None
        self._known: dict[Path, int] = {}
        self._words = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._heads = frozenset(
            word[:size] for word in longest_first for size in range(1, len(word))
        )
        self._tails = frozenset(
            word[size:] for word in longest_first for size in range(1, len(word))
        )
        opened, closed, said, unsaid, begin, end = map(
            _spellings, (*marks.user, *marks.said, *marks.text)
        )
        self._found = re.compile(
            f"{opened}(?P<word>{self._words.pattern}){closed}|{begin}(?P<text>[0-9]+){end}"
            f"|(?P<said>{said})|(?P<unsaid>{unsaid})|(?P<user>{opened}|{closed})|{begin}|{end}"
        )

    def mark(self, value: Any, path: Path = ()) -> Any:
        """A copy with marks around control words, and at ends where one could grow together with
        its neighbour.
        """
        if isinstance(value, dict):
            return {
                self._words.sub(self._around, key): self.mark(one, (*path, key))
                for key, one in value.items()
            }
        if isinstance(value, list):
            return [self.mark(one, (*path, at)) for at, one in enumerate(value)]
        if not isinstance(value, str):
            return value
        marked = self._marked(value, path)
        if path and path[-1] in NAMING:
            return marked
        seam, sizes = self.marks.user[1], range(1, 1 + max(map(len, self._heads), default=0))
        before = seam if any(value[:size] in self._tails for size in sizes) else ""
        after = seam if any(value[-size:] in self._heads for size in sizes) else ""
        return f"{before}{marked}{after}"

    def _marked(self, value: str, path: Path) -> str:
        """Return a text with marks around its control words, and with its own marks."""
        places = self._places(value, path)
        edges = [0, *places, len(value)]
        pieces = [self._words.sub(self._around, value[a:b]) for a, b in pairwise(edges)]
        if not places or self.texts is None:
            return "".join(pieces)
        name = tuple(REASONING[0] if part in REASONING else part for part in path)
        number = self._known.setdefault(name, len(self.texts))
        if number == len(self.texts):
            self.texts.append(Text(name, value, len(places)))
        begin, end = self.marks.text
        for at in range(len(places)):
            pieces[at] += f"{begin}{number}{at}{end}"
        return "".join(pieces)

    def _places(self, value: str, path: Path) -> list[int]:
        """Return the places of a text's own marks: in the first word that no template looks for,
        and at the end.

        Templates look for closing tags, so if the text ends with one, the last word is marked
        instead.
        """
        inside = self.texts is not None and path[:1] in (("messages",), ("tools",), ("documents",))
        of_part = (
            len(path) > 4 and path[2] == "content" and path[4] != "text"
        )  # the file of an image
        if not inside or of_part or any(part in KEYS for part in path) or not value.strip():
            return []
        taken = [match.span() for match in self._words.finditer(value)]
        words = (
            match.start() + 1
            for match in WORD.finditer(value)
            if not any(start < match.end() and match.start() < stop for start, stop in taken)
        )
        end = len(value.rstrip())
        first = next(words, end)
        last = deque(words, 1) or [first] if CLOSED.search(value) else [end]
        return sorted({first, *last})

    def words_in(self, text: str) -> list[str]:
        """The control words that a text spells."""
        return self._words.findall(text)

    def _around(self, word: re.Match[str]) -> str:
        return f"{self.marks.user[0]}{word[0]}{self.marks.user[1]}"

    def strip(self, rendered: str) -> Marked:
        """The text without marks, and where they were."""
        texts = (
            None
            if self.texts is None
            else [Text(one.path, one.value, one.marks) for one in self.texts]
        )
        out, pieces, length, start = Marked(texts=texts), [], 0, 0
        opened: list[int] = []
        for found in self._found.finditer(rendered):
            pieces.append(rendered[start : found.start()])
            length += len(pieces[-1])
            start, kind = found.end(), found.lastgroup
            if kind == "word":
                pieces.append(found["word"])
                out.protected.append((length, length + len(pieces[-1])))
                length += len(pieces[-1])
            elif kind == "text" and texts is not None:
                text = texts[int(found["text"][:-1])]
                text.written.add(int(found["text"][-1]))
                text.offsets.append(length)
            elif kind == "said":
                opened.append(length)
            elif kind == "unsaid" and opened:
                out.spans.append((opened.pop(), length))
            elif kind == "user":
                out.protected.append((length, length))
        out.text = "".join([*pieces, rendered[start:]])
        return out


def _spellings(mark: str) -> str:
    """Return a pattern for a mark and for its escaped form in ASCII JSON."""
    return f"(?:{re.escape(mark)}|{re.escape(json.dumps(mark)[1:-1])})"


# -- which token stands where
# ------------------------------------------------------------------------


def token_ranges(
    tokenizer: Tokenizer, ids: list[int], text: str, what: str
) -> list[tuple[int, int]]:
    """The characters of `text` that each id stands for, checked: what the ids decode to is the
    text.

    Tokens that share a character (its bytes) have the same range. White space may lie between
    tokens that swallow it, and before the first, where some vocabularies write a space of their
    own.
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
                f"{what}: its tokens decode to {piece[:20]!r} where the text has "
                f"{text[at : at + 20]!r}; accepted "
                "for a loss mask is a tokenizer that keeps text as it is"
            )
        at = found + len(piece)
        ranges += [(found, at)] * held
        held = 0
    return ranges + [(at, at)] * held


class TokenPlaces:
    """The characters for which each id stands, also if the vocabulary composes characters, which
    moves them.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int], text: str, what: str) -> None:
        self._text: str | None = None
        try:
            self.ranges = token_ranges(tokenizer, ids, text, what)
        except RequestError:
            composed = unicodedata.normalize("NFC", text)
            if composed == text:
                raise
            self._text, self.ranges = text, token_ranges(tokenizer, ids, composed, what)

    def moved(self, spans: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Return spans of the text as they lie among the ranges."""
        if self._text is None:
            return spans
        places = {
            edge: len(unicodedata.normalize("NFC", self._text[:edge]))
            for span in spans
            for edge in span
        }
        return [(places[start], places[stop]) for start, stop in spans]

    def mask(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Return True for each id that stands for a character of a span."""
        return mask_of(self.ranges, self.moved(spans))


def controls_in(
    tokenizer: Tokenizer, chat: Marked, ids: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return the template's control tokens as (first character, one past the last, index of the
    id).

    Return none if they cannot be told apart from others.
    """
    special = {word: id for word, id in tokenizer.special_tokens.items() if id != tokenizer.unk_id}
    found = [
        (start, stop, special[chat.text[start:stop]])
        for start, stop in unprotected(chat, sorted(special, key=len, reverse=True))
    ]
    known = frozenset(special.values())
    places = [at for at, id in enumerate(ids) if id in known]
    if [id for _, _, id in found] != [ids[at] for at in places]:
        return []
    return [(start, stop, at) for (start, stop, _), at in zip(found, places, strict=True)]


def unprotected(chat: Marked, words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the places of words that the template itself writes."""
    left = deque(sorted(chat.protected))
    for match in re.finditer("|".join(map(re.escape, words)) or "(?!)", chat.text):
        start, stop = match.span()
        while left and left[0][1] <= start:
            left.popleft()
        if not left or left[0][0] >= stop:
            yield start, stop


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
    """True for each token that stands for a character of a span; the ranges come in the order of
    the text.
    """
    mask: list[bool] = []
    left = deque(sorted(spans))
    for start, stop in ranges:
        while left and left[0][1] <= start:
            left.popleft()
        mask.append(bool(left) and left[0][0] < stop)
    return mask

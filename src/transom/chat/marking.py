"""Find which words of a rendered chat are the template's, and which texts it leaves out.

A message that spells `<|eot_id|>` looks in the rendered text like the end of a turn. The chat is
therefore rendered a second time with unused characters as marks around such words. Where both
renderings agree except for the marks, the marks tell the two kinds apart. Where the template's
logic depends on such a word, the chat is refused.

Every text of the messages, tools and documents also has marks of its own. If they are missing in
the rendered text, the template leaves the text out.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any, NamedTuple

from transom.chat.messages import REASONING
from transom.tokenizers.tokenizer import Span, Tokenizer

# Keys whose values templates build control tokens from (`'<|' + role + '|>'`).
NAMING = ("role", "type")
# Keys whose values templates compare or leave out on purpose, and so are not expected to write.
KEYS = (*NAMING, "id", "tool_call_id", "call_id", "required")
# A word that no template looks for: it is not in angle or square brackets and does not follow a
# slash.
WORD = re.compile(r"(?<![\w<\[|/\\{])[^\W_]\w*(?![\w>\]|}])")
CLOSED = re.compile(r"</\w+>\s*$")

Path = tuple[str | int, ...]  # keys and indices that lead to a text: ("messages", 0, "content")


@dataclass
class Text:
    """A text of the messages, tools or documents, and what the template writes of it.

    Attributes:
        path: Where the text is in the data.
        value: The text.
        marks: The number of its marks.
        written: Which of its marks are in the rendered text.
    """

    path: Path
    value: str
    marks: int = 0
    written: set[int] = field(default_factory=set)

    @property
    def lost(self) -> bool:
        """Whether the template writes nothing of the text."""
        return not self.written

    @property
    def cut(self) -> bool:
        """Whether the template writes only a part of the text."""
        return 0 < len(self.written) < self.marks

    def found_in(self, rendered: str) -> set[int]:
        """Return all marks if a rendered text contains the words, as they are or as JSON."""
        words = self.value.strip()
        forms = (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
        return set(range(self.marks if any(form in rendered for form in forms) else 0))

    def kind(self, given: Mapping[str, Any]) -> str:
        """Return what the text is: `content of system`, `description of tools`."""
        names = [part for part in self.path if isinstance(part, str)]
        if self.path[0] != "messages":
            return f"{names[-1]} of {names[0]}"
        role = given["messages"][self.path[1]]["role"]
        return f"{'tool_calls' if 'tool_calls' in names else names[1]} of {role}"


@lru_cache(maxsize=8)
def _control_words(
    words: tuple[str, ...],
) -> tuple[re.Pattern[str], frozenset[str], frozenset[str]]:
    """Return the pattern of control words, and all of their beginnings and ends."""
    longest_first = sorted(words, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    sizes = [(word, size) for word in words for size in range(1, len(word))]
    heads, tails = (word[:size] for word, size in sizes), (word[size:] for word, size in sizes)
    return pattern, frozenset(heads), frozenset(tails)


class Control(NamedTuple):
    """A control token that the template writes: its characters, and its place among the ids."""

    start: int
    stop: int
    place: int


@dataclass
class Marked:
    """A rendered chat without its marks, and what the marks showed.

    Attributes:
        text: The rendered text.
        protected: Spans that come from messages and spell a control token, and empty spans at
            offsets that no control token may reach across.
        spans: The bodies of `{% generation %}` blocks.
        texts: All texts of the data.
    """

    text: str = ""
    protected: list[Span] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    def part(self, start: int, stop: int | None = None) -> Marked:
        """Return the characters [start, stop) with the protected spans in them."""
        stop = len(self.text) if stop is None else stop
        inside = [
            (max(a, start), min(b, stop)) for a, b in self.protected if b >= start and a <= stop
        ]
        return Marked(self.text[start:stop], [(a - start, b - start) for a, b in inside])

    def template_words(self, words: Iterable[str]) -> Iterator[Span]:
        """Yield the places of words that the template itself writes; longer words win."""
        left = deque(sorted(self.protected))
        for match in _control_words(tuple(words))[0].finditer(self.text):
            start, stop = match.span()
            while left and left[0][1] <= start:
                left.popleft()
            if not left or left[0][0] >= stop:
                yield start, stop

    def control_tokens(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[Control]:
        """Return the template's control tokens among the ids of this chat.

        Return none if they cannot be told apart from others.
        """
        special = tokenizer.special_tokens
        special = {word: id for word, id in special.items() if id != tokenizer.unk_id}
        words = list(self.template_words(special))
        known = frozenset(special.values())
        places = [at for at, id in enumerate(ids) if id in known]
        if [special[self.text[start:stop]] for start, stop in words] != [ids[at] for at in places]:
            return []
        return [Control(*word, at) for word, at in zip(words, places, strict=True)]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning of two texts or two lists."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return bisect_left(range(1, limit), True, key=lambda size: one[:size] != other[:size])


def unused_characters(count: int, *data: Any) -> list[str]:
    """Return characters of Unicode's private planes that texts and other plain data lack."""
    used = set(json.dumps(data, ensure_ascii=False))
    free = (character for code in range(0xF0000, 0x110000) if (character := chr(code)) not in used)
    return list(islice(free, count))


class Marker:
    """Puts marks into the data that a template reads, and takes them out of what it renders.

    Args:
        words: The spellings of control tokens.
        unused: Characters that neither the template nor the data contains.
        texts: Whether texts have marks of their own, besides those around control tokens. Without
            them, texts are found by their words.
    """

    def __init__(self, words: Iterable[str], unused: Iterable[str], texts: bool = True) -> None:
        self.texts: list[Text] = []
        self._with_texts = texts
        self._known: dict[Path, int] = {}
        self.words, self._heads, self._tails = _control_words(tuple(words))
        self._sizes = range(1, 1 + max(map(len, self._heads), default=0))
        marks = list(islice(unused, 6))
        self._open, self._close, self._begin, self._end = marks[:4]
        self.generation = (marks[4], marks[5])
        opens, closes, begin, end, starts, stops = map(_spellings, marks)
        self._marks = re.compile(
            f"{opens}(?P<word>{self.words.pattern}){closes}|{begin}(?P<text>[0-9]+){end}"
            f"|(?P<start>{starts})|(?P<stop>{stops})|(?P<seam>{opens}|{closes})|{begin}|{end}"
        )

    def mark(self, value: Any, path: Path = ()) -> Any:
        """Return a copy with marks around control words, and at ends that could become one."""
        if isinstance(value, Mapping):
            return {
                self.words.sub(self._around, key): self.mark(one, (*path, key))
                for key, one in value.items()
            }
        if isinstance(value, list):
            return [self.mark(one, (*path, at)) for at, one in enumerate(value)]
        if not isinstance(value, str):
            return value
        marked = self._marked(value, path)
        if path and path[-1] in NAMING:
            return marked
        before = self._close if any(value[:size] in self._tails for size in self._sizes) else ""
        after = self._close if any(value[-size:] in self._heads for size in self._sizes) else ""
        return f"{before}{marked}{after}"

    def _marked(self, value: str, path: Path) -> str:
        """Return a text with marks around its control words, and with its own marks."""
        places = self._places(value, path)
        bounds = pairwise([0, *places, len(value)])
        pieces = [self.words.sub(self._around, value[a:b]) for a, b in bounds]
        if places:
            name = tuple(REASONING[0] if part in REASONING else part for part in path)
            number = self._known.setdefault(name, len(self.texts))
            if number == len(self.texts):
                self.texts.append(Text(name, value, len(places)))
            for at in range(len(places) if self._with_texts else 0):
                pieces[at] += f"{self._begin}{number}{at}{self._end}"
        return "".join(pieces)

    def _places(self, value: str, path: Path) -> list[int]:
        """Return the places of a text's own marks: in its first ordinary word, and at its end.

        Templates look for closing tags, so if the text ends with one, the last word is marked
        instead.
        """
        inside = path[:1] in (("messages",), ("tools",), ("documents",))
        is_file = len(path) > 4 and path[2] == "content" and path[4] != "text"  # of an image
        if not inside or is_file or any(part in KEYS for part in path) or not value.strip():
            return []
        taken = [match.span() for match in self.words.finditer(value)]
        words = (
            match.start() + 1
            for match in WORD.finditer(value)
            if not any(start < match.end() and match.start() < stop for start, stop in taken)
        )
        end = len(value.rstrip())
        first = next(words, end)
        last = deque(words, 1) or [first] if CLOSED.search(value) else [end]
        return sorted({first, *last})

    def _around(self, word: re.Match[str]) -> str:
        return f"{self._open}{word[0]}{self._close}"

    def strip(self, rendered: str) -> Marked:
        """Return a rendered text without its marks, and what they showed."""
        out = Marked(texts=[replace(one, written=set()) for one in self.texts])
        pieces, length, start = [], 0, 0
        opened: list[int] = []
        for match in self._marks.finditer(rendered):
            pieces += [rendered[start : match.start()], match["word"] or ""]
            length += len(pieces[-2])
            start, kind = match.end(), match.lastgroup
            if kind in ("word", "seam"):
                out.protected.append((length, length + len(pieces[-1])))
                length += len(pieces[-1])
            elif kind == "text":
                out.texts[int(match["text"][:-1])].written.add(int(match["text"][-1]))
            elif kind == "start":
                opened.append(length)
            elif kind == "stop" and opened:
                out.spans.append((opened.pop(), length))
        out.text = "".join([*pieces, rendered[start:]])
        if not self._with_texts:
            out.texts = [replace(one, written=one.found_in(out.text)) for one in self.texts]
        return out


def _spellings(mark: str) -> str:
    """Return a pattern for a mark and for its escaped form in ASCII JSON."""
    return f"(?:{re.escape(mark)}|{re.escape(json.dumps(mark)[1:-1])})"

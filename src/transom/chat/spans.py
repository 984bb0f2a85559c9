"""Find the tokens that stand for given characters of a rendered chat. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError
from transom.chat.marking import Marked, Span
from transom.tokenizers.stream import StreamDecoder
from transom.tokenizers.tokenizer import Tokenizer


class TokenSpans:
    """The characters that each token of an encoded text stands for.

    A tokenizer that composes characters (NFC) before it looks them up moves them; spans are moved
    with them.

    Raises:
        RequestError: If the tokens do not decode to the text. `origin` names the template in it.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], text: str, origin: str) -> None:
        self._moved_from: str | None = None
        try:
            ranges = _ranges(tokenizer, ids, text, origin)
        except RequestError:
            composed = unicodedata.normalize("NFC", text)
            if composed == text:
                raise
            self._moved_from, ranges = text, _ranges(tokenizer, ids, composed, origin)
        self._ranges = np.asarray(ranges, np.int64).reshape(-1, 2)

    def tokens_in(self, spans: Iterable[Span]) -> NDArray[np.int64]:
        """Return the indices of the tokens that stand for a character of the spans, ascending."""
        inside = np.zeros(len(self._ranges), np.bool_)
        for span in spans:
            start, stop = map(self._moved, span)
            inside |= (self._ranges[:, 0] < stop) & (self._ranges[:, 1] > start)
        return np.flatnonzero(inside)

    def _moved(self, offset: int) -> int:
        return (
            offset
            if self._moved_from is None
            else len(unicodedata.normalize("NFC", self._moved_from[:offset]))
        )


def _ranges(tokenizer: Tokenizer, ids: Sequence[int], text: str, origin: str) -> list[Span]:
    """Return the characters of `text` that each id stands for.

    Tokens that share a character (its bytes) have the same range. White space may lie between
    tokens that swallow it, and before the first, where some vocabularies write a space of their
    own.
    """
    ranges: list[Span] = []
    waiting = 0  # ids whose text is not complete
    at = 0  # the first character after all complete ones
    for count, piece in _pieces(tokenizer, ids):
        waiting += count
        if not piece:
            continue
        start = next((start for start in _starts(text, at) if text.startswith(piece, start)), None)
        if start is None and text.startswith(piece.lstrip(" "), at):
            start, piece = at, piece.lstrip(" ")
        if start is None:
            raise RequestError(
                f"{origin}: its tokens decode to {piece[:20]!r} where the text has "
                f"{text[at : at + 20]!r}; expected a tokenizer that keeps text as it is"
            )
        at = start + len(piece)
        ranges += [(start, at)] * waiting
        waiting = 0
    return ranges + [(at, at)] * waiting


def _pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Yield the number of ids taken and the text that they complete."""
    decoder = StreamDecoder(tokenizer, skip_special=False)
    for id in ids:
        if id in tokenizer.special_ids:
            yield 0, decoder.finish()
            yield 1, tokenizer.id_to_token(id) or ""
        else:
            yield 1, decoder.push(id)
    yield 0, decoder.finish()


def _starts(text: str, at: int) -> Iterator[int]:
    """Yield `at` and the offsets after each white space that follows it."""
    yield at
    while at < len(text) and text[at].isspace():
        at += 1
        yield at


class Control(NamedTuple):
    """A control token that the template writes: its characters, and its place among the ids."""

    start: int
    stop: int
    place: int


def control_tokens(tokenizer: Tokenizer, chat: Marked, ids: Sequence[int]) -> list[Control]:
    """Return the template's control tokens; none if they cannot be told apart from others."""
    special = {word: id for word, id in tokenizer.special_tokens.items() if id != tokenizer.unk_id}
    places = list(chat.template_words(special))
    known = frozenset(special.values())
    indices = [at for at, id in enumerate(ids) if id in known]
    if [special[chat.text[start:stop]] for start, stop in places] != [ids[at] for at in indices]:
        return []
    return [Control(*place, at) for place, at in zip(places, indices, strict=True)]

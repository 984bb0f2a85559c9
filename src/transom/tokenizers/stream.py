"""Decoding ids one at a time, without ever showing part of a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transom.tokenizers.tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids into text one at a time; the returned pieces joined are `decode` of all the ids.

    Tokens cannot be decoded alone: a character may span several, and the first one of a text may
    lose its leading space. So the ids of the last piece returned stay as context: the new text is
    what context and held ids decode to beyond what the context alone decodes to. Both are a few ids
    long.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []
        self._held_text = ""

    def push(self, id: int) -> str:
        """The text that `id` completes, often none: part of a character is never returned."""
        if id in self._skipped:
            return ""
        if id in self._tokenizer.raw_byte_ids:
            self._held.append(id)
            if self._tokenizer.spoils_byte_runs:  # nothing is known before the run ends
                return ""
            new = self._beyond_context(self._held)
            return "" if new.endswith("\ufffd") else self._release(new)
        new = self._beyond_context([*self._held, id])
        if self._tokenizer.raw_byte_ids or not new.endswith("\ufffd"):
            self._held.append(id)
            return self._release(new)
        # Bytes of a character may be missing. If `id` only adds to what is held, they will not come
        # any more.
        alone = self._decode([id])
        broken = new == self._held_text + alone
        text = self._release(self._held_text) if broken else ""
        self._held.append(id)
        self._held_text = alone if broken else new
        return text

    def flush(self) -> str:
        """Return the waiting text, an unfinished character as U+FFFD; later text continues it."""
        return self._release(self._beyond_context(self._held))

    def finish(self) -> str:
        """The text still held, an unfinished character as U+FFFD; the decoder is then as new."""
        text = self._beyond_context(self._held)
        self._context, self._context_text, self._held, self._held_text = [], "", [], ""
        return text

    def _release(self, text: str) -> str:
        """Return `text`, that of the held ids, which become the context."""
        if (
            text
        ):  # ids without text cannot be the context: the next one would lose its leading space
            whole = self._context + self._held
            self._context, self._held, self._held_text = self._held, [], ""
            self._context_text = self._decode(self._context)
            if not self._context_text:  # lone spaces, which are no text at the beginning
                self._context, self._context_text = whole, self._decode(whole)
        return text

    def _beyond_context(self, ids: list[int]) -> str:
        return self._decode(self._context + ids)[len(self._context_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)

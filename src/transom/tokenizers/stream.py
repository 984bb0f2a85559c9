"""Decode ids one at a time, without ever returning part of a character."""

from __future__ import annotations

from transom.tokenizers.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids one at a time; the returned pieces joined are `Tokenizer.decode` of all the ids.

    Tokens cannot be decoded alone: a character may span several, and the first one of a text may
    lose its leading space. The ids of the last returned piece therefore stay as context. The new
    text is what context and waiting ids decode to, without what the context alone decodes to. Both
    are a few ids long.

    Args:
        tokenizer: The tokenizer of the ids.
        skip_special: Leave out control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._reset()

    def _reset(self) -> None:
        self._context: list[int] = []
        self._context_text = ""
        self._waiting: list[int] = []
        self._waiting_text = ""

    def push(self, id: int) -> str:
        """Return the text that `id` completes, which is often none."""
        if id in self._skipped:
            return ""
        if id in self._tokenizer.raw_byte_ids:
            self._waiting.append(id)
            if self._tokenizer.spoils_byte_runs:  # nothing is known before the run ends
                return ""
            new = self._after_context(self._waiting)
            return "" if new.endswith("\ufffd") else self._release(new)
        new = self._after_context([*self._waiting, id])
        if self._tokenizer.raw_byte_ids or not new.endswith("\ufffd"):
            self._waiting.append(id)
            return self._release(new)
        # Bytes of a character may be missing. If `id` only adds to the text that waits, they will
        # not come any more.
        alone = self._decode([id])
        broken = new == self._waiting_text + alone
        text = self._release(self._waiting_text) if broken else ""
        self._waiting.append(id)
        self._waiting_text = alone if broken else new
        return text

    def flush(self) -> str:
        """Return the waiting text, an unfinished character as U+FFFD; later text continues it."""
        return self._release(self._after_context(self._waiting))

    def finish(self) -> str:
        """Return the waiting text, an unfinished character as U+FFFD, and begin a new text."""
        text = self._after_context(self._waiting)
        self._reset()
        return text

    def _release(self, text: str) -> str:
        """Return `text`, which is that of the waiting ids, and make these the context."""
        # Ids without text cannot be the context: the next one would lose its leading space.
        if text:
            ids = self._context + self._waiting
            self._context, self._waiting, self._waiting_text = self._waiting, [], ""
            self._context_text = self._decode(self._context)
            if not self._context_text:  # lone spaces, which are no text at the beginning
                self._context, self._context_text = ids, self._decode(ids)
        return text

    def _after_context(self, ids: list[int]) -> str:
        return self._decode(self._context + ids)[len(self._context_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


def overlap(text: str, word: str) -> int:
    """Return the longest end of `text`, in characters, that `word` begins with."""
    sizes = range(min(len(text), len(word) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(word[:size])), 0)

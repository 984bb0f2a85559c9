"""Stop strings: where a text ends, and the control tokens that are part of one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from transom.tokenizers.stream import overlap
from transom.tokenizers.tokenizer import Tokenizer


class ControlSigns:
    """Characters that stand for control tokens in decoded text, which never contains them.

    They are halves of surrogate pairs.

    Args:
        tokenizer: The tokenizer.
        kept: Ids of control tokens that `spelled` writes out.
    """

    FIRST, COUNT = 0xD800, 0x800

    def __init__(self, tokenizer: Tokenizer, kept: Literal["all"] | Collection[int] = ()) -> None:
        self._special, self._spell = tokenizer.special_tokens, tokenizer.id_to_token
        self._kept = (
            tokenizer.special_ids if kept == "all" else tokenizer.special_ids.intersection(kept)
        )
        self._signs: dict[int, str] = {}
        self._spelled: dict[int, str | None] = {}

    def __contains__(self, id: int) -> bool:
        """Return whether a token is shown, or is part of a stop string."""
        return id in self._kept or id in self._signs

    def of(self, id: int) -> str:
        """Return the sign of a control token."""
        if id not in self._signs:
            code = self.FIRST + len(self._signs) % self.COUNT
            self._signs[id] = chr(code)
            self._spelled[code] = self._spell(id) if id in self._kept else None
        return self._signs[id]

    def signed(self, text: str) -> str:
        """Return `text` with signs in place of the spellings of control tokens."""
        spellings = [one for one in self._special if one and one in text]
        for spelling in sorted(spellings, key=len, reverse=True):
            text = text.replace(spelling, self.of(self._special[spelling]))
        return text

    def spelled(self, text: str) -> str:
        """Return `text` with kept control tokens spelled out, and without the others."""
        return text.translate(self._spelled)

    def dropped(self, text: str) -> str:
        """Return `text` without control tokens."""
        return text.translate(dict.fromkeys(self._spelled))


class StopStrings:
    """Pass text through up to the first stop string, however tokens divide it.

    Text that may be the beginning of a stop string is held back. If there are several stop strings,
    the one that is complete first counts. With `signs`, control tokens inside a stop string are
    also found by their signs.
    """

    def __init__(self, stop: Sequence[str], signs: ControlSigns | None = None) -> None:
        self.found = ""  # the stop string that ended the text
        self._stop = {word: word for word in stop}
        if signs is not None:
            self._stop |= {signs.signed(word): word for word in stop}
        self._waiting = ""

    def push(self, text: str) -> str:
        """Return the text that can be shown after `text`."""
        text = self._waiting + text
        places = [(at + len(word), at) for word in self._stop if (at := text.find(word)) >= 0]
        if places:
            end, start = min(places)
            self.found, self._waiting = self._stop[text[start:end]], ""
            return text[:start]
        shown = len(text) - max((overlap(text, word) for word in self._stop), default=0)
        self._waiting = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Return the text that waits, when no more comes."""
        text, self._waiting = self._waiting, ""
        return text

"""Byte pairs merged by rank, from ranked bytes in a file: what Llama 3, Llama 4 and tekken share.

The `tiktoken` library merges. It is built from the file alone, and nothing is downloaded.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from transom.base.errors import RequestError, expect, explained
from transom.tokenizers.backend import AddedToken, Frame, SpelledBackend, fingerprint_of

if TYPE_CHECKING:
    import tiktoken

PROBE = "aB Ab ab 12 .!\r\n\t é漢😀"


class BytePairBackend(SpelledBackend):
    """Ranked bytes, and control tokens that only `added` has.

    Args:
        ranks: The rank of each byte string. Its id is rank + `offset`.
        pattern: The regular expression of the words within which byte pairs are merged.
        added: Control tokens by spelling.
        source: The file, for messages.
        format: See `TokenizerBackend`, as for `frame`, `version`, `unk_id` and `stops`.
        longest_run: The number of characters at which the makers cut a run of white space, or of
            anything else.
        longest_text: The number of characters at which the makers cut a text.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        added: Mapping[str, AddedToken],
        *,
        source: str,
        format: str,
        frame: Frame,
        offset: int = 0,
        version: str | None = None,
        unk_id: int | None = None,
        stops: tuple[str, ...] = (),
        longest_run: int,
        longest_text: int | None = None,
    ) -> None:
        self.format, self.version, self.unk_id = format, version, unk_id
        self.frame, self.stops = frame, stops
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:  # the library would end the process at the first text with this byte
            raise RequestError(
                f"{source}: no rank for byte 0x{missing[0]:02X}; expected ranks for all 256"
            )
        self._ranks, self._pattern, self._offset = ranks, pattern, offset
        self._longest_run, self._longest_text = longest_run, longest_text
        self._encoding = _encoding(ranks, pattern, source)
        self.size = len(ranks) + offset
        self.spell(added)
        # The library drops what no word of the pattern covers.
        covers = self.decode(self.encode(PROBE)) == PROBE
        expected = f"one that covers all of the text {PROBE!r}"
        expect(covers, f"{source}: pattern", pattern[:60], expected)

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Return the ids of plain text, which do not depend on what precedes it."""
        pieces = self._pieces(text)
        return [
            rank + self._offset
            for piece in pieces
            for rank in self._encoding.encode_ordinary(piece)
        ]

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield `text` cut where a run of white space, or of anything else, would be too long."""
        size = self._longest_text or len(text)
        for start in range(0, len(text), max(1, size)):
            part = text[start : start + size]
            if len(part) <= self._longest_run:
                yield part
                continue
            runs = re.finditer(r"\s+|\S+", part)
            step = self._longest_run
            cuts = [cut for run in runs for cut in range(run.start() + step, run.end(), step)]
            yield from (part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)], strict=True))

    def decode_plain(self, ids: list[int], first: bool) -> str:
        """Return the bytes of the ids, read as UTF-8."""
        return self._encoding.decode_bytes([id - self._offset for id in ids]).decode(
            "utf-8", "replace"
        )

    def piece(self, id: int) -> str | None:
        """Return the text of a token, with \\xNN for bytes that are not UTF-8."""
        if not 0 <= id - self._offset < len(self._ranks):
            return None
        return self._encoding.decode_single_token_bytes(id - self._offset).decode(
            "utf-8", "backslashreplace"
        )

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a control token or of a token's text, or None."""
        if token in self.added:
            return self.added[token].id
        rank = self._ranks.get(token.encode("utf-8", "surrogatepass"))
        return None if rank is None else rank + self._offset

    def fingerprint(self) -> str:
        """Return the SHA-256 in hex of ranks, pattern and control tokens."""
        control = [f"{token.id} {spelling}" for spelling, token in sorted(self.added.items())]
        return fingerprint_of(self.format, self._pattern, *self._ranks, "", *control)


def _encoding(ranks: dict[bytes, int], pattern: str, source: str) -> tiktoken.Encoding:
    import tiktoken

    shown = f"{source}: pattern: got {pattern[:60]!r}"
    with explained(f"{shown}; expected a regular expression", ValueError):
        return tiktoken.Encoding(source, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def add_rank(ranks: dict[bytes, int], spelled: str | bytes, rank: int, where: str) -> bytes:
    """Add a byte string in base64, which must be new and have the next rank; return it."""
    with explained(f"{where}: bytes: got {spelled!r}; expected base64", ValueError):
        token = base64.b64decode(spelled, validate=True)
    if rank != len(ranks) or token in ranks:
        raise RequestError(f"{where}: rank: got {rank}; expected new bytes of rank {len(ranks)}")
    ranks[token] = rank
    return token

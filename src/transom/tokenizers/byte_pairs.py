"""Byte pairs merged by rank, from bytes that are ranked in a file: what Llama 3, Llama 4 and tekken
share.

The merging is done by the `tiktoken` library, built from the file alone: nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from transom.base.errors import RequestError
from transom.tokenizers.backend import AddedToken, fingerprint_of, in_threads

if TYPE_CHECKING:
    import tiktoken

PROBE = "aB Ab ab 12 .!\r\n\t é漢😀"


class BytePairBackend:
    """Ranked bytes, whose ids are rank + `offset`, and control tokens, which only `added` knows.

    `longest_run` and `longest_text`, in characters, are where the makers cut what the library could
    not take at once.
    """

    spoils_byte_runs = False
    raw_byte_ids: frozenset[int] = (
        frozenset()
    )  # all tokens are bytes here: none need another kind beside them

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        added: Mapping[str, AddedToken],
        *,
        source: str,
        format: str,
        frame: tuple[tuple[int, ...], tuple[int, ...]],
        offset: int = 0,
        version: str | None = None,
        unk_id: int | None = None,
        stops: tuple[str, ...] = (),
        longest_run: int,
        longest_text: int | None = None,
    ) -> None:
        self.format, self.version, self.unk_id, self.frame, self.stops = (
            format,
            version,
            unk_id,
            frame,
            stops,
        )
        self.added = dict(added)
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:  # the library would end the process at the first text with this byte
            raise RequestError(
                f"{source}: no rank for byte 0x{missing[0]:02X}; expected ranks for all 256"
            )
        self._ranks, self._pattern, self._offset = ranks, pattern, offset
        self._spelled = {token.id: spelling.encode() for spelling, token in added.items()}
        self._longest_run, self._longest_text = longest_run, longest_text
        self._encoding = _encoding(ranks, pattern, source)
        if (
            self.decode(self.encode(PROBE)) != PROBE
        ):  # the library drops what no word of the pattern covers
            raise RequestError(
                f"{source}: pattern: got {pattern[:60]!r}; leaves out some of the text {PROBE!r}"
            )

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of plain text; what stands before it makes no difference."""
        pieces = self._pieces(text)
        return [
            rank + self._offset
            for piece in pieces
            for rank in self._encoding.encode_ordinary(piece)
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return in_threads(self.encode, texts)

    def _pieces(self, text: str) -> Iterator[str]:
        """`text` cut where no piece holds too long a run of white space, or of anything else."""
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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of known ids: their bytes joined, then read as UTF-8."""
        parts = []
        for control, run in groupby(ids, self._spelled.__contains__):
            if control:
                parts += [self._spelled[id] for id in run]
            else:
                parts.append(self._encoding.decode_bytes([id - self._offset for id in run]))
        return b"".join(parts).decode("utf-8", errors="replace")

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, control tokens included."""
        return max(len(self._ranks) + self._offset, max(self._spelled, default=-1) + 1)

    def id_to_token(self, id: int) -> str | None:
        """The text of a token; bytes that are not UTF-8 as \\xNN, which `token_to_id` does not
        read.
        """
        if id in self._spelled:
            return self._spelled[id].decode()
        if not 0 <= id - self._offset < len(self._ranks):
            return None
        return self._encoding.decode_single_token_bytes(id - self._offset).decode(
            "utf-8", "backslashreplace"
        )

    def token_to_id(self, token: str) -> int | None:
        """The id of a control token or of a token's text."""
        if token in self.added:
            return self.added[token].id
        rank = self._ranks.get(token.encode("utf-8", "surrogatepass"))
        return None if rank is None else rank + self._offset

    def fingerprint(self) -> str:
        """SHA-256 in hex of ranks, pattern and control tokens."""
        control = [f"{token.id} {spelling}" for spelling, token in sorted(self.added.items())]
        return fingerprint_of(self.format, self._pattern, *self._ranks, "", *control)


def _encoding(ranks: dict[bytes, int], pattern: str, source: str) -> tiktoken.Encoding:
    """The library's own object; without the library, or with a pattern it cannot read, a
    `RequestError`.
    """
    try:
        import tiktoken
    except ImportError:
        raise RequestError(f"{source}: needs the tiktoken library: pip install tiktoken") from None
    try:
        encoding = tiktoken.Encoding(
            source, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError as error:
        raise RequestError(
            f"{source}: pattern: got {pattern[:60]!r}; not a regular expression ({error})"
        ) from None
    return encoding

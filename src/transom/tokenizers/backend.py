"""What a vocabulary file must offer, so that one `Tokenizer` can put the same rules on top of every
format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class AddedToken:
    """A token that is found by its spelling, not by merging: a control token, or plain text kept
    whole.
    """

    id: int
    control: bool = True  # never made from text unless asked, left out of decoded text
    lstrip: bool = False  # swallows the white space before it
    rstrip: bool = False  # and behind it
    single_word: bool = False  # not inside of a word


class Backend(Protocol):
    """Plain text to ids and back by one vocabulary; `encode` never returns the id of a control
    token.
    """

    @property
    def format(self) -> str:
        """The kind of file: `tokenizer.json`, `sentencepiece`, `tiktoken` or `tekken`."""

    @property
    def version(self) -> str | None:
        """Mistral's number of the chat format that the control tokens serve (`v3`), None
        elsewhere.
        """

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""

    @property
    def added(self) -> Mapping[str, AddedToken]:
        """Control tokens by spelling, and other tokens that `encode` does not find by itself."""

    @property
    def unk_id(self) -> int | None:
        """Id that stands for text the vocabulary cannot write."""

    @property
    def raw_byte_ids(self) -> frozenset[int]:
        """Ids of single bytes (`<0xE4>`) beside a vocabulary of characters."""

    @property
    def spoils_byte_runs(self) -> bool:
        """Whether one bad byte turns the whole run of `raw_byte_ids` around it into U+FFFD."""

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the makers' own tokenizer puts before and behind a text."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Control tokens besides EOS at which the makers' own code ends a turn."""

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of plain text; `first` is False for what follows a control token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of known ids, control tokens by their spelling, bytes that are not UTF-8 as
        U+FFFD.
        """

    def id_to_token(self, id: int) -> str | None:
        """The vocabulary's own spelling of `id`, None when it has none."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling, None when there is none."""

    def fingerprint(self) -> str:
        """SHA-256 in hex of all that decides which ids a text has."""


def in_threads(encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text on all cores, for libraries that let go of the interpreter while they
    work.
    """
    if len(texts) < 2:
        return [encode(text) for text in texts]
    with ThreadPoolExecutor(min(len(texts), os.cpu_count() or 1)) as pool:
        return list(pool.map(encode, texts))


def fingerprint_of(*parts: bytes | str) -> str:
    """SHA-256 in hex of the parts, each with its length in front, so that none can pass for two."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()

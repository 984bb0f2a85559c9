"""What a vocabulary file must offer to `Tokenizer`, whatever its format."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

Frame = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class AddedToken:
    """A token that is found by its spelling, not by merging.

    Attributes:
        id: The token id.
        control: Whether it is a control token, which text never becomes unless asked and `decode`
            leaves out. Otherwise it is plain text that is never split.
        lstrip: Whether it swallows the white space before it.
        rstrip: Whether it swallows the white space after it.
        single_word: Whether it is not found inside of a word.
    """

    id: int
    control: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class TokenizerBackend(ABC):
    """Plain text to ids and back by one vocabulary.

    Attributes:
        format: The kind of file: `tokenizer.json`, `sentencepiece`, `tiktoken` or `tekken`.
        version: Mistral's number of the chat format that the control tokens are for (`v3`), None
            elsewhere.
        vocab_size: The highest id + 1, added tokens included.
        added: Control tokens by spelling, and other tokens that `encode` does not find by itself.
        frame: The ids that the makers' own tokenizer puts before and after a text.
        unk_id: The id that stands for text outside the vocabulary.
        raw_byte_ids: Ids of single bytes (`<0xE4>`) in a vocabulary of characters.
        spoils_byte_runs: Whether one bad byte turns the complete run of `raw_byte_ids` around it
            into U+FFFD.
        stops: Control tokens besides EOS at which the makers' own code ends a turn.
    """

    format: str
    version: str | None = None
    vocab_size: int
    added: dict[str, AddedToken]
    frame: Frame
    unk_id: int | None = None
    raw_byte_ids: frozenset[int] = frozenset()
    spoils_byte_runs = False
    stops: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, text: str, first: bool = True) -> list[int]:
        """Return the ids of plain text; `first` is False after a control token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, using all cores."""
        return in_threads(self.encode, texts)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of known ids, with U+FFFD for bytes that are not UTF-8."""

    @abstractmethod
    def id_to_token(self, id: int) -> str | None:
        """Return the vocabulary's own spelling of an id, or None."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token in the vocabulary's own spelling, or None."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the SHA-256 in hex of everything that decides which ids a text has."""


class SpelledBackend(TokenizerBackend):
    """A vocabulary whose library does not know the tokens in `added`.

    Subclasses have `size`, the number of ids that the library knows from 0 on, and call `spell`
    when `added` is complete.
    """

    size: int

    def spell(self, added: Mapping[str, AddedToken]) -> None:
        """Set `added` and the spellings by id."""
        self.added = dict(added)
        self.spelled = {token.id: spelling for spelling, token in added.items()}
        self.vocab_size = max(self.size, max(self.spelled, default=-1) + 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of known ids, with U+FFFD for bytes that are not UTF-8."""
        parts: list[str] = []
        for spelled, run in groupby(ids, self.spelled.__contains__):
            run_ids = list(run)
            if spelled:
                parts += [self.spelled[id] for id in run_ids]
            else:
                parts.append(self.decode_plain(run_ids, not parts))
        return "".join(parts)

    @abstractmethod
    def decode_plain(self, ids: list[int], first: bool) -> str:
        """Return the text of ids that are not in `added`; `first` is False after other text."""

    def id_to_token(self, id: int) -> str | None:
        """Return the vocabulary's own spelling of an id, or None."""
        return self.spelled.get(id) or self.piece(id)

    @abstractmethod
    def piece(self, id: int) -> str | None:
        """Return the spelling of an id that is not in `added`, or None."""


def in_threads(encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[list[int]]:
    """Return `encode` of each text from several threads; the libraries release the GIL."""
    if len(texts) < 2:
        return [encode(text) for text in texts]
    with ThreadPoolExecutor(min(len(texts), os.cpu_count() or 1)) as pool:
        return list(pool.map(encode, texts))


def fingerprint_of(*parts: bytes | str) -> str:
    """Return the SHA-256 in hex of the parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()

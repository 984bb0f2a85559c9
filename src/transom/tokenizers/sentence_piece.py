"""SentencePiece models: Llama 2, Mistral v1 to v7, Gemma. The work is done by the `sentencepiece`
library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from transom.base.errors import RequestError, require
from transom.tokenizers.backend import AddedToken, fingerprint_of, in_threads

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Fields are merged where they come twice (protobuf encoding, "last one wins"): behind a ModelProto
# these bytes set normalizer_spec (3) . add_dummy_prefix (3) to false, and remove_extra_whitespaces
# (4) as well. The library has no other way to say so that all its versions understand.
NO_PREFIX = b"\x1a\x02\x18\x00"
SPACES_AS_THEY_ARE = b"\x1a\x04\x18\x00\x20\x00"
# The control token that came with a version of Mistral's chat format, newest first; the first files
# of v3 had those of v2, which is what a file without a version in its name is then not taken for.
MISTRAL_VERSIONS = (("[SYSTEM_PROMPT]", "v7"), ("[INST]", "v3"))


class SentencePieceBackend:
    """A SentencePiece model, and tokens added beside it; `special` are pieces to be treated as
    control tokens.

    `prefix_everywhere`: text behind a control token gets the model's leading space as if it stood
    alone, as Mistral's code and older ones of Hugging Face (`legacy`) have it.
    """

    format = "sentencepiece"
    spoils_byte_runs = False
    stops: tuple[str, ...] = ()

    def __init__(
        self,
        model: bytes,
        *,
        source: str,
        added: Mapping[str, AddedToken] | None = None,
        special: Iterable[str] = (),
        version: str | None = None,
        prefix_everywhere: bool = True,
    ) -> None:
        self._model, self._source, self._prefix_everywhere = model, source, prefix_everywhere
        self._processor = _processor(model, source)
        size = self._size = self._processor.get_piece_size()
        require(size > 0, f"{source}: pieces", size, "expected a SentencePiece model")
        control = [id for id in range(size) if self._processor.is_control(id)]
        self._pieces = {self._processor.id_to_piece(id): id for id in range(size)}
        self.added = {self._processor.id_to_piece(id): AddedToken(id) for id in control}
        for spelling, token in (added or {}).items():
            self._add(spelling, token)
        for spelling in special:
            if spelling in self._pieces:
                self._add(spelling, AddedToken(self._pieces[spelling]))
        self._spelled = {token.id: spelling for spelling, token in self.added.items()}
        known = [name for spelling, name in MISTRAL_VERSIONS if spelling in self.added]
        self.version = version or next(iter(known), None)
        reserved = {self._pieces[spelling] for spelling in self.added if spelling in self._pieces}
        self._guarded_ids = frozenset(reserved - set(control))

    def _add(self, spelling: str, token: AddedToken) -> None:
        """Take up an added token: behind the model's pieces, one of them, or a new name of a
        control token.
        """
        piece = self._pieces.get(spelling)
        old = next((name for name, known in self.added.items() if known.id == token.id), None)
        fits = piece == token.id or (piece is None and (token.id >= self._size or old is not None))
        expected = (
            f"expected {piece}" if piece is not None else f"expected ids from {self._size} on"
        )
        require(fits, f"{self._source}: id of {spelling!r}", token.id, expected)
        if old is not None:
            del self.added[old]
        control = token.control and token.id != self.unk_id
        if (
            control or piece is None
        ):  # text pieces and the unknown one stay what they are in the model
            self.added[spelling] = token

    # -- text to ids
    # ---------------------------------------------------------------------------------

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of plain text; control tokens of the model have no spelling that text could hit."""
        processor = self._processor if first or self._prefix_everywhere else self._inner
        ids: list[int] = processor.encode(text)
        return ids if self._guarded_ids.isdisjoint(ids) else self._without_specials(text, first)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return in_threads(self.encode, texts)

    def _without_specials(self, text: str, first: bool) -> list[int]:
        """Ids of a text that hits special tokens which the model takes for text ("user defined").

        Each spelling is cut after its first character; where normalisation makes one from other
        characters, these are encoded one by one.
        """
        spellings = [re.escape(self._spelled[id]) for id in self._guarded_ids]
        cuts = [match.start() + 1 for match in re.finditer(f"(?={'|'.join(spellings)})", text)]
        ids = self._joined(text, cuts, first)
        return (
            ids
            if self._guarded_ids.isdisjoint(ids)
            else self._joined(text, range(1, len(text)), first)
        )

    def _joined(self, text: str, cuts: Iterable[int], first: bool) -> list[int]:
        edges = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in pairwise(edges)]
        head: list[int] = (
            self._processor if first or self._prefix_everywhere else self._inner
        ).encode(parts[0])
        return [*head, *(id for part in parts[1:] for id in self._inner.encode(part))]

    @cached_property
    def _inner(self) -> SentencePieceProcessor:
        return _processor(self._model + NO_PREFIX, self._source)

    @cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """BOS before a text, where the model has one: so did all who published such models."""
        bos = self._processor.bos_id()
        return ((bos,) if bos >= 0 else (), ())

    # -- ids to text
    # ---------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of known ids; the leading space that encoding puts before a text is taken away
        again.
        """
        parts: list[str] = []
        for spelled, run in groupby(ids, self._spelled.__contains__):
            if spelled:
                parts += [self._spelled[id] for id in run]
            else:
                parts.append((self._plain if parts else self._processor).decode(list(run)))
        return "".join(parts)

    @cached_property
    def _plain(self) -> SentencePieceProcessor:
        """Decodes what follows other text: no leading space is taken away."""
        return _processor(self._model + SPACES_AS_THEY_ARE, self._source)

    # -- the vocabulary
    # ------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included."""
        return max(self._size, max(self._spelled, default=-1) + 1)

    @property
    def unk_id(self) -> int | None:
        """The piece for what the model cannot write."""
        return _present(self._processor.unk_id())

    @cached_property
    def raw_byte_ids(self) -> frozenset[int]:
        """Ids of `<0x00>` to `<0xFF>`."""
        return frozenset(id for id in range(self._size) if self._processor.is_byte(id))

    def named(self) -> dict[str, str]:
        """BOS, EOS and PAD as the model names them."""
        ids = {
            "bos_token": self._processor.bos_id(),
            "eos_token": self._processor.eos_id(),
            "pad_token": self._processor.pad_id(),
        }
        return {field: self._processor.id_to_piece(id) for field, id in ids.items() if id >= 0}

    def id_to_token(self, id: int) -> str | None:
        """The piece, spaces as U+2581."""
        if id in self._spelled:
            return self._spelled[id]
        piece: str | None = self._processor.id_to_piece(id) if 0 <= id < self._size else None
        return piece

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece or added token."""
        if token in self.added:
            return self.added[token].id
        return self._pieces.get(token)

    def fingerprint(self) -> str:
        """SHA-256 in hex of the model and of what is added to it."""
        added = [f"{token} {spelling}" for spelling, token in sorted(self.added.items())]
        return fingerprint_of(self._model, str(self._prefix_everywhere), *added)


def _present(id: int) -> int | None:
    return id if id >= 0 else None  # the library says -1 for a token that the model lacks


def _processor(model: bytes, source: str) -> SentencePieceProcessor:
    """The library's own object; without the library, or for other bytes, a `RequestError`."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise RequestError(
            f"{source}: needs the sentencepiece library: pip install sentencepiece"
        ) from None
    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise RequestError(
            f"{source}: expected a SentencePiece model; this one is cut or damaged"
        ) from None

"""SentencePiece models (Llama 2, Mistral v1 to v7, Gemma), by the `sentencepiece` library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from transom.base.errors import expect, explained
from transom.tokenizers.backend import AddedToken, SpelledBackend, fingerprint_of

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Protobuf merges a field that occurs twice, and the last value wins. After a ModelProto these bytes
# set normalizer_spec (3) . add_dummy_prefix (3) to false, and remove_extra_whitespaces (4) as well.
# The library has no other way to set them that all its versions understand.
NO_PREFIX = b"\x1a\x02\x18\x00"
SPACES_AS_THEY_ARE = b"\x1a\x04\x18\x00\x20\x00"
# The control token that came with a version of Mistral's chat format, newest first. The first files
# of v3 had those of v2; a file without a version in its name is taken for v3.
MISTRAL_VERSIONS = (("[SYSTEM_PROMPT]", "v7"), ("[INST]", "v3"))


class SentencePieceBackend(SpelledBackend):
    """A SentencePiece model, and tokens added beside it.

    Args:
        model: The content of the file.
        source: The file, for messages.
        added: Tokens that are only in files beside the model.
        special: Pieces of the model that are treated as control tokens.
        version: See `TokenizerBackend`; by default the control tokens tell.
        prefix_everywhere: Whether text after a control token gets the model's leading space as a
            text alone does. This is so in Mistral's code and in older code of Hugging Face
            (`legacy`).
    """

    format = "sentencepiece"

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
        processor = self._processor = _processor(model, source)
        self.size = processor.get_piece_size()
        expect(self.size > 0, f"{source}: pieces", self.size, "a SentencePiece model")
        ids = range(self.size)
        self._pieces = {processor.id_to_piece(id): id for id in ids}
        self.raw_byte_ids = frozenset(id for id in ids if processor.is_byte(id))
        self.unk_id = processor.unk_id() if processor.unk_id() >= 0 else None
        edges = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "pad_token": processor.pad_id(),
        }
        self.named = {name: processor.id_to_piece(id) for name, id in edges.items() if id >= 0}
        # All makers of such models put BOS before a text, if there is one.
        self.frame = (() if processor.bos_id() < 0 else (processor.bos_id(),), ())
        control = [id for id in ids if processor.is_control(id)]
        tokens = {processor.id_to_piece(id): AddedToken(id) for id in control}
        pieces = {name: id for name in special if (id := self._pieces.get(name)) is not None}
        known = {name: AddedToken(id) for name, id in pieces.items()}
        for spelling, token in (*(added or {}).items(), *known.items()):
            self._add(tokens, spelling, token)
        self.spell(tokens)
        versions = [name for spelling, name in MISTRAL_VERSIONS if spelling in tokens]
        self.version = version or next(iter(versions), None)
        reserved = {self._pieces[spelling] for spelling in tokens if spelling in self._pieces}
        self._guarded_ids = frozenset(reserved - set(control))

    def _add(self, tokens: dict[str, AddedToken], spelling: str, token: AddedToken) -> None:
        """Add a token after the model's pieces, a piece, or a new name of a control token."""
        piece = self._pieces.get(spelling)
        old = next((name for name, one in tokens.items() if one.id == token.id), None)
        fits = piece == token.id or (piece is None and (token.id >= self.size or old is not None))
        expected = f"an id of {self.size} or more" if piece is None else str(piece)
        expect(fits, f"{self._source}: id of {spelling!r}", token.id, expected)
        if old is not None:
            del tokens[old]
        if piece is None or (token.control and token.id != self.unk_id):
            tokens[spelling] = token  # other pieces of the model stay what they are there

    # -- text to ids --

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Return the ids of plain text; `first` is False after a control token."""
        ids = self._joined([text], first)
        if self._guarded_ids.isdisjoint(ids):
            return ids
        # The model takes some special tokens for text ("user defined"). Each of their spellings is
        # cut after its first character. If normalization makes one from other characters, these are
        # encoded one by one.
        spellings = [re.escape(self.spelled[id]) for id in self._guarded_ids]
        cuts = [match.start() + 1 for match in re.finditer(f"(?={'|'.join(spellings)})", text)]
        ids = self._joined([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], first)
        return ids if self._guarded_ids.isdisjoint(ids) else self._joined(list(text), first)

    def _joined(self, parts: list[str], first: bool) -> list[int]:
        """Return the ids of texts that are encoded separately, with one leading space."""
        head = self._processor if first or self._prefix_everywhere else self._inner
        return [*head.encode(parts[0]), *chain(*(self._inner.encode(part) for part in parts[1:]))]

    @cached_property
    def _inner(self) -> SentencePieceProcessor:
        return _processor(self._model + NO_PREFIX, self._source)

    # -- ids to text --

    def decode_plain(self, ids: list[int], first: bool) -> str:
        """Return the text of ids, without the leading space that encoding puts before a text."""
        return (self._processor if first else self._after_text).decode(ids)

    @cached_property
    def _after_text(self) -> SentencePieceProcessor:
        return _processor(self._model + SPACES_AS_THEY_ARE, self._source)

    def piece(self, id: int) -> str | None:
        """Return the piece, with U+2581 for spaces."""
        return self._processor.id_to_piece(id) if 0 <= id < self.size else None

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece or added token, or None."""
        return self.added[token].id if token in self.added else self._pieces.get(token)

    def fingerprint(self) -> str:
        """Return the SHA-256 in hex of the model and of what is added to it."""
        added = [f"{token} {spelling}" for spelling, token in sorted(self.added.items())]
        return fingerprint_of(self._model, str(self._prefix_everywhere), *added)


def _processor(model: bytes, source: str) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    damaged = f"{source}: got a file that is cut or damaged; expected a SentencePiece model"
    with explained(damaged, RuntimeError):
        return SentencePieceProcessor(model_proto=model)

"""Vocabularies in a tokenizer.json: the work is done by the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

import tokenizers
from tokenizers import models

from transom.base.errors import RequestError, notice, require
from transom.tokenizers.backend import AddedToken
from transom.tokenizers.beside import Beside


class FastBackend:
    """A tokenizer of the `tokenizers` library; `special` are tokens to be treated as control
    tokens.
    """

    format = "tokenizer.json"
    version: str | None = None
    spoils_byte_runs = True

    def __init__(
        self, backend: tokenizers.Tokenizer, special: Iterable[str] = (), stops: Iterable[str] = ()
    ) -> None:
        self.stops = tuple(stops)
        mark_special(backend, special)
        backend.encode_special_tokens = (
            True  # specials spelled out in text are encoded as plain text
        )
        # both are stored in some files, and both change lengths without a word
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    # -- text to ids
    # ---------------------------------------------------------------------------------

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of plain text; Metaspace of the kind `first` puts its space before a first text
        only.
        """
        return self._checked(text, self._encoding(text, first).ids, first)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            self._checked(text, one.ids, True) for text, one in zip(texts, encodings, strict=True)
        ]

    def _encoding(self, text: str, first: bool) -> tokenizers.Encoding:
        return (self._backend if first else self._inner).encode(text, add_special_tokens=False)

    @cached_property
    def _inner(self) -> tokenizers.Tokenizer:
        """The tokenizer of what follows a control token: the library would take every text for a
        first one.
        """
        state = (
            b""
            if self._backend.pre_tokenizer is None
            else self._backend.pre_tokenizer.__getstate__()
        )
        if b'"prepend_scheme":"first"' not in state:
            return self._backend
        content = self.to_json().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        inner = tokenizers.Tokenizer.from_str(content)
        inner.encode_special_tokens = True
        return inner

    def _checked(self, text: str, ids: list[int], first: bool) -> list[int]:
        if isinstance(self._backend.model, models.WordLevel) and self.unk_id in ids:
            encoding = self._encoding(text, first)
            start, stop = next(
                edge for id, edge in zip(ids, encoding.offsets, strict=True) if id == self.unk_id
            )
            expected = f"expected the {self.vocab_size} entries of the vocabulary"
            raise RequestError(f"text holds {text[start:stop]!r} at character {start}: {expected}")
        return ids if self._guarded_ids.isdisjoint(ids) else self._without_specials(text, first)

    def _without_specials(self, text: str, first: bool) -> list[int]:
        """Ids of a text whose own words reach a special token through the model's vocabulary.

        Unigram and word vocabularies list their specials as ordinary entries, so "</s>" in a text
        finds its id. Such a place is cut after its first character and both sides are encoded
        apart. A special of one character (a line end used as EOS) has no other spelling and stays.
        """
        encoding = self._encoding(text, first)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [
            start + 1 for id, (start, stop) in found if id in self._guarded_ids and stop - start > 1
        ]
        if not cuts:
            return list(encoding.ids)
        parts = pairwise([0, *cuts, len(text)])
        return [
            id
            for start, stop in parts
            for id in self._without_specials(text[start:stop], first and start == 0)
        ]

    @cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and behind a text."""
        for sample in ("a", *self._backend.get_vocab(with_added_tokens=False)):
            try:
                bare = len(self._backend.encode(sample, add_special_tokens=False).ids)
            except (
                Exception
            ):  # a vocabulary of words without an unknown one: the library raises bare Exception
                continue
            if bare:
                encoding = self._backend.encode(sample, add_special_tokens=True)
                before = encoding.special_tokens_mask.index(0)
                return tuple(encoding.ids[:before]), tuple(encoding.ids[before + bare :])
        return (), ()

    # -- ids to text
    # ---------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of known ids."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    # -- the vocabulary
    # ------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included."""
        return int(max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)) + 1

    @cached_property
    def added(self) -> dict[str, AddedToken]:
        """The special tokens; the library finds the other added ones in every text."""
        return {
            token.content: AddedToken(
                id, lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word
            )
            for id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }

    @cached_property
    def unk_id(self) -> int | None:
        """The model's unknown token."""
        if isinstance(self._backend.model, models.Unigram):  # the library does not show this one
            unk_id: int | None = json.loads(self.to_json())["model"].get("unk_id")
            return unk_id
        token = getattr(self._backend.model, "unk_token", None)
        return None if token is None else self.token_to_id(token)

    @cached_property
    def raw_byte_ids(self) -> frozenset[int]:
        """Ids of `<0x00>` to `<0xFF>` where the decoder turns them into bytes."""
        if (
            self._backend.decoder is None
            or b'"ByteFallback"' not in self._backend.decoder.__getstate__()
        ):
            return frozenset()
        ids = [self.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        return frozenset(id for id in ids if id is not None)

    def id_to_token(self, id: int) -> str | None:
        """The vocabulary's own spelling of `id`."""
        token: str | None = self._backend.id_to_token(id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling."""
        id: int | None = self._backend.token_to_id(token)
        return id

    @cached_property
    def _guarded_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.added.values()) - {
            self.unk_id
        }  # text may well be unknown

    def with_special(self, tokens: Iterable[str]) -> FastBackend:
        """A copy with more control tokens."""
        return FastBackend(tokenizers.Tokenizer.from_str(self.to_json()), tokens, self.stops)

    # -- files
    # ---------------------------------------------------------------------------------------

    def to_json(self, pretty: bool = False) -> str:
        """The content of a tokenizer.json."""
        content: str = self._backend.to_str(pretty=pretty)
        return content

    def fingerprint(self) -> str:
        """SHA-256 in hex of the content of tokenizer.json, whitespace aside."""
        # The library reads a score back up to one unit in the last place away from what it has
        # written.
        content = json.loads(self.to_json(), parse_float=lambda text: f"{float(text):.9g}")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def mark_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Make `tokens` special, adding those that are new; what is special already keeps its
    settings.
    """
    added = backend.get_added_tokens_decoder().values()
    marked = {token.content for token in added if token.special}
    backend.add_special_tokens([token for token in tokens if token not in marked])


def add_beside(backend: tokenizers.Tokenizer, beside: Beside, source: str) -> None:
    """Add the tokens that are only in files beside a tokenizer.json, in the order of transformers.

    Those of `added_tokens_decoder` come first, by their ids, else those of added_tokens.json; then
    special tokens that no list gives an id. One that cannot get the id that its file states is a
    `RequestError`; where the vocabulary has it under another id, that id counts.
    """
    stated = beside.described or beside.old_added
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    before = {id: backend.token_to_id(entry["content"]) for id, entry in stated.items()}
    listed = [tokenizers.AddedToken(**entry) for _, entry in sorted(stated.items())]
    if not beside.described:  # tokenizer.json takes precedence over added_tokens.json
        listed = [token for token in listed if backend.token_to_id(token.content) is None]
    backend.add_tokens([token for token in listed if repr(token) not in known])
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = [
        tokenizers.AddedToken(**entry) for entry in beside.extra if entry["content"] not in added
    ]
    backend.add_tokens(extra)
    for id, entry in stated.items():
        token, found = entry["content"], backend.token_to_id(entry["content"])
        if before[id] is None:
            expected = f"accepted beside {source} is {found}, the next free id"
            require(found == id, f"{beside.folder}: id of the added token {token!r}", id, expected)
        elif found != id:
            notice(
                f"{source}: the id of {token!r} is {found}; the {id} of a file beside it is not "
                f"used"
            )

"""Vocabularies in a tokenizer.json. The `tokenizers` library does the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import tokenizers
from tokenizers import models

from transom.base.errors import RequestError, expect, notice
from transom.tokenizers.backend import AddedToken, Frame, TokenizerBackend
from transom.tokenizers.token_files import TokenFiles


class FastBackend(TokenizerBackend):
    """A tokenizer of the `tokenizers` library.

    Args:
        library: The library's own object.
        special: Tokens that are treated as control tokens.
        stops: See `TokenizerBackend`.
    """

    format = "tokenizer.json"
    spoils_byte_runs = True

    def __init__(
        self, library: tokenizers.Tokenizer, special: Iterable[str] = (), stops: Iterable[str] = ()
    ) -> None:
        self._library, self.stops = library, tuple(stops)
        mark_special(library, special)
        library.encode_special_tokens = (
            True  # specials that a text spells are encoded as plain text
        )
        # some files contain both, which would change lengths without a notice
        library.no_truncation()
        library.no_padding()
        # The library finds the other added tokens in every text.
        self.added = {
            token.content: AddedToken(id, True, token.lstrip, token.rstrip, token.single_word)
            for id, token in library.get_added_tokens_decoder().items()
            if token.special
        }
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.frame = self._frame()
        if isinstance(library.model, models.Unigram):  # the library does not show this one
            self.unk_id = json.loads(self.to_json())["model"].get("unk_id")
        else:
            unknown = getattr(library.model, "unk_token", None)
            self.unk_id = None if unknown is None else self.token_to_id(unknown)
        if library.decoder is not None and b'"ByteFallback"' in library.decoder.__getstate__():
            ids = [self.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
            self.raw_byte_ids = frozenset(id for id in ids if id is not None)
        control = frozenset(token.id for token in self.added.values())
        self._guarded_ids = control - {self.unk_id}  # text may well be unknown

    def _frame(self) -> Frame:
        """Return what the post-processor puts before and after a text."""
        for sample in self._samples():
            try:
                bare = len(self._library.encode(sample, add_special_tokens=False).ids)
            except Exception:  # the library's own, for a word outside of the vocabulary
                continue
            if bare:
                encoding = self._library.encode(sample, add_special_tokens=True)
                before = encoding.special_tokens_mask.index(0)
                return tuple(encoding.ids[:before]), tuple(encoding.ids[before + bare :])
        return (), ()

    def _samples(self) -> Iterator[str]:
        yield "a"  # nearly always enough: the vocabulary takes long to copy
        yield from self._library.get_vocab(with_added_tokens=False)

    # -- text to ids --

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Return the ids of plain text; `first` is False after a control token."""
        return self._checked(text, self._encoding(text, first).ids, first)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, using all cores."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            self._checked(text, one.ids, True) for text, one in zip(texts, encodings, strict=True)
        ]

    def _encoding(self, text: str, first: bool) -> tokenizers.Encoding:
        return (self._library if first else self._inner).encode(text, add_special_tokens=False)

    @cached_property
    def _inner(self) -> tokenizers.Tokenizer:
        """The tokenizer of text after a control token, which gets no leading space."""
        state = (
            b""
            if self._library.pre_tokenizer is None
            else self._library.pre_tokenizer.__getstate__()
        )
        if b'"prepend_scheme":"first"' not in state:
            return self._library
        content = self.to_json().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        inner = tokenizers.Tokenizer.from_str(content)
        inner.encode_special_tokens = True
        return inner

    def _checked(self, text: str, ids: list[int], first: bool) -> list[int]:
        if isinstance(self._library.model, models.WordLevel) and self.unk_id in ids:
            encoding = self._encoding(text, first)
            start, stop = next(
                edge for id, edge in zip(ids, encoding.offsets, strict=True) if id == self.unk_id
            )
            expected = f"expected the {self.vocab_size} entries of the vocabulary"
            raise RequestError(f"text: got {text[start:stop]!r} at character {start}; {expected}")
        return ids if self._guarded_ids.isdisjoint(ids) else self._without_specials(text, first)

    def _without_specials(self, text: str, first: bool) -> list[int]:
        """Return the ids of a text in which the model's vocabulary finds special tokens.

        Unigram and word vocabularies list their specials as ordinary entries, so "</s>" in a text
        finds its id. Such a place is cut after its first character and both sides are encoded
        separately. A special token of one character (a line end used as EOS) has no other spelling
        and stays.
        """
        encoding = self._encoding(text, first)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [
            start + 1
            for id, (start, stop) in places
            if id in self._guarded_ids and stop - start > 1
        ]
        if not cuts:
            return list(encoding.ids)
        parts = pairwise([0, *cuts, len(text)])
        return [id for a, b in parts for id in self._without_specials(text[a:b], first and a == 0)]

    # -- ids to text --

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of known ids, with U+FFFD for bytes that are not UTF-8."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def id_to_token(self, id: int) -> str | None:
        """Return the vocabulary's own spelling of an id, or None."""
        return self._library.id_to_token(id)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token in the vocabulary's own spelling, or None."""
        return self._library.token_to_id(token)

    def with_special(self, tokens: Iterable[str]) -> FastBackend:
        """Return a copy with more control tokens."""
        return FastBackend(tokenizers.Tokenizer.from_str(self.to_json()), tokens, self.stops)

    def to_json(self, pretty: bool = False) -> str:
        """Return the content of a tokenizer.json."""
        return self._library.to_str(pretty=pretty)

    def fingerprint(self) -> str:
        """Return the SHA-256 in hex of the content of tokenizer.json, except white space."""
        # The library reads a score back up to one unit in the last place away from what it has
        # written.
        content = json.loads(self.to_json(), parse_float=lambda text: f"{float(text):.9g}")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def mark_special(library: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Make tokens special and add new ones; tokens that are special already keep their settings."""
    added = library.get_added_tokens_decoder().values()
    marked = {token.content for token in added if token.special}
    library.add_special_tokens([token for token in tokens if token not in marked])


def add_tokens(library: tokenizers.Tokenizer, described: TokenFiles, source: str) -> None:
    """Add the tokens that are only in files beside a tokenizer.json, in the order of transformers.

    Those of `added_tokens_decoder` come first, by their ids, else those of added_tokens.json; then
    special tokens that no list gives an id. If the vocabulary has a token under another id, that id
    counts.

    Raises:
        RequestError: If a new token cannot get the id that its file states.
    """
    stated = described.described or described.old_added
    known = {repr(token) for token in library.get_added_tokens_decoder().values()}
    before = {id: library.token_to_id(entry["content"]) for id, entry in stated.items()}
    listed = [tokenizers.AddedToken(**entry) for _, entry in sorted(stated.items())]
    if not described.described:  # tokenizer.json takes precedence over added_tokens.json
        listed = [token for token in listed if library.token_to_id(token.content) is None]
    library.add_tokens([token for token in listed if repr(token) not in known])
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    extra = [tokenizers.AddedToken(**one) for one in described.extra if one["content"] not in added]
    library.add_tokens(extra)
    for id, entry in stated.items():
        token, given = entry["content"], library.token_to_id(entry["content"])
        if before[id] is None:
            name = f"{described.folder}: id of the added token {token!r}"
            expect(given == id, name, id, f"{given}, the next free id in {source}")
        elif given != id:
            notice(
                f"{source}: the id of {token!r} is {given}; the {id} of a file beside "
                f"it is not used"
            )

"""Text to token ids and back, by one set of rules on top of every vocabulary file.

The vocabulary's own library does the work. This file has the rules that users need not think about:
text never becomes a special token unless asked, nothing is cut or padded, BOS and EOS are added
when asked for, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import RequestError, expect, notice
from transom.tokenizers.backend import AddedToken, TokenizerBackend, in_threads
from transom.tokenizers.fast import FastBackend
from transom.tokenizers.folder import TOKENIZER_FILE, read_folder
from transom.tokenizers.token_files import CONFIG_FILE

Span = tuple[int, int]  # characters of a text: the first, and one past the last


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: The vocabulary.
        bos: The token that begins a document, or None.
        eos: The token that ends a document, or None.
        pad: The token that fills rows, or None.
        adds_bos: Whether the makers' tokenizer puts BOS before a text; None asks the vocabulary.
        adds_eos: Whether the makers' tokenizer puts EOS after a text; None asks the vocabulary.
        files: What `save` writes, by name.

    Attributes:
        format: The kind of file: `tokenizer.json`, `sentencepiece`, `tiktoken` or `tekken`.
        version: Mistral's number of the chat format (`v3`) that the vocabulary is for, None
            elsewhere.
        vocab_size: The highest id + 1, added tokens included.
        bos_id: The id of BOS, or None; `eos_id` and `pad_id` likewise.
        unk_id: The id that stands for text outside the vocabulary, or None.
        begin: The ids that the makers' tokenizer puts before a text: mostly BOS, `[gMASK]<sop>`
            with GLM.
        end: The ids that the makers' tokenizer puts after a text: none, EOS, or the token that is
            pooled.
        stop_ids: The ids that end a text, a message or a turn, as far as the tokenizer's files
            tell.
        special_tokens: The ids of control tokens by spelling.
        special_ids: The ids of control tokens, which no text becomes unless asked and `decode`
            leaves out.
        raw_byte_ids: The ids that stand for one byte (`<0xE4>`) in a vocabulary of characters.
        spoils_byte_runs: Whether one bad byte turns the complete run of `raw_byte_ids` around it
            into U+FFFD.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        adds_bos: bool | None = None,
        adds_eos: bool | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        self._backend, self._files = backend, dict(files or {})
        self._named = {"bos": bos, "eos": eos, "pad": pad}
        for name, token in self._named.items():
            known = token is None or backend.token_to_id(token) is not None
            expect(known, name, token, "a token of the vocabulary")
        self.bos_id, self.eos_id, self.pad_id = (
            None if token is None else backend.token_to_id(token) for token in (bos, eos, pad)
        )
        before, after = backend.frame
        self.adds_bos = self.bos_id in before if adds_bos is None else adds_bos
        self.adds_eos = self.eos_id in after if adds_eos is None else adds_eos
        self.begin = _framed(before, self.bos_id, self.adds_bos)
        self.end = _framed(after, self.eos_id, self.adds_eos)
        stops = [self.eos_id, *map(backend.token_to_id, backend.stops)]
        self.stop_ids = tuple(id for id in stops if id is not None)
        added = backend.added
        self.special_tokens = {
            spelling: token.id for spelling, token in added.items() if token.control
        }
        self.special_ids = frozenset(self.special_tokens.values())
        self.format, self.version, self.unk_id = backend.format, backend.version, backend.unk_id
        self.vocab_size = backend.vocab_size
        self.raw_byte_ids, self.spoils_byte_runs = backend.raw_byte_ids, backend.spoils_byte_runs
        # Plain added tokens are found in every text.
        self._plain = _pattern({s: token for s, token in added.items() if not token.control})
        self._all = _pattern(added)

    # -- text to ids --

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        allowed_special: Literal["all"] | Collection[str] = (),
        protected: Sequence[Span] = (),
    ) -> list[int]:
        """Return the ids of a text.

        Args:
            text: The text. Special tokens that it spells stay text, unless they are in
                `allowed_special`.
            add_bos: Put BOS before the ids, unless it is allowed and already there.
            add_eos: Put EOS after the ids, unless it is allowed and already there.
            allowed_special: `all`, or the spellings of special tokens that are found in the text.
            protected: Spans of the text in which special tokens stay text all the same, such as
                those that the user of a chat template has written.

        Raises:
            RequestError: If the vocabulary lacks the BOS or EOS that is asked for.
        """
        ids = self._ids(_writable(text), self._allowed(allowed_special), protected)
        allowed = bool(allowed_special)
        head = self._edge("bos", add_bos, self.bos_id, allowed and ids[:1] == [self.bos_id])
        tail = self._edge("eos", add_eos, self.eos_id, allowed and ids[-1:] == [self.eos_id])
        return [*head, *ids, *tail]

    def _edge(self, name: str, wanted: bool, id: int | None, there: bool) -> list[int]:
        """Return the id that is added before or after a text, if it is wanted and not there."""
        expected = f"False, since this tokenizer has no {name.upper()} token"
        expect(not wanted or id is not None, f"add_{name}", True, expected)
        return [id] if wanted and id is not None and not there else []

    def encode_prompt(
        self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()
    ) -> list[int]:
        """Return the ids of `begin` and `text`; a `begin` that the text spells is not repeated."""
        ids = self.encode(text, allowed_special=allowed_special)
        begun = bool(allowed_special) and tuple(ids[: len(self.begin)]) == self.begin
        return ids if begun else [*self.begin, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS and EOS.

        All cores are used: by the vocabulary's library, or by one thread for each core if its
        library works on single texts or does not know the plain added tokens (added_tokens.json
        beside a SentencePiece model).
        """
        texts = [_writable(text) for text in texts]
        if self._plain is None:
            return self._backend.encode_batch(texts)
        return in_threads(lambda text: self._ids(text, self._plain, ()), texts)

    def _allowed(self, allowed_special: Literal["all"] | Collection[str]) -> re.Pattern[str] | None:
        """Return the pattern of allowed control tokens and plain added tokens."""
        if not allowed_special:
            return self._plain
        if allowed_special == "all":
            return self._all
        listed = not isinstance(allowed_special, str)
        expect(listed, "allowed_special", allowed_special, "all or a list of tokens")
        unknown = [one for one in allowed_special if one not in self.special_tokens]
        expected = f"some of the {len(self.special_tokens)} special tokens, or all"
        expect(not unknown, "allowed_special", unknown, expected)
        known = self._backend.added.items()
        return _pattern({s: one for s, one in known if s in allowed_special or not one.control})

    def _ids(
        self, text: str, pattern: re.Pattern[str] | None, protected: Sequence[Span]
    ) -> list[int]:
        """Return the ids of a text in which tokens of `pattern` are found."""
        if pattern is None:
            return self._backend.encode(text)
        ids: list[int] = []
        start, strip = 0, False
        for match in self._matches(text, pattern, protected):
            token = self._backend.added[match[0]]
            ids += self._between(text[start : match.start()], start == 0, strip, token.lstrip)
            ids.append(token.id)
            start, strip = match.end(), token.rstrip
        return ids + self._between(text[start:], start == 0, strip, False)

    def _between(self, text: str, first: bool, left: bool, right: bool) -> list[int]:
        text = text.lstrip() if left else text
        text = text.rstrip() if right else text
        return self._backend.encode(text, first) if text else []

    def _matches(
        self, text: str, pattern: re.Pattern[str], protected: Sequence[Span]
    ) -> Iterator[re.Match[str]]:
        """Yield control tokens outside of `protected`, and plain ones inside or outside."""
        place = 0
        for start, stop in [*sorted(protected), (len(text), len(text))]:
            expected = f"spans of the {len(text)} characters, none in another"
            expect(place <= start <= stop <= len(text), "protected", (start, stop), expected)
            yield from pattern.finditer(text, place, start)
            if self._plain is not None:
                yield from self._plain.finditer(text, start, stop)
            place = stop

    def spelled_in(self, text: str) -> list[str]:
        """Return the control tokens that a text spells, each once, in order."""
        found = [] if self._all is None else self._all.findall(text)
        return [one for one in dict.fromkeys(found) if one in self.special_tokens]

    # -- ids to text --

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids, with U+FFFD for bytes that are not UTF-8.

        Args:
            ids: Token ids.
            skip_special: Leave out control tokens.

        Raises:
            RequestError: If an id has no token.
        """
        ids = [int(id) for id in ids]
        # Libraries leave out an id that they do not know, without a notice, or fail.
        unknown = next((id for id in ids if id < 0 or self.id_to_token(id) is None), None)
        expected = f"ids below {self.vocab_size} that have a token"
        expect(unknown is None, "token id", unknown, expected)
        skipped = self.special_ids if skip_special else frozenset()
        return self._backend.decode([id for id in ids if id not in skipped])

    # -- the vocabulary --

    @cached_property
    def hash(self) -> str:
        """The SHA-256 in hex of the vocabulary, which saving and loading do not change."""
        return self._backend.fingerprint()

    def check_same_tokens(self, other: Tokenizer, name: str) -> None:
        """Raise `RequestError` unless every id is the same token in the tokenizer of another model.

        A notice tells if only the rules differ by which they cut text into tokens.

        Args:
            other: The tokenizer of the other model.
            name: That model, for messages.
        """
        if self.hash == other.hash:
            return
        own, size = self.vocab_size, other.vocab_size
        expect(size == own, f"{name}'s vocabulary", size, f"the model's {own} tokens")
        for id in range(own):
            token, found = self.id_to_token(id), other.id_to_token(id)
            expect(found == token, f"{name}'s token {id}", found, f"the model's, {token!r}")
        notice(f"{name}: its tokenizer has the model's tokens, but cuts text by other rules")

    def id_to_token(self, id: int) -> str | None:
        """Return the vocabulary's own spelling of an id, or None."""
        return self._backend.id_to_token(id)

    def token_text(self, id: int) -> str:
        """Return the text of one token, or `<token 217>` for an id that is no text of its own."""
        text = "" if self.id_to_token(id) is None else self.decode([id], skip_special=False)
        return text if text and "\ufffd" not in text else f"<token {id}>"

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token in the vocabulary's own spelling, or None."""
        return self._backend.token_to_id(token)

    def with_special(self, tokens: Sequence[str]) -> Tokenizer:
        """Return a tokenizer with more control tokens; only tokenizer.json can hold them."""
        backend, files = self._backend, dict(self._files)
        if not isinstance(backend, FastBackend):
            raise RequestError(f"new tokens: got a {backend.format}; expected a tokenizer.json")
        files.pop(TOKENIZER_FILE, None)
        config = json.loads(files.get(CONFIG_FILE, _json_bytes(self._config())))
        config.pop("added_tokens_decoder", None)  # it repeats tokenizer.json, without new tokens
        files[CONFIG_FILE] = _json_bytes(config)
        larger = backend.with_special(tokens)
        return Tokenizer(
            larger, **self._named, adds_bos=self.adds_bos, adds_eos=self.adds_eos, files=files
        )

    # -- files --

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write the files that this was read from, or those of a new vocabulary."""
        files = dict(self._files)
        if isinstance(self._backend, FastBackend):
            files.setdefault(TOKENIZER_FILE, self._backend.to_json(pretty=True).encode())
            files.setdefault(CONFIG_FILE, _json_bytes(self._config()))
        if model_max_length is not None:
            config = json.loads(files.get(CONFIG_FILE, b"{}"))
            files[CONFIG_FILE] = _json_bytes(config | {"model_max_length": model_max_length})
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def _config(self) -> dict[str, Any]:
        return {
            **{f"{name}_token": token for name, token in self._named.items() if token is not None},
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Older versions of transformers otherwise remove spaces before punctuation.
            "clean_up_tokenization_spaces": False,
        }

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a folder or in a file, with the files beside it."""
        return cls(**read_folder(path))


def _framed(frame: Sequence[int], named: int | None, adds: bool) -> tuple[int, ...]:
    """Return `frame` with the token `named` if `adds` is True, else without it."""
    others = tuple(id for id in frame if id != named)
    if named is None or not adds:
        return others
    return tuple(frame) if named in frame else (named, *others)


def _writable(text: str) -> str:
    """Return `text`; refuse half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except (UnicodeEncodeError, AttributeError):
        shown = text[:40] if isinstance(text, str) else text
        raise RequestError(f"text: got {shown!r}; expected text that UTF-8 can write") from None
    return text


def _pattern(tokens: Mapping[str, AddedToken]) -> re.Pattern[str] | None:
    """Return the pattern of the spellings of tokens, longer ones first."""
    spellings = sorted(filter(None, tokens), key=len, reverse=True)
    words = [
        rf"(?<!\w){re.escape(w)}(?!\w)" if tokens[w].single_word else re.escape(w)
        for w in spellings
    ]
    return re.compile("|".join(words)) if words else None


def _json_bytes(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()

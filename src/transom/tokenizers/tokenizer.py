"""Text to token ids and back, by one set of rules on top of every vocabulary file.

The vocabulary's own library does the work; this file decides what its users must not have to think
about: text never turns into a special token unless asked, nothing is cut or padded, BOS and EOS
appear when asked for, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import RequestError, require
from transom.tokenizers.backend import AddedToken, Backend, in_threads
from transom.tokenizers.beside import CONFIG_FILE, NAMED
from transom.tokenizers.fast import FastBackend
from transom.tokenizers.folder import TOKENIZER_FILE, read_folder
from transom.tokenizers.stream import StreamDecoder

Span = tuple[int, int]  # characters of a text: first, and one past the last


class Tokenizer:
    """Text to ids and back; `bos`, `eos` and `pad` are tokens of the vocabulary, or None.

    `adds_bos` and `adds_eos` are what the makers of the files do with a text; None asks the
    vocabulary. `files` are what `save` writes back, by name.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        adds_bos: bool | None = None,
        adds_eos: bool | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        named = zip(NAMED, (bos, eos, pad), strict=True)
        self._named = {field: token for field, token in named if token is not None}
        for field, token in self._named.items():
            known = backend.token_to_id(token) is not None
            require(known, field, token, "expected a token of the vocabulary")
        self._backend = backend
        self._files = dict(files or {})
        before, behind = backend.frame
        self.adds_bos = self.bos_id in before if adds_bos is None else adds_bos
        self.adds_eos = self.eos_id in behind if adds_eos is None else adds_eos

    # -- text to ids
    # ---------------------------------------------------------------------------------

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        allowed_special: Literal["all"] | Collection[str] = (),
        protected: Sequence[Span] = (),
    ) -> list[int]:
        """Ids of `text`; asking for a BOS or EOS that the vocabulary lacks is a `RequestError`.

        Special tokens spelled in `text` stay text, but for `allowed_special`: "all", or their
        spellings. They stay text in the `protected` spans all the same, which a chat template's
        user has written. A BOS or EOS that is allowed and already there is not added again.
        """
        before, after = self.bos_id if add_bos else None, self.eos_id if add_eos else None
        require(
            not add_bos or before is not None, "add_bos", True, "this tokenizer has no BOS token"
        )
        require(
            not add_eos or after is not None, "add_eos", True, "this tokenizer has no EOS token"
        )
        ids = self._ids(_writable(text), self._allowed(allowed_special), protected)
        begun = bool(allowed_special) and ids[:1] == [before]
        ended = bool(allowed_special) and ids[-1:] == [after]
        head = [] if before is None or begun else [before]
        tail = [] if after is None or ended else [after]
        return [*head, *ids, *tail]

    def encode_prompt(
        self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()
    ) -> list[int]:
        """Return the ids of `begin` and `text`, without repeating a `begin` that the text
        spells.
        """
        ids = self.encode(text, allowed_special=allowed_special)
        begun = bool(allowed_special) and tuple(ids[: len(self.begin)]) == self.begin
        return ids if begun else [*self.begin, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS, on all cores."""
        texts = [_writable(text) for text in texts]
        if self._plain is None:
            return self._backend.encode_batch(texts)
        return in_threads(lambda text: self._ids(text, self._plain, ()), texts)

    def _allowed(self, allowed_special: Literal["all"] | Collection[str]) -> re.Pattern[str] | None:
        """Finds the tokens that may be found by their spelling: allowed control tokens, and plain
        added ones.
        """
        if not allowed_special:
            return self._plain
        if allowed_special == "all":
            return self._all
        require(
            not isinstance(allowed_special, str),
            "allowed_special",
            allowed_special,
            "expected all or a list",
        )
        for spelling in allowed_special:
            expected = (
                f"expected one of the {len(self.special_tokens)} special tokens of this "
                f"vocabulary, or all"
            )
            require(spelling in self.special_tokens, "allowed_special", spelling, expected)
        added = self._backend.added
        return _pattern(
            {s: token for s, token in added.items() if s in allowed_special or not token.control}
        )

    def _ids(
        self, text: str, found: re.Pattern[str] | None, protected: Sequence[Span]
    ) -> list[int]:
        """Ids of a text in which `found` tokens are spelled; between them it is encoded as plain
        text.
        """
        if found is None:
            return self._backend.encode(text)
        ids: list[int] = []
        start, strip = 0, False
        for match in self._matches(text, found, protected):
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
        self, text: str, found: re.Pattern[str], protected: Sequence[Span]
    ) -> Iterator[re.Match[str]]:
        """Where tokens are spelled: control tokens wholly outside of `protected`, plain ones wholly
        in or out.
        """
        place = 0
        for start, stop in [*sorted(protected), (len(text), len(text))]:
            expected = f"expected spans of the {len(text)} characters, none in another"
            require(place <= start <= stop <= len(text), "protected", (start, stop), expected)
            yield from found.finditer(text, place, start)
            if self._plain is not None:
                yield from self._plain.finditer(text, start, stop)
            place = stop

    @cached_property
    def _all(self) -> re.Pattern[str] | None:
        return _pattern(self._backend.added)

    @cached_property
    def _plain(self) -> re.Pattern[str] | None:
        """Finds added tokens that are plain text, which are found in every text."""
        return _pattern({s: token for s, token in self._backend.added.items() if not token.control})

    def spelled_in(self, text: str) -> list[str]:
        """Return the control tokens that `text` spells, each once, in the order of their first
        places.
        """
        found = [] if self._all is None else self._all.findall(text)
        return [one for one in dict.fromkeys(found) if one in self.special_tokens]

    # -- ids to text
    # ---------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, bytes that are not UTF-8 as U+FFFD; an id without a token is a
        `RequestError`.
        """
        ids = [int(id) for id in ids]
        for id in ids:  # libraries leave out an id that they do not know, without a word, or fail
            known = id >= 0 and self.id_to_token(id) is not None
            require(
                known, "token id", id, f"expected ids below {self.vocab_size} that have a token"
            )
        return self._backend.decode(
            [id for id in ids if not skip_special or id not in self.special_ids]
        )

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self, skip_special=skip_special)

    # -- the vocabulary
    # ------------------------------------------------------------------------------

    @property
    def format(self) -> str:
        """The kind of file: `tokenizer.json`, `sentencepiece`, `tiktoken` or `tekken`."""
        return self._backend.format

    @property
    def version(self) -> str | None:
        """Mistral's number of the chat format (`v3`) that the vocabulary was made for, None
        elsewhere.
        """
        return self._backend.version

    @property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included."""
        return self._backend.vocab_size

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the token that begins a document."""
        return self._named_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """Id of the token that ends a document."""
        return self._named_id("eos_token")

    @cached_property
    def pad_id(self) -> int | None:
        """Id of the token that fills up rows."""
        return self._named_id("pad_token")

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """Ids that the makers' tokenizer adds before a text: mostly BOS, `[gMASK]<sop>` with
        GLM.
        """
        return _framed(self._backend.frame[0], self.bos_id, self.adds_bos)

    @cached_property
    def end(self) -> tuple[int, ...]:
        """Ids that the makers' tokenizer adds after a text: none, EOS, or the token that is
        pooled.
        """
        return _framed(self._backend.frame[1], self.eos_id, self.adds_eos)

    @property
    def unk_id(self) -> int | None:
        """Id that stands for text the vocabulary cannot write; None when there is no such token."""
        return self._backend.unk_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text, a message or a turn, as far as the tokenizer's files tell: EOS, eom,
        eot.
        """
        ids = [self.eos_id, *(self.token_to_id(token) for token in self._backend.stops)]
        return tuple(id for id in ids if id is not None)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of control tokens by their spelling."""
        return {
            spelling: token.id for spelling, token in self._backend.added.items() if token.control
        }

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which `decode` leaves out and which no text encodes to unless
        asked.
        """
        return frozenset(self.special_tokens.values())

    @property
    def raw_byte_ids(self) -> frozenset[int]:
        """Ids that stand for one byte (`<0xE4>`) beside a vocabulary of characters."""
        return self._backend.raw_byte_ids

    @property
    def spoils_byte_runs(self) -> bool:
        """Whether one bad byte makes U+FFFD of the whole run of `raw_byte_ids` around it."""
        return self._backend.spoils_byte_runs

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex of the vocabulary; saving and loading leave it as it is."""
        return self._backend.fingerprint()

    def id_to_token(self, id: int) -> str | None:
        """The vocabulary's own spelling of `id`."""
        return self._backend.id_to_token(id)

    def token_text(self, id: int) -> str:
        """Return the text of one token, or `<token 217>` for an id that is no text of its own."""
        text = "" if self.id_to_token(id) is None else self.decode([id], skip_special=False)
        return text if text and "\ufffd" not in text else f"<token {id}>"

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling."""
        return self._backend.token_to_id(token)

    def _named_id(self, field: str) -> int | None:
        return self.token_to_id(self._named[field]) if field in self._named else None

    def with_special(self, tokens: Sequence[str]) -> Tokenizer:
        """A tokenizer with more control tokens behind the others; only tokenizer.json can hold
        them.
        """
        backend, files = self._backend, dict(self._files)
        if not isinstance(backend, FastBackend):
            raise RequestError(
                f"new tokens: valid only with a tokenizer.json, this is {backend.format}"
            )
        files.pop(TOKENIZER_FILE, None)
        config = json.loads(files.get(CONFIG_FILE, _json_bytes(self._config())))
        config.pop(
            "added_tokens_decoder", None
        )  # says again what tokenizer.json says, and would now be wrong
        files[CONFIG_FILE] = _json_bytes(config)
        bos, eos, pad = (self._named.get(field) for field in NAMED)
        policy = {"adds_bos": self.adds_bos, "adds_eos": self.adds_eos}
        return Tokenizer(
            backend.with_special(tokens), bos=bos, eos=eos, pad=pad, files=files, **policy
        )

    # -- files
    # ---------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write back the files this was read from; a new vocabulary becomes files that
        `transformers` reads.
        """
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
            **self._named,
            "tokenizer_class": "PreTrainedTokenizerFast",
            # older readers remove spaces before punctuation otherwise
            "clean_up_tokenization_spaces": False,
        }

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a folder, or the one in a file, with what the files beside it
        say.
        """
        read = read_folder(path)
        bos, eos, pad = (read.named.get(field) for field in NAMED)
        policy = {"adds_bos": read.adds_bos, "adds_eos": read.adds_eos}
        return cls(read.backend, bos=bos, eos=eos, pad=pad, files=read.files, **policy)


def _framed(frame: Sequence[int], named: int | None, adds: bool) -> tuple[int, ...]:
    """Return `frame` with or without the token `named`, as `adds` says."""
    others = tuple(id for id in frame if id != named)
    if named is None or not adds:
        return others
    return tuple(frame) if named in frame else (named, *others)


def _writable(text: str) -> str:
    """`text`, unless UTF-8 cannot write it: half a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except (UnicodeEncodeError, AttributeError):
        shown = text[:40] if isinstance(text, str) else text
        raise RequestError(f"text: got {shown!r}; expected text that UTF-8 can write") from None
    return text


def _pattern(tokens: Mapping[str, AddedToken]) -> re.Pattern[str] | None:
    """Finds the spellings of tokens, the longest of those that begin at one place."""
    spellings = sorted(filter(None, tokens), key=len, reverse=True)
    words = [
        rf"(?<!\w){re.escape(w)}(?!\w)" if tokens[w].single_word else re.escape(w)
        for w in spellings
    ]
    return re.compile("|".join(words)) if words else None


def _json_bytes(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()

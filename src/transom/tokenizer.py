"""Text to token ids and back: any tokenizer.json, streaming decoding, and three ways to make a new one.

The work is done by the `tokenizers` library; this file decides what its users must not have to think
about: text never turns into a special token, nothing is cut or padded, BOS and EOS appear when asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from transom.errors import RequestError, notice, require

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
NAMED = ("bos_token", "eos_token", "pad_token")
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
UNKNOWN_TOKEN = "<|unknown|>"

# The Llama 3 rule for cutting text into words before byte pairs are merged: contractions, words with one
# leading non-letter, digits in threes, punctuation, line ends, and spaces that leave the last one to a word.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back; `bos`, `eos` and `pad` are tokens of the vocabulary, or None."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ) -> None:
        named = zip(NAMED, (bos, eos, pad), strict=True)
        self._named = {field: token for field, token in named if token is not None}
        for field, token in self._named.items():
            known = backend.token_to_id(token) is not None
            require(known, field, token, "accepted is a token of the vocabulary")
        _mark_special(backend, self._named.values())
        backend.encode_special_tokens = True  # specials spelled out in text are encoded as plain text
        backend.no_truncation()  # both are stored in some files, and both change lengths without a word
        backend.no_padding()
        self._backend = backend

    # -- text to ids ---------------------------------------------------------------------------------

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of `text`; asking for a BOS or EOS that the vocabulary lacks is a `RequestError`."""
        before, after = self.bos_id if add_bos else None, self.eos_id if add_eos else None
        require(not add_bos or before is not None, "add_bos", True, "this tokenizer has no BOS token")
        require(not add_eos or after is not None, "add_eos", True, "this tokenizer has no EOS token")
        ids = self._checked(text, self._encoding(text).ids)
        return [*([] if before is None else [before]), *ids, *([] if after is None else [after])]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS, on all cores."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # encoded alone, the text that is to blame is named
            encodings = [self._encoding(text) for text in texts]
        return [self._checked(text, one.ids) for text, one in zip(texts, encodings, strict=True)]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except TypeError as error:  # half a surrogate pair: JSON can spell it, UTF-8 cannot
            shown = text[:40] if isinstance(text, str) else text
            raise RequestError(f"text = {shown!r}: accepted is text that UTF-8 can write") from error

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        if isinstance(self._backend.model, models.WordLevel) and self.unk_id in ids:
            encoding = self._encoding(text)
            start, stop = next(edge for id, edge in zip(ids, encoding.offsets, strict=True) if id == self.unk_id)
            accepted = f"accepted are the {self.vocab_size} entries of the vocabulary"
            raise RequestError(f"text holds {text[start:stop]!r} at character {start}: {accepted}")
        return ids if self._guarded_ids.isdisjoint(ids) else self._without_specials(text)

    def _without_specials(self, text: str) -> list[int]:
        """Ids of a text whose own words reach a special token through the model's vocabulary.

        Unigram and word vocabularies list their specials as ordinary entries, so "</s>" in a text finds
        its id. Such a place is cut after its first character and both sides are encoded apart. A special
        of one character (a line end used as EOS) has no other spelling and stays.
        """
        encoding = self._encoding(text)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for id, (start, stop) in found if id in self._guarded_ids and stop - start > 1]
        if not cuts:
            return list(encoding.ids)
        parts = pairwise([0, *cuts, len(text)])
        return [id for start, stop in parts for id in self._without_specials(text[start:stop])]

    # -- ids to text ---------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, bytes that are not UTF-8 as U+FFFD; an id without a token is a `RequestError`."""
        ids = [int(id) for id in ids]
        for id in ids:  # the library leaves out an id that it does not know, without a word
            known = id >= 0 and self.id_to_token(id) is not None
            require(known, "token id", id, f"accepted are ids below {self.vocab_size} that have a token")
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special)
        return text

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self, skip_special=skip_special)

    # -- the vocabulary ------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included."""
        return int(max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)) + 1

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
    def unk_id(self) -> int | None:
        """Id that stands for text the vocabulary cannot write; None when there is no such token."""
        if isinstance(self._backend.model, models.Unigram):  # the library does not show this one
            unk_id: int | None = json.loads(self._backend.to_str())["model"].get("unk_id")
            return unk_id
        token = getattr(self._backend.model, "unk_token", None)
        return None if token is None else self.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which `decode` leaves out and which no text encodes to."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def raw_byte_ids(self) -> frozenset[int]:
        """Ids that stand for one byte (`<0xE4>`) and that only a whole run of them can decode."""
        if self._backend.decoder is None or b'"ByteFallback"' not in self._backend.decoder.__getstate__():
            return frozenset()
        ids = [self.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        return frozenset(id for id in ids if id is not None)

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hex of the content of tokenizer.json, whitespace aside."""
        # The library reads a score back up to one unit in the last place away from what it has written.
        content = json.loads(self._backend.to_str(), parse_float=lambda text: f"{float(text):.9g}")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def id_to_token(self, id: int) -> str | None:
        """The vocabulary's own spelling of `id`."""
        token: str | None = self._backend.id_to_token(id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling."""
        id: int | None = self._backend.token_to_id(token)
        return id

    def _named_id(self, field: str) -> int | None:
        return self.token_to_id(self._named[field]) if field in self._named else None

    @cached_property
    def _guarded_ids(self) -> frozenset[int]:
        return self.special_ids - {self.unk_id}  # text may well become the unknown token

    # -- files ---------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers` reads too."""
        config: dict[str, Any] = {
            **self._named,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # older readers remove spaces before punctuation otherwise
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder with a tokenizer.json, or that file itself, and the names of BOS, EOS and PAD."""
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        accepted = f"accepted is a folder with {TOKENIZER_FILE}, or that file"
        require(file.is_file(), "tokenizer", str(path), accepted)
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise RequestError(f"{file}: accepted is the JSON of a fast tokenizer ({error})") from error
        named = _named_tokens(file.parent)
        for field, token in list(named.items()):
            if backend.token_to_id(token) is None:
                notice(f"{file}: {field} {token!r} is not in the vocabulary and is left out")
                del named[field]
        bos, eos, pad = (named.get(field) for field in NAMED)
        return cls(backend, bos=bos, eos=eos, pad=pad)


class StreamDecoder:
    """Turns ids into text one at a time; the returned pieces joined are `decode` of all the ids.

    Tokens cannot be decoded alone: a character may span several, and the first one of a text may lose its
    leading space. So the ids of the last piece returned stay as context: the new text is what context and
    held ids decode to beyond what the context alone decodes to. Both are a few ids long.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []
        self._held_text = ""

    def push(self, id: int) -> str:
        """The text that `id` completes, often none: part of a character is never returned."""
        if id in self._skipped:
            return ""
        if id in self._tokenizer.raw_byte_ids:
            # One bad byte turns its whole run into U+FFFD: nothing is known before the run ends.
            self._held.append(id)
            return ""
        new = self._beyond_context([*self._held, id])
        if self._tokenizer.raw_byte_ids or not new.endswith("\ufffd"):
            self._held.append(id)
            return self._release(new)
        # Bytes of a character may be missing. If `id` only adds to what is held, they will not come any more.
        alone = self._decode([id])
        broken = new == self._held_text + alone
        text = self._release(self._held_text) if broken else ""
        self._held.append(id)
        self._held_text = alone if broken else new
        return text

    def finish(self) -> str:
        """The text still held, an unfinished character as U+FFFD; the decoder is then as new."""
        text = self._beyond_context(self._held)
        self._context, self._context_text, self._held, self._held_text = [], "", [], ""
        return text

    def _release(self, text: str) -> str:
        """Return `text`, that of the held ids, which become the context."""
        if text:  # ids without text cannot be the context: the next one would lose its leading space
            self._context, self._held, self._held_text = self._held, [], ""
            self._context_text = self._decode(self._context)
        return text

    def _beyond_context(self, ids: list[int]) -> str:
        return self._decode(self._context + ids)[len(self._context_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


# -- new tokenizers ----------------------------------------------------------------------------------


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    progress: bool = False,
) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` ids: the specials (BOS, EOS, ...), 256 bytes, then merges.

    The same texts give the same file. A text too small for that many merges is a `RequestError`.
    """
    smallest = 256 + len(special_tokens)
    accepted = f"accepted is {smallest} (256 bytes and the specials) or more"
    require(vocab_size >= smallest, "vocab_size", vocab_size, accepted)
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    accepted = f"accepted is at most {reached}, which is all that this text supports"
    require(reached == vocab_size, "vocab_size", vocab_size, accepted)
    return _finished(backend, special_tokens)


def train_chars(texts: Iterable[str], special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """One id per character of `texts`, in code point order after the specials and the unknown token.

    Encoding a character that the texts did not hold is a `RequestError` naming it.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    require(bool(characters), "texts", "", "accepted is at least one character")
    tokens = [*special_tokens, UNKNOWN_TOKEN, *sorted(characters)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    _mark_special(backend, [UNKNOWN_TOKEN])
    return _finished(backend, special_tokens)


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """One id per UTF-8 byte, the id being the byte's value; the specials follow from 256 on."""
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, special_tokens)


def _finished(backend: tokenizers.Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """The first special is BOS, the second EOS; other readers of the file add BOS, as with Llama 3."""
    accepted = "accepted are two or more: BOS, EOS, others"
    require(len(special_tokens) >= 2, "special_tokens", tuple(special_tokens), accepted)
    _mark_special(backend, special_tokens)
    bos, eos = special_tokens[:2]
    begin = (bos, backend.token_to_id(bos))
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[begin])
    return Tokenizer(backend, bos=bos, eos=eos)


def _mark_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Make `tokens` special, adding those that are new; what is special already keeps its settings."""
    added = backend.get_added_tokens_decoder().values()
    marked = {token.content for token in added if token.special}
    backend.add_special_tokens([token for token in tokens if token not in marked])


def _byte_letters() -> list[str]:
    """The printable letter that byte-level vocabularies write for each of the 256 bytes: GPT-2's table."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _named_tokens(folder: Path) -> dict[str, str]:
    """Names of BOS, EOS and PAD; a name in tokenizer_config.json wins over special_tokens_map.json."""
    named: dict[str, str] = {}
    for file in (folder / SPECIALS_FILE, folder / CONFIG_FILE):
        if not file.is_file():
            continue
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(f"{file}: accepted is JSON ({error})") from error
        require(isinstance(entries, dict), str(file), type(entries).__name__, "accepted is a JSON object")
        for field in NAMED:
            entry = entries.get(field)
            token = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(token, str):
                named[field] = token
    return named

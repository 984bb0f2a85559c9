"""Tokenized documents in the cache folder: encoded once, then memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import WorkError, expect
from transom.data.cache import cache_entry, read_shard, shard_writer, with_progress
from transom.data.text.sources import Document, ReadReport, SourceArgs, held_out, read_split
from transom.tokenizers.tokenizer import Tokenizer

FORMAT = 1  # increase it when the files change, so that older entries are not found
TRAIN, HELD_OUT = "train", "held_out"
# Tokenized together, by several threads; every document counts some more for what surrounds it.
BATCH_CHARACTERS, DOCUMENT_CHARACTERS = 1 << 20, 1 << 10


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Documents as token ids without BOS and EOS, one after another.

    Attributes:
        tokens: The ids of all documents, uint16 or uint32 [tokens], memory-mapped.
        offsets: Where each document begins, if nothing is between them, int64 [documents + 1].
        bytes: The length of each text in bytes of UTF-8, int64 [documents].
        ids: The id of each document.
        places: Where each document begins in `tokens` if others are between them, int64
            [documents].
    """

    tokens: Any
    offsets: NDArray[np.int64]
    bytes: NDArray[np.int64]
    ids: Sequence[str]
    places: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)

    def document(self, index: int) -> NDArray[Any]:
        """Return the ids of one document, [tokens]."""
        first = (self.offsets if self.places is None else self.places)[index]
        return self.tokens[first : first + self.offsets[index + 1] - self.offsets[index]]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized source.

    Attributes:
        train: The documents to train on.
        held_out: The documents that are held out.
        report: What was found in the source and what was left out.
        unknown_tokens: How many tokens stand for text that the vocabulary can't write.
        sha256: Hash in hex of the ids and texts of all documents, in order.
        folder: The cache entry.
    """

    train: TokenFile
    held_out: TokenFile
    report: ReadReport
    unknown_tokens: int
    sha256: str
    folder: Path


def prepare(
    source: SourceArgs,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    *,
    held_out_fraction: float = 0.0,
    progress: bool = False,
) -> Corpus:
    """Tokenize a source, or open the files of an earlier call with equal texts and tokenizer.

    The texts are read to compute the key of the cache entry, and read again if it is missing.

    Args:
        source: Where the documents are.
        tokenizer: Encodes them.
        cache_dir: The folder of all cache entries; None is `$TRANSOM_CACHE`, or `~/.cache/transom`.
        held_out_fraction: The share of documents to hold out, at least 0 and below 1.
        progress: Whether to show progress bars on standard error.

    Raises:
        RequestError: The source can't be read, or `held_out_fraction` leaves nothing to train on.
        WorkError: The cache folder can't be written to, or the texts changed while they were read.
    """
    usable = 0 <= held_out_fraction < 1
    expect(usable, "held_out_fraction", held_out_fraction, "0 or more and below 1")
    report = ReadReport()
    documents = read_split(source, held_out_fraction, report)
    digest = hashlib.sha256()
    for _ in _hashed(with_progress(documents, "reading", None, progress), digest):
        pass
    sha256 = digest.hexdigest()

    def make(folder: Path) -> dict[str, Any]:
        documents = read_split(source, held_out_fraction)
        shown = with_progress(documents, "tokenizing", report.documents, progress)
        return _write_parts(shown, tokenizer, folder, held_out_fraction, sha256)

    entry = cache_entry(cache_dir, [FORMAT, sha256, tokenizer.hash, held_out_fraction], make)
    train, held = (_open(entry.folder, part, entry.meta["dtype"]) for part in (TRAIN, HELD_OUT))
    expected = f"a fraction that leaves some of the {report.documents} documents to train on"
    expect(len(train) > 0, "held_out_fraction", held_out_fraction, expected)
    return Corpus(train, held, report, entry.meta["unknown_tokens"], sha256, entry.folder)


def _write_parts(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, fraction: float, sha256: str
) -> dict[str, Any]:
    """Write both parts into a folder and return the metadata of the entry."""
    dtype = token_dtype(tokenizer)
    digest = hashlib.sha256()
    unknown = 0
    with (
        shard_writer(folder, TRAIN, {"tokens": dtype, "bytes": "int64"}) as train,
        shard_writer(folder, HELD_OUT, {"tokens": dtype, "bytes": "int64"}) as rest,
    ):
        for batch in batched(_hashed(documents, digest)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                append = rest if held_out(document.id, fraction) else train
                append(document.id, ids, bytes=len(document.text.encode()))
                unknown += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
    if digest.hexdigest() != sha256:
        raise WorkError("the texts of the source changed while they were read; run it again")
    return {"dtype": dtype, "unknown_tokens": unknown}


def token_dtype(tokenizer: Tokenizer) -> str:
    """Return the dtype of ids in files."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _open(folder: Path, part: str, dtype: str) -> TokenFile:
    columns, ids = read_shard(folder, part, {"tokens": dtype, "bytes": "int64"})
    return TokenFile(**columns, ids=ids)


def _hashed(documents: Iterable[Document], digest: hashlib._Hash) -> Iterator[Document]:
    """Yield the documents and add each id and text, after its length in bytes, to the digest."""
    for document in documents:
        for part in (document.id.encode(errors="surrogateescape"), document.text.encode()):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        yield document


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents with about `BATCH_CHARACTERS` characters, or one longer document."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + DOCUMENT_CHARACTERS
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

"""Documents tokenised once into memory-mapped files, kept under the hash of what they were made
from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from transom.base import files as paths
from transom.base.claims import Claim
from transom.base.errors import RequestError, WorkError, notice, require
from transom.data.text.sources import Document, ReadReport, SourceArgs, held_out, read_split
from transom.tokenizers.tokenizer import Tokenizer

FORMAT = 1  # raise it when the files change: old entries are then not found
META_FILE = "meta.json"
TRAIN, HELD_OUT = "train", "held_out"
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Documents as ids without BOS and EOS, laid end to end."""

    tokens: NDArray[Any]  # uint16 or uint32 [tokens], memory-mapped
    offsets: NDArray[np.int64]  # [documents + 1], in tokens
    bytes: NDArray[np.int64]  # [documents], the length of each text in UTF-8
    ids: list[str]  # [documents]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> NDArray[Any]:
        """Ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A source as token files: the part to train on and the part held out of it."""

    train: TokenFile
    held_out: TokenFile
    report: ReadReport
    unknown_tokens: int  # places where the vocabulary could not write the text
    sha256: str  # of the ids and texts of all documents, in order
    folder: Path


def prepare(
    source: SourceArgs,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    *,
    held_out_fraction: float = 0.0,
    progress: bool = False,
) -> Corpus:
    """Tokenise `source`, or reuse the files of an earlier run over the same texts with the same
    tokenizer.

    The texts are read twice: once to find the key, and when it is new a second time to encode them.
    """
    usable = 0 <= held_out_fraction < 1
    require(usable, "held_out_fraction", held_out_fraction, "expected 0 or more and below 1")
    report = ReadReport()
    sha256 = _hash_documents(
        _shown(read_split(source, held_out_fraction, report), "reading", None, progress)
    )
    key = [FORMAT, sha256, tokenizer.hash, held_out_fraction]
    cache_dir = paths.cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache_dir / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    with Claim(folder, wait=True):  # a second process waits, and reads what the first has written
        meta = _read_meta(folder)
        if meta is None:
            documents = _shown(
                read_split(source, held_out_fraction), "tokenizing", report.documents, progress
            )
            _build(documents, tokenizer, folder, held_out_fraction, sha256)
            meta = json.loads((folder / META_FILE).read_text())
    corpus = Corpus(
        train=_open(folder, TRAIN, meta["dtype"]),
        held_out=_open(folder, HELD_OUT, meta["dtype"]),
        report=report,
        unknown_tokens=meta["unknown_tokens"],
        sha256=sha256,
        folder=folder,
    )
    expected = (
        f"expected a fraction that leaves documents to train on ({report.documents} are there)"
    )
    require(len(corpus.train) > 0, "held_out_fraction", held_out_fraction, expected)
    return corpus


# -- writing
# -----------------------------------------------------------------------------------------


def _build(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, fraction: float, sha256: str
) -> None:
    """Write a cache entry beside its place and move it there when it is complete."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    digest = hashlib.sha256()
    unknown = 0
    with _temporary_beside(folder) as temporary:
        with _Part(temporary, TRAIN, dtype) as train, _Part(temporary, HELD_OUT, dtype) as rest:
            for batch in _batched(_hashed(documents, digest)):
                encoded = tokenizer.encode_batch([document.text for document in batch])
                for document, ids in zip(batch, encoded, strict=True):
                    part = rest if held_out(document.id, fraction) else train
                    part.append(document, ids)
                    unknown += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
        if digest.hexdigest() != sha256:
            raise WorkError("the texts of the source changed while they were read, run it again")
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        meta = {"dtype": dtype, "unknown_tokens": unknown, "sizes": sizes}
        _write(temporary / META_FILE, json.dumps(meta, indent=2).encode())


class _Part:
    """The files of one `TokenFile` while they are written."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._tokens: BinaryIO = (folder / f"{name}.tokens").open("wb")
        self._offsets, self._bytes = [0], list[int]()
        self._ids: list[str] = []

    def append(self, document: Document, ids: list[int]) -> None:
        # Not ndarray.tofile: on a full disk it raises an error without its errno.
        self._tokens.write(np.asarray(ids, dtype=self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._bytes.append(len(document.text.encode()))
        self._ids.append(document.id)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._tokens:
            if kind is not None:
                return
            _sync(self._tokens)
        _write(
            self._folder / f"{self._name}.offsets", np.asarray(self._offsets, np.int64).tobytes()
        )
        _write(self._folder / f"{self._name}.bytes", np.asarray(self._bytes, np.int64).tobytes())
        _write(self._folder / f"{self._name}.ids.json", json.dumps(self._ids).encode())


@contextlib.contextmanager
def _temporary_beside(folder: Path) -> Iterator[Path]:
    """A new folder that becomes `folder` when the block ends well, and is removed when it does
    not.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        yield temporary
        paths.sync(temporary)
        try:
            temporary.rename(folder)
        except OSError as error:
            # Another process may have finished the same entry meanwhile: same key, same files, keep
            # those.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        paths.sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkError(
                f"{folder.parent}: the disk is full, the token files need more space"
            ) from error
        expected = f"expected a folder that can be written to ({error.strerror})"
        raise RequestError(f"cache_dir: got {str(folder.parent)!r}; {expected}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


# -- reading
# -----------------------------------------------------------------------------------------


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """What an entry says about itself; None when there is none or its files are not the ones it
    wrote.
    """
    if not folder.exists():
        return None
    try:
        meta: dict[str, Any] = json.loads((folder / META_FILE).read_text())
        wrong = [name for name, size in meta["sizes"].items() if _size(folder / name) != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wrong = [META_FILE]
    if not wrong:
        return meta
    notice(f"{folder}: {wrong[0]} is not what was written there, the entry is made anew")
    shutil.rmtree(folder)
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _open(folder: Path, name: str, dtype: str) -> TokenFile:
    tokens = folder / f"{name}.tokens"
    empty = tokens.stat().st_size == 0  # which the system refuses to map
    return TokenFile(
        tokens=np.zeros(0, dtype) if empty else np.memmap(tokens, dtype=dtype, mode="r"),
        offsets=np.fromfile(folder / f"{name}.offsets", dtype=np.int64),
        bytes=np.fromfile(folder / f"{name}.bytes", dtype=np.int64),
        ids=json.loads((folder / f"{name}.ids.json").read_text()),
    )


# -- streams of documents
# ----------------------------------------------------------------------------


def _hash_documents(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for _ in _hashed(documents, digest):
        pass
    return digest.hexdigest()


def _hashed(documents: Iterable[Document], digest: hashlib._Hash) -> Iterator[Document]:
    """The documents as they are; `digest` takes in each id and text, behind its length in bytes."""
    for document in documents:
        for part in (document.id.encode(errors="surrogateescape"), document.text.encode()):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        yield document


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents that end at a number of documents or of characters, whichever comes
    first.
    """
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shown(
    documents: Iterator[Document], what: str, total: int | None, progress: bool
) -> Iterator[Document]:
    """The documents as they are, with a bar on standard error if `progress`; `total` None is not
    known.
    """
    if not progress:
        return documents
    from rich.console import Console
    from rich.progress import track

    return iter(track(documents, what, total=total, console=Console(stderr=True)))

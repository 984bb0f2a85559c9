"""Text to a folder of tokens, by several processes and on several machines.

The files of a source, laid end to end, are divided every `SHARD_BYTES`, and a file belongs to the
shard in which it begins. Larger files of rows are first cut into pieces of `SHARD_BYTES`. Shards
are therefore the same for any number of processes and parts.
The facts of a shard (`NAME.json`) are written last: a shard without them is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from transom.base.errors import expect, notice
from transom.base.files import sha256_of
from transom.base.locks import FolderLock
from transom.data.cache import read_shard, shard_writer, with_progress
from transom.data.processes import mapped, usable_cores
from transom.data.row_files import FileRange, LineEnds
from transom.data.store import FileStore
from transom.data.text.shards import batched, token_dtype
from transom.data.text.sources import (
    MANIFEST,
    Document,
    ReadReport,
    SourceArgs,
    TextFile,
    draw_of,
    list_files,
    read_files,
)
from transom.data.text.token_folder import COLUMNS, FORMAT, read_manifest
from transom.planning.tables import counted_words
from transom.tokenizers.tokenizer import Tokenizer

SHARD_BYTES = 1 << 28  # of the files of a shard; a larger file that can't be cut is one shard
CUT = (".jsonl", ".ndjson", ".parquet")  # not compressed
Task = tuple[str, Sequence[Document]]  # the name of a shard, and some of its documents
Encoded = tuple[str, list[tuple[str, Any, int]]]  # the same, with the id, tokens and bytes of each


def tokenize(
    source: SourceArgs,
    tokenizer: Tokenizer,
    out: str,
    *,
    workers: int | None = None,
    part: str = "1/1",
    progress: bool = False,
) -> tuple[dict[str, Any], ReadReport]:
    """Write the shards of a part that the folder lacks, and the manifest once all parts are there.

    Args:
        source: The text.
        tokenizer: Encodes it.
        out: A path or URL of the folder, which all parts share.
        workers: How many processes encode; by default as many as there are cores.
        part: `I/N`: part I of N, from 1. Any number of parts makes the same shards.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The manifest, with None for `shards` while parts are missing, and what was read.

    Raises:
        RequestError: An argument is wrong, or the folder has tokens of other files or another
            tokenizer.
    """
    workers = usable_cores() if workers is None else workers
    expect(workers >= 1, "--workers", workers, "1 or more")
    index, parts = (int(one) if one.isdecimal() else 0 for one in part.partition("/")[::2])
    expect(1 <= index <= parts, "--part", part, "I/N with I from 1 to N")
    report, store = ReadReport(), FileStore(out)
    files = list(chain.from_iterable(map(_pieces, list_files(source, report))))
    begins = accumulate((file.size for file in files), initial=0)
    groups = groupby(zip(files, begins, strict=False), key=lambda one: one[1] // SHARD_BYTES)
    shards = {f"{at:08d}": [file for file, _ in group] for at, (_, group) in enumerate(groups)}
    if parts > 1 and (uncut := sum(file.size > SHARD_BYTES for file in files)):
        what = f"files of more than {SHARD_BYTES:,} bytes can't be divided among parts"
        notice(f"{counted_words(uncut, what)}; uncompressed {', '.join(CUT)} files can")
    with FolderLock(store.local / f"part-{index}") if store.local else nullcontext():
        manifest, done = _begin(store, source, tokenizer, shards), _facts(store)
        missing = [name for name in [*shards][index - 1 :: parts] if name not in done]
        tasks = _tasks({name: shards[name] for name in missing}, report)
        encoded = mapped(
            partial(_encode, tokenizer), with_progress(tasks, "tokenizing", None, progress), workers
        )
        for name, some in groupby(encoded, key=itemgetter(0)):
            _write(store, name, some, tokenizer)
        done = _facts(store)
        if done.keys() >= shards.keys():
            facts = [done[name] for name in shards]
            content = json.dumps([one["files"] for one in facts]).encode()
            manifest |= {"sha256": hashlib.sha256(content).hexdigest(), "shards": facts}
            store.write(MANIFEST, manifest)
    return manifest, report


def _pieces(file: TextFile) -> list[TextFile]:
    """Return the pieces of a file, or the file if it is small or can't be cut."""
    size = file.path.stat().st_size
    if size <= SHARD_BYTES or file.path.suffix.lower() not in CUT:
        return [file]
    begins, ends = range(0, size, SHARD_BYTES), LineEnds()
    pieces = zip(begins, [*begins[1:], math.inf], strict=True)
    return [file._replace(piece=FileRange(first, last, ends)) for first, last in pieces]


def _begin(
    store: FileStore,
    source: SourceArgs,
    tokenizer: Tokenizer,
    shards: Mapping[str, Sequence[TextFile]],
) -> dict[str, Any]:
    """Return the manifest without shards, which is written if the folder has no manifest."""
    files = [[(file.id, file.size) for file in group] for group in shards.values()]
    manifest = {
        "format": FORMAT,
        "source": source.path,
        "files": len({id for group in files for id, _ in group}),
        "plan": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "tokenizer": tokenizer.hash,
        "dtype": token_dtype(tokenizer),
        "shards": None,
    }
    if names := {name for name in store.names() if not name.startswith(".")}:
        there = MANIFEST in names and read_manifest(store, tokenizer)["plan"] == manifest["plan"]
        expected = "a new or empty folder, or one with tokens of the same files"
        expect(there, "OUT", store.url, expected)
    else:
        store.write(MANIFEST, manifest)
    return manifest


def _facts(store: FileStore) -> dict[str, dict[str, Any]]:
    """Return the facts of the complete shards of a folder by name."""
    stems = [name.removesuffix(".json") for name in store.names()]
    return {name: json.loads(store.read(f"{name}.json")) for name in stems if name.isdecimal()}


def _tasks(shards: Mapping[str, Sequence[TextFile]], report: ReadReport) -> Iterator[Task]:
    for name, files in shards.items():
        yield name, ()  # a shard may have no documents
        yield from ((name, batch) for batch in batched(read_files(files, report)))


def _encode(tokenizer: Tokenizer, task: Task) -> Encoded:
    name, documents = task
    encoded = tokenizer.encode_batch([document.text for document in documents])
    dtype = token_dtype(tokenizer)
    return name, [
        (document.id, np.asarray(ids, dtype), len(document.text.encode()))
        for document, ids in zip(documents, encoded, strict=True)
    ]


def _write(store: FileStore, name: str, encoded: Iterable[Encoded], tokenizer: Tokenizer) -> None:
    """Write the files of a shard, and last its facts."""
    dtypes = {"tokens": token_dtype(tokenizer), **COLUMNS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with shard_writer(folder, name, dtypes) as append:
            for id, ids, size in chain.from_iterable(rows for _, rows in encoded):
                append(id, ids, bytes=size, draws=draw_of(id))
        columns = read_shard(folder, name, dtypes, ids=False)[0]
        tokens, sizes, unk = columns["tokens"], columns["bytes"], tokenizer.unk_id
        facts = {
            "name": name,
            "documents": len(sizes),
            "tokens": len(tokens),
            "bytes": int(sizes.sum()),
            "unknown_tokens": 0 if unk is None else int(np.count_nonzero(tokens == unk)),
            "highest_id": int(tokens.max(initial=0)),
            "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        }
        for path in folder.iterdir():
            store.put(path.name, path)
    store.write(f"{name}.json", facts)

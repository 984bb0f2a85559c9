"""Encoded examples in the cache folder: rendered and tokenized once by several processes, then
memory-mapped.

The key of an entry is the content of the examples, the tokenizer, the chat template and the
settings of the encoder. A second run and a resumed run therefore read what the first run wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from transom.base.errors import Problem, RequestError, collected_notices, expect, notice
from transom.data.cache import cache_entry, read_shard, shard_writer, with_progress
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import Examples
from transom.data.chat.rows import ChatEncoder, EncodedChats
from transom.data.chat.turns import EncodedChat
from transom.data.processes import mapped, usable_cores

FORMAT = 3  # increase it when the files or the rows change, so that older entries are not found
NAME = "rows"
COLUMNS = {"tokens": "int32", "weights": "float32", "labels": "int8"}
NO_LABEL = -1
CHUNK_EXAMPLES = 64
EXAMPLES_PER_PROCESS = 1000  # a process takes about as long to start as it takes to encode these
Chunk = tuple[EncodedChats, list[Problem], list[str]]  # with notices


def prepare_chats(
    parts: Sequence[Examples],
    encoder: ChatEncoder,
    cache_dir: str | Path | None = None,
    *,
    processes: int | None = None,
    progress: bool = False,
    problems: list[Problem] | None = None,
) -> EncodedChats:
    """Encode examples, or open the shards that an earlier call wrote.

    Args:
        parts: Examples of one kind. They are read again if they are not in the cache.
        encoder: The tokenizer, the chat template and the settings.
        cache_dir: The folder of all cache entries; None is `$TRANSOM_CACHE`, or `~/.cache/transom`.
        processes: How many processes encode; by default as many as the examples and cores allow.
        progress: Whether to show a progress bar on standard error.
        problems: Receives the examples that can't be encoded. If it is None, the first of them
            raises an error.

    Returns:
        The rows of all parts, memory-mapped.

    Raises:
        RequestError: An example can't be encoded.
        WorkError: The cache folder can't be written to, or the examples changed while they were
            read.
    """
    count = sum(map(len, parts))
    if not count:
        return EncodedChats([])
    if processes is None:
        processes = usable_processes(count)

    def make(folder: Path) -> dict[str, Any]:
        shown = with_progress(chain(*parts), "encoding", count, progress)
        chunks = encoded_chunks(encoder, shown, processes)
        return _write(folder, chunks, strict=problems is None)

    content = [examples.sha256 for examples in parts]
    entry = cache_entry(cache_dir, ["chat", FORMAT, content, *encoder.key], make)
    for message in entry.meta["notices"]:
        notice(message)
    _add_problems([Problem(*problem) for problem in entry.meta["problems"]], problems)
    items = ShardItems(entry.folder, entry.meta["rows_per_item"])
    return EncodedChats(items, Counter(entry.meta["counts"]))


def usable_processes(examples: int) -> int:
    """Return how many processes encode this number of examples fastest on this machine."""
    return max(1, min(usable_cores(), examples // EXAMPLES_PER_PROCESS))


def _add_problems(found: list[Problem], problems: list[Problem] | None) -> None:
    """Add problems to a list, or raise the first one if there is no list."""
    if problems is None and found:
        raise RequestError(f"{found[0].where}: {found[0].sentence}")
    if problems is not None:
        problems += found


# -- encoding --------------------------------------------------------------------------------------


def encoded_chunks(
    encoder: ChatEncoder, examples: Iterable[ChatExample], processes: int
) -> Iterator[Chunk]:
    """Yield the rows, the problems and the notices of each `CHUNK_EXAMPLES` examples, in order."""
    rest = iter(examples)
    chunks = iter(lambda: list(islice(rest, CHUNK_EXAMPLES)), [])
    return mapped(partial(_encode, encoder), chunks, processes)


def _encode(encoder: ChatEncoder, chunk: Sequence[ChatExample]) -> Chunk:
    problems: list[Problem] = []
    with collected_notices() as notices:
        encoded = encoder.encode(chunk, problems)
    return encoded, problems, notices


# -- files -----------------------------------------------------------------------------------------


def _write(folder: Path, chunks: Iterable[Chunk], *, strict: bool) -> dict[str, Any]:
    """Write all rows into a folder and return the metadata of the entry."""
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    notices: dict[str, None] = {}
    kinds: set[tuple[int, bool]] = set()
    with shard_writer(folder, NAME, COLUMNS) as append:
        for encoded, found, messages in chunks:
            _add_problems(found, None if strict else problems)
            notices |= dict.fromkeys(messages)
            counts += encoded.counts
            for item in encoded.items:
                kinds.add((len(item), item[0].label is None))
                for row in item:
                    label = NO_LABEL if row.label is None else row.label
                    append(row.id, row.ids, weights=row.weights, labels=label)
    expected = "pairs or labels for all, or for none"
    expect(len(kinds) < 2, "data.sources", "several kinds of rows", expected)
    return {
        "counts": counts,
        "rows_per_item": max(kinds, default=(1, True))[0],
        "problems": problems,
        "notices": list(notices),
    }


class ShardItems(Sequence[tuple[EncodedChat, ...]]):
    """The items of a shard. Their numbers are read from disk when they are used."""

    def __init__(self, folder: Path, rows_per_item: int) -> None:
        columns, self._ids = read_shard(folder, NAME, COLUMNS)
        # Plain arrays on top of the maps, whose slices are cheaper.
        self._tokens, self._weights, self._labels, self._offsets = map(np.asarray, columns.values())
        self._rows_per_item = rows_per_item

    def __len__(self) -> int:
        return len(self._ids) // self._rows_per_item

    def __getitem__(self, index: Any) -> Any:
        """Return the rows of item `index`, 0 or more."""
        if index >= len(self):
            raise IndexError(index)
        first = index * self._rows_per_item
        return tuple(self._row(row) for row in range(first, first + self._rows_per_item))

    def _row(self, row: int) -> EncodedChat:
        part = slice(self._offsets[row], self._offsets[row + 1])
        label = None if self._labels[row] == NO_LABEL else bool(self._labels[row])
        return EncodedChat(self._ids[row], self._tokens[part], self._weights[part], label=label)

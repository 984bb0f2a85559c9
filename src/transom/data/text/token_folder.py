"""Folders of tokens that `transom data tokenize` wrote: opened in place, or fetched from a store.

The manifest lists shards of documents, in the order of the source. A run that reads the folder has
the rows of a run that reads the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, expect
from transom.base.files import cache_dir as usual_cache_dir
from transom.base.files import json_object, sha256_of
from transom.base.locks import FolderLock
from transom.data.cache import cache_entry, read_shard
from transom.data.file_formats import readable
from transom.data.store import FileStore
from transom.data.text.shards import Corpus, TokenFile, prepare
from transom.data.text.sources import MANIFEST, ReadReport, SourceArgs, is_tokenized, require_whole
from transom.tokenizers.tokenizer import Tokenizer

FORMAT = 1  # increase it when the files change
COLUMNS = {"bytes": "int64", "draws": "uint64"}  # besides the tokens; see `draw_of`
AGAIN = "expected what `transom data tokenize` wrote; run it again"


def open_corpus(
    source: SourceArgs,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    *,
    held_out_fraction: float = 0.0,
    progress: bool = False,
) -> Corpus:
    """Open a folder of tokens, or `prepare` a source of text, with the same arguments.

    Shards of a URL are fetched into the cache folder, once for all processes of a machine. Shards
    of a path stay where they are. The hashes of a shard are checked when it is first opened.

    Raises:
        RequestError: A shard is missing or was changed, or another tokenizer made the tokens.
    """
    fraction = held_out_fraction
    if not is_tokenized(source.path):
        return prepare(source, tokenizer, cache_dir, held_out_fraction=fraction, progress=progress)
    require_whole(source, "a folder of tokens", ("include", "exclude"))
    store = FileStore(source.path)
    manifest = read_manifest(store, tokenizer)
    shards = manifest["shards"]
    expected = "all parts: run `transom data tokenize` for those that are missing"
    expect(shards is not None, source.path, "tokens of some parts", expected)
    dtypes = {"tokens": manifest["dtype"], **COLUMNS}
    columns, files = [], []
    # One wait of the ranks of a machine for the first of them, instead of one for each shard.
    with FolderLock(Path(cache_dir or usual_cache_dir(), manifest["sha256"]), wait=True):
        for shard in shards:
            folder = _folder(store, shard, cache_dir)
            columns.append(read_shard(folder, shard["name"], dtypes, ids=False)[0])
            files.append(folder / f"{shard['name']}.ids.json")
    highest = max(shard["highest_id"] for shard in shards)
    tokens = JoinedTokens([one["tokens"] for one in columns], highest)
    sizes, draws = (np.concatenate([one[name] for one in columns]) for name in COLUMNS)
    lengths = np.concatenate([np.diff(one["offsets"]) for one in columns])
    held = draws < np.uint64(math.ceil(fraction * 2**64))
    expected = f"a fraction that leaves some of the {len(held)} documents to train on"
    expect(not held.all(), "held_out_fraction", fraction, expected)
    places = np.cumsum(lengths) - lengths
    parts = []
    for chosen in (~held, held):
        ids = _Ids(files, np.flatnonzero(chosen))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[chosen])])
        parts.append(TokenFile(tokens, offsets, sizes[chosen], ids, places[chosen]))
    report = ReadReport(files=manifest["files"], documents=len(held))
    unknown = sum(shard["unknown_tokens"] for shard in shards)
    return Corpus(parts[0], parts[1], report, unknown, manifest["sha256"], Path(source.path))


def read_manifest(store: FileStore, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the manifest of a folder. Its shards are None while parts are missing.

    Raises:
        RequestError: There is none, or another tokenizer made the tokens.
    """
    manifest, own = json_object(store.read(MANIFEST), Path(MANIFEST)), tokenizer.hash
    found = {name: manifest.get(name) for name in ("format", "tokenizer")}
    expected = f"format {FORMAT} and this tokenizer, with hash {own}"
    expect(found == {"format": FORMAT, "tokenizer": own}, store.url, found, expected)
    return manifest


def _folder(store: FileStore, shard: Mapping[str, Any], cache_dir: str | Path | None) -> Path:
    """Return where the files of a shard are on this machine. An entry of the cache has those of a
    URL, or says that those of a path were checked.
    """
    states, files = [], shard["files"]
    for path in (store.local.absolute() / name for name in files) if store.local else ():
        with readable(path):
            states.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])

    def make(folder: Path) -> dict[str, Any]:
        for name, sha256 in files.items():
            if store.local is None:
                store.fetch(name, folder / name)
            if sha256_of((store.local or folder) / name) != sha256:
                raise RequestError(f"{store.url}/{name}: got other content; {AGAIN}")
        return {}

    entry = cache_entry(cache_dir, ["tokens", FORMAT, files, states], make)
    return store.local or entry.folder


class JoinedTokens:
    """The tokens of several shards, as if they were one array. A document is in one shard."""

    def __init__(self, arrays: Sequence[NDArray[Any]], highest: int) -> None:
        self._arrays, self._highest = arrays, highest
        self._ends = np.cumsum([len(one) for one in arrays])

    def __getitem__(self, part: slice) -> NDArray[Any]:
        # An empty document may be at the very end.
        at = min(int(np.searchsorted(self._ends, part.start, side="right")), len(self._ends) - 1)
        first = self._ends[at] - len(self._arrays[at])
        return self._arrays[at][part.start - first : part.stop - first]

    def max(self, initial: int) -> int:
        """Return the highest id, as the manifest has it."""
        return max(initial, self._highest)


class _Ids(Sequence[str]):
    """Ids of documents, which are read on first use: there may be many, and few verbs need them."""

    def __init__(self, files: Sequence[Path], chosen: NDArray[np.int64]) -> None:
        self._files, self._chosen = files, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    @cached_property
    def _all(self) -> list[str]:
        ids = list(chain.from_iterable(json.loads(file.read_text()) for file in self._files))
        return [ids[at] for at in self._chosen]

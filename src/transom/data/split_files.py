"""The splits of a folder, by the same file names as in the `datasets` library."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from transom.base.errors import expect, notice, short_repr
from transom.data.file_formats import ROW_NAMES, row_format, stem_of
from transom.planning.tables import counted

# Words for each split in names of files and folders, as in datasets/data_files.py.
SPLITS = {
    "train": ("train", "training"),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {
    split: re.compile(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:[-._ 0-9/]|$)")
    for split, words in SPLITS.items()
}
_SHARD = re.compile(r"^(.*?)-?(\d+)-of-(\d+)$")
# Files beside the rows of a data set, which describe it.
_DESCRIPTIONS = re.compile(
    r"(readme|licen[sc]e|citation)\b.*|(config|dataset_info|dataset_infos|dataset_dict|state)\.json"
)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every split in a folder and its subfolders.

    The split is the word of `SPLITS` in the name of a file or of a folder that contains it. If no
    name has such a word, all files of rows are `train`, as in `datasets`. A notice names the files
    that are not read.

    Raises:
        RequestError: There is no file of rows, a shard is missing, a split has two files of one
            name, or a name has the words of two splits.
    """
    files = list(_files_below(folder))
    rows = [path for path in files if row_format(path)]
    expect(bool(rows), f"{folder}: files of rows", [], f"train.jsonl (or {ROW_NAMES})")
    found: dict[str, list[Path]] = {}
    for path in rows:
        name = (path.relative_to(folder).parent / stem_of(path)).as_posix().lower()
        splits = [split for split, pattern in _WORDS.items() if pattern.search(name)]
        expected = f"a name with the word of one split, not of {' and '.join(splits)}"
        expect(len(splits) < 2, "data", str(path), expected)
        for split in splits:
            found.setdefault(split, []).append(path)
    found = found or {"train": rows}
    used = {path for paths in found.values() for path in paths}
    ignored = [str(path.relative_to(folder)) for path in files if path not in used]
    if ignored:
        what = f"{counted(len(ignored), 'file')} not read because of the name or format"
        notice(f"{folder}: {what}: {short_repr(ignored)}")
    for split, paths in found.items():
        names = Counter(stem_of(path).lower() for path in paths)
        twice = sorted(name for name, count in names.items() if count > 1)
        expected = "each file once, in one format and compressed or not"
        expect(not twice, f"{folder}: files of the split {split}", twice, expected)
        _check_shards(paths)
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield files in the order of their names, without hidden ones, `__NAME` and descriptions."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir():
            yield from _files_below(path)
        elif not _DESCRIPTIONS.fullmatch(path.name.lower()):
            yield path


def _check_shards(files: Iterable[Path]) -> None:
    """Raise `RequestError` unless the shards (`NAME-00000-of-00002`) of each name are one set."""
    sets: dict[str, set[tuple[int, int]]] = {}
    for path in files:
        if shard := _SHARD.match(stem_of(path)):
            shards = sets.setdefault(f"{path.parent}: shards of {shard[1]}", set())
            shards.add((int(shard[2]), int(shard[3])))
    for where, shards in sets.items():
        size = max(size for _, size in shards)
        first = min(1, *(number for number, _ in shards))
        wrong = sorted({(number, size) for number in range(first, first + size)} ^ shards)
        expected = f"all {size} shards of one set"
        shown = [f"{number}-of-{of}" for number, of in wrong]
        expect(not wrong, where, f"missing or extra: {', '.join(shown)}", expected)

"""The splits of a folder, by the same file names as in the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transom.base.errors import RequestError, require
from transom.data.file_formats import ROW_NAMES, row_format, stem_of, suffix_of

# Words for each split in names of files and folders, as in datasets/data_files.py.
SPLITS = {
    "train": ("train", "training"),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)")
    for split, words in SPLITS.items()
}
_SHARD = re.compile(r"^(.*?)-?(\d+)-of-(\d+)$")
# Files beside the rows of a data set, which describe it.
_DESCRIPTIONS = re.compile(
    r"(readme|licen[sc]e|citation)\b.*|(config|dataset_info|dataset_infos|dataset_dict|state)\.json"
)
_NAMED = 8  # names that a notice lists


@dataclass
class SplitFiles:
    """The files of a folder.

    Attributes:
        files: The files of each split, sorted by name.
        ignored: The names of files that are not read.
    """

    files: dict[str, list[Path]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def notice(self) -> str:
        """Return one line with the number of files that are not read and the names of some."""
        shown = ", ".join(self.ignored[:_NAMED]) + (", ..." if len(self.ignored) > _NAMED else "")
        count = len(self.ignored)
        return f"{count} files or folders are not read because of their names or formats: {shown}"


def split_files(folder: Path) -> SplitFiles:
    """Return the files of every split in a folder, or in its `data` if it has none itself.

    The split is the word of `SPLITS` in the name of a file or of its folder. If no name has such a
    word, all files of rows are `train`, as in `datasets`.

    Raises:
        RequestError: A shard is missing, a split has files of two formats or a file twice, or a
            name has the words of two splits.
    """
    found = _split(folder)
    if not found.files and (folder / "data").is_dir():
        ignored = [name for name in found.ignored if name != "data/"]
        found = _split(folder / "data")
        found.ignored += ignored
    rows = [] if found.files else _rows_in(folder) or _rows_in(folder / "data")
    if rows:
        names = {path.name for path in rows}
        found.files["train"] = rows
        found.ignored = [name for name in found.ignored if name not in names]
    for split, files in found.files.items():
        suffixes = sorted({suffix_of(path) for path in files})
        where = f"{folder}: files of the split {split}"
        require(len(suffixes) < 2, where, suffixes, "expected one format")
        _check_shards(files)
        _check_copies(folder, files)
    return found


def no_training_rows(folder: Path, found: SplitFiles) -> RequestError:
    """Return the error for a folder without a file of the split `train`."""
    more = f"; {found.notice()}" if found.ignored else ""
    expected = f"expected a folder with train.jsonl (or {ROW_NAMES})"
    return RequestError(f"{folder}: no training rows; {expected}{more}")


def _split(folder: Path) -> SplitFiles:
    """Return the entries of one folder by split. Entries without a split are ignored."""
    out = SplitFiles()
    for path in _entries(folder):
        split = _split_of(path)
        inside = list(_below(path)) if path.is_dir() else [path]
        rows = [file for file in inside if row_format(file)]
        if split and rows:
            out.files.setdefault(split, []).extend(rows)
            others = (file for file in inside if not row_format(file))
            out.ignored += [str(file.relative_to(folder)) for file in others]
        else:
            out.ignored.append(path.name + "/" * path.is_dir())
    return out


def _split_of(path: Path) -> str | None:
    stem = (path.name if path.is_dir() else stem_of(path)).lower()
    found = [split for split, pattern in _WORDS.items() if pattern.search(stem)]
    fits = len(found) < 2 or path.is_dir() or row_format(path) is None
    expected = f"expected a name with the word of one split, not of {' and '.join(found)}"
    require(fits, "data", str(path), expected)
    return found[0] if len(found) == 1 else None


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, except hidden ones, `__NAME`, and files about the data."""
    return [
        path
        for path in sorted(folder.glob("*"))
        if not path.name.startswith((".", "__"))
        and not (path.is_file() and _DESCRIPTIONS.fullmatch(path.name.lower()))
    ]


def _below(folder: Path) -> Iterator[Path]:
    for path in _entries(folder):
        yield from _below(path) if path.is_dir() else (path,)


def _rows_in(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_file() and row_format(path)]


def _check_copies(folder: Path, files: Sequence[Path]) -> None:
    """Raise `RequestError` for a file and its compressed copy, whose rows would be read twice."""
    names = [(path.parent, stem_of(path).lower()) for path in files]
    twice = [path.name for path, name in zip(files, names, strict=True) if names.count(name) > 1]
    expected = "expected each file once, compressed or not"
    require(not twice, f"{folder}: files of one name", twice, expected)


def _check_shards(files: Iterable[Path]) -> None:
    """Raise `RequestError` if a shard (`NAME-00000-of-00002`) is missing, or for two sets."""
    sets: dict[str, dict[int, set[int]]] = {}
    for path in files:
        if shard := _SHARD.match(stem_of(path)):
            sizes = sets.setdefault(f"{path.parent}: shards of {shard[1]}", {})
            sizes.setdefault(int(shard[3]), set()).add(int(shard[2]))
    for where, sizes in sets.items():
        shown = [f"-of-{size}" for size in sizes]
        require(len(sizes) == 1, where, shown, "expected one set of shards")
        ((size, numbers),) = sizes.items()
        first = 0 if 0 in numbers else 1
        wanted = set(range(first, first + size))
        missing, extra = sorted(wanted - numbers), sorted(numbers - wanted)
        wrong = f"without {missing}" if missing else f"with {extra}"
        require(not missing and not extra, where, wrong, f"expected all {size} shards")

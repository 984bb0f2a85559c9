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
    if not found.files:
        root = folder if _rows_in(folder) else folder / "data"
        rows = _rows_in(root)
        if rows:
            names = {path.name for path in rows}
            found = SplitFiles(
                {"train": rows}, [name for name in found.ignored if name not in names]
            )
    for split, files in found.files.items():
        suffixes = sorted({suffix_of(path) for path in files})
        expected = "expected one format"
        require(len(suffixes) < 2, f"{folder}: files of the split {split}", suffixes, expected)
        _check_shards(folder, files)
        _check_copies(folder, files)
    return found


def no_training_rows(folder: Path, found: SplitFiles) -> RequestError:
    """Return the error for a folder without a file of the split `train`."""
    more = f"; {found.notice()}" if found.ignored else ""
    return RequestError(
        f"{folder}: no training rows; expected a folder with train.jsonl (or {ROW_NAMES}){more}"
    )


def _split(folder: Path) -> SplitFiles:
    """Return the entries of one folder by split. Entries without a split are ignored."""
    out = SplitFiles()
    for path in _entries(folder):
        split = _split_of(path)
        if path.is_dir():
            rows = [file for file in _below(path) if row_format(file)] if split else []
            others = [file for file in _below(path) if not row_format(file)] if rows else []
            out.ignored += [
                str(file.relative_to(folder)) for file in others if not _describes(file)
            ]
        else:
            rows = [path] if split and row_format(path) else []
        if split and rows:
            out.files.setdefault(split, []).extend(rows)
        elif not _describes(path):
            out.ignored.append(path.name + "/" * path.is_dir())
    return out


def _split_of(path: Path) -> str | None:
    stem = (path.name if path.is_dir() else stem_of(path)).lower()
    found = [split for split, pattern in _WORDS.items() if pattern.search(stem)]
    expected = (
        f"expected a name with the word of one split, this one has those of {' and '.join(found)}"
    )
    require(
        len(found) < 2 or path.is_dir() or row_format(path) is None, "data", str(path), expected
    )
    return found[0] if len(found) == 1 else None


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, except hidden ones and those whose names begin with `__`."""
    return [path for path in sorted(folder.glob("*")) if not path.name.startswith((".", "__"))]


def _below(folder: Path) -> Iterator[Path]:
    for path in _entries(folder):
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _rows_in(folder: Path) -> list[Path]:
    return [
        path
        for path in _entries(folder)
        if path.is_file() and row_format(path) and not _describes(path)
    ]


def _describes(path: Path) -> bool:
    return path.is_file() and _DESCRIPTIONS.fullmatch(path.name.lower()) is not None


def _check_copies(folder: Path, files: Sequence[Path]) -> None:
    """Raise `RequestError` for a file and its compressed copy, whose rows would be read twice."""
    names = [(path.parent, stem_of(path).lower()) for path in files]
    twice = [path.name for path, name in zip(files, names, strict=True) if names.count(name) > 1]
    require(
        not twice,
        f"{folder}: files of one name",
        twice,
        "expected each file once, compressed or not",
    )


def _check_shards(folder: Path, files: Iterable[Path]) -> None:
    """Raise `RequestError` if a shard (`NAME-00000-of-00002`) is missing, or for two sets."""
    sets: dict[tuple[Path, str], dict[int, set[int]]] = {}
    for path in files:
        if shard := _SHARD.match(stem_of(path)):
            sizes = sets.setdefault((path.parent, shard[1]), {})
            sizes.setdefault(int(shard[3]), set()).add(int(shard[2]))
    for (parent, name), sizes in sets.items():
        expected = "expected one set of shards"
        require(
            len(sizes) == 1,
            f"{parent}: shards of {name}",
            [f"-of-{size}" for size in sizes],
            expected,
        )
        ((size, numbers),) = sizes.items()
        first = 0 if 0 in numbers else 1
        missing = sorted(set(range(first, first + size)) - numbers)
        extra = sorted(numbers - set(range(first, first + size)))
        wrong = f"without {missing}" if missing else f"with {extra}"
        expected = f"expected all {size} files of {name}-...-of-{size}"
        require(not missing and not extra, f"{parent}: shards of {name}", wrong, expected)

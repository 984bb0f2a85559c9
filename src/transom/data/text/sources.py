"""Documents of a file, a folder or a glob: plain text, or rows of JSON and Parquet, with every skip
counted.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from transom.base.errors import RequestError, require
from transom.base.fields import describe
from transom.data.file_formats import open_bytes, readable, row_format
from transom.data.row_files import RowCounts, read_rows

TEXT_KEY = "text"  # of a row of JSON, and the column of a Parquet file
ACCEPTED = "expected UTF-8 text, .jsonl, .json or .parquet"
BINARY_PROBE_BYTES = 8192
HEAD, TAIL = "#head", "#tail"  # of the id of a single document cut in two


@dataclass(frozen=True)
class SourceArgs:
    """One place that documents come from, and its share when there are several."""

    path: str = describe(
        MISSING,
        "file, folder (read to the bottom) or glob of .txt, .jsonl, .json, .parquet, code, ..., "
        "also compressed",
        path=True,
    )
    weight: float = describe(
        1.0, "share of the rows drawn from this source, relative to the other weights"
    )
    name: str = describe("", "name in reports; the path when empty")
    include: tuple[str, ...] = describe(
        (), "read only what matches one of these: names or globs of files, folders"
    )
    exclude: tuple[str, ...] = describe(
        (), "leave out what matches one of these: names or globs of files, folders"
    )

    @property
    def label(self) -> str:
        """The name in reports."""
        return self.name or self.path

    def __post_init__(self) -> None:
        require(bool(self.path), "path", self.path, "expected a file, a folder or a glob")
        usable = self.weight > 0 and math.isfinite(self.weight)
        require(usable, "weight", self.weight, "expected a number above 0")


class Document(NamedTuple):
    """One text; `id` is its path below the source, with `:row` (from 1) where a file holds many."""

    id: str
    text: str


@dataclass
class ReadReport:
    """What was found and what was left out; counts are of files unless a comment names another
    unit.
    """

    files: int = 0
    documents: int = 0  # documents yielded
    empty: int = 0  # documents without a character
    skipped_binary: int = 0
    skipped_encoding: int = 0  # not UTF-8
    skipped_hidden: int = 0  # files and whole folders whose name begins with a dot
    skipped_links: int = 0  # links to folders, broken links, sockets and devices
    skipped_own: int = 0  # folders that Transom wrote: runs, and caches of tokens
    excluded: int = 0  # by `include` and `exclude`
    unread: set[str] = field(default_factory=set)  # names of columns of rows beside the text
    json_without_rows: int = 0  # .json files without rows of text, which are read as plain text

    def counts(self) -> list[str]:
        """Return counts and words for everything that was left out or read in an unexpected way."""
        out = [
            f"{count} {words}" for name, words in _COUNTED.items() if (count := getattr(self, name))
        ]
        names = sorted(self.unread)
        more = ", ..." if len(names) > _NAMED else ""
        return [*out, f"columns not read: {', '.join(names[:_NAMED])}{more}"] if names else out


_NAMED = 8  # columns that a line lists
_COUNTED = {
    "empty": "empty documents left out",
    "skipped_binary": "binary files left out",
    "skipped_encoding": "files left out that are not UTF-8",
    "skipped_hidden": "hidden files or folders left out",
    "skipped_links": "links to folders and special files left out",
    "skipped_own": "folders of runs or of cached tokens left out",
    "excluded": "files left out by include and exclude",
    "json_without_rows": ".json files without rows read as plain text",
}


def require_whole(source: SourceArgs, reader: str) -> None:
    """Refuse the fields of a source that only the reader of documents knows."""
    for name, unset in (("weight", 1.0), ("include", ()), ("exclude", ())):
        value = getattr(source, name)
        require(
            value == unset,
            f"data.sources {name}",
            value,
            f"valid only for {reader} is {unset or 'none'}",
        )


def read_documents(source: SourceArgs, report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of `source` in order of their path; a source without any text is a `RequestError`.

    Inside a folder or a glob, files that are not text are skipped and counted in `report`; a file
    named by itself must be text.
    """
    report = ReadReport() if report is None else report
    files = _list_files(source, report)
    report.files = len(files)
    return _read_all(source, files, report)


def read_split(
    source: SourceArgs, fraction: float, report: ReadReport | None = None
) -> Iterator[Document]:
    """`read_documents`, with a source of one document cut in two so that `held_out` has something
    to choose.

    The tail, `fraction` of the characters from a line's beginning on, is held out.
    """
    documents = read_documents(source, report)
    first, second = next(documents), next(documents, None)
    cut = first.text.rfind("\n", 0, int(len(first.text) * (1 - fraction))) + 1
    if second is not None or fraction == 0 or cut == 0:
        yield from (document for document in (first, second) if document is not None)
        yield from documents
        return
    yield Document(first.id + HEAD, first.text[:cut])
    yield Document(first.id + TAIL, first.text[cut:])


def held_out(document_id: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: a pure function of its id."""
    if document_id.endswith((HEAD, TAIL)):
        return document_id.endswith(TAIL)
    digest = hashlib.sha256(f"held out: {document_id}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


class _File(NamedTuple):
    path: Path
    id: str
    named: bool  # given by its own path: what is wrong with it is an error, not a skip


def _read_all(source: SourceArgs, files: Sequence[_File], report: ReadReport) -> Iterator[Document]:
    for file in files:
        try:
            for document in _read_file(file, report):
                if document.text:
                    report.documents += 1
                    yield document
                else:
                    report.empty += 1
        except OSError as error:
            raise RequestError(
                f"{file.path}: cannot be read ({error.strerror or error})"
            ) from error
    if not report.documents:
        raise RequestError(
            f"path: got {source.path!r}; no text in it, expected text (found {_summary(report)})"
        )


def _summary(report: ReadReport) -> str:
    return ", ".join([f"{report.files} files", *report.counts()] if report.files else ["no files"])


# -- which files
# -------------------------------------------------------------------------------------


def _list_files(source: SourceArgs, report: ReadReport) -> list[_File]:
    """Files of a source sorted by id, after hidden, linked and excluded ones are counted out."""
    path = Path(source.path).expanduser()
    if path.is_file():
        found = [_File(path, path.name, named=True)]
    elif path.is_dir():
        found = list(_walk(path, report))
    elif glob.has_magic(source.path):
        found = list(_match(str(path), report))
    else:
        raise RequestError(
            f"path: got {source.path!r}; not found, expected a file, a folder or a glob"
        )
    kept = [file for file in found if _selected(file.id, source)]
    report.excluded = len(found) - len(kept)
    return sorted(kept, key=lambda file: file.id)


def _walk(root: Path, report: ReadReport) -> Iterator[_File]:
    def refuse(
        error: OSError,
    ) -> None:  # os.walk would leave an unreadable folder out without a word
        raise RequestError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        here = Path(folder)
        for name in [name for name in subfolders if name.startswith(".")]:
            report.skipped_hidden += 1
            subfolders.remove(name)
        report.skipped_links += sum(
            (here / name).is_symlink() for name in subfolders
        )  # os.walk stays out
        for name in [name for name in subfolders if is_own_folder(here / name)]:
            report.skipped_own += 1
            subfolders.remove(name)
        for name in names:
            path = here / name
            if name.startswith("."):
                report.skipped_hidden += 1
            elif not path.is_file():
                report.skipped_links += 1
            else:
                yield _File(path, path.relative_to(root).as_posix(), named=False)


def is_own_folder(folder: Path) -> bool:
    """Return whether a folder is a run, whose files change while it trains, or a cache of
    tokens.
    """
    return any(all((folder / name).is_file() for name in names) for names in _OWN_FOLDERS)


_OWN_FOLDERS = (("config.yaml", "run.json"), ("meta.json", "train.tokens"))


def _match(pattern: str, report: ReadReport) -> Iterator[_File]:
    """Files that a glob matches; like the shell's, it passes over hidden ones unless it spells the
    dot.

    Folders are passed over too: `**` matches every one of them.
    """
    parts = Path(pattern).parts
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    # Not Path.glob, whose * matches hidden files. A set, as two ** in one pattern match a file
    # twice.
    own: dict[Path, bool] = {}
    for name in set(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        path = Path(name)
        if not path.is_file():
            continue
        inside = [
            folder for folder in path.parents if folder.is_relative_to(root) and folder != root
        ]
        own.update({folder: is_own_folder(folder) for folder in inside if folder not in own})
        if not any(own[folder] for folder in inside):
            yield _File(path, path.relative_to(root).as_posix(), named=False)
    report.skipped_own += sum(own.values())


def _selected(id: str, source: SourceArgs) -> bool:
    """Whether the relative path, or any name in it, passes `include` and `exclude`."""
    names = [id, *id.split("/")]
    included = any(fnmatchcase(name, pattern) for name in names for pattern in source.include)
    excluded = any(fnmatchcase(name, pattern) for name in names for pattern in source.exclude)
    return (included or not source.include) and not excluded


# -- what is in them
# ---------------------------------------------------------------------------------


def _read_file(file: _File, report: ReadReport) -> Iterator[Document]:
    format = row_format(file.path)
    if format is not None and (format != "json" or file.named or _has_text_rows(file.path)):
        return _read_text_rows(file, report)
    report.json_without_rows += format == "json"
    return _read_text(file, report)


def _has_text_rows(path: Path) -> bool:
    """Return whether a .json file begins with a row of text; folders of code hold many that are no
    data.
    """
    try:
        first = next(read_rows(path, counts=RowCounts()), None)
    except RequestError:
        return False
    return first is not None and isinstance(first.given.get(TEXT_KEY), str)


def _read_text(file: _File, report: ReadReport) -> Iterator[Document]:
    with readable(file.path), open_bytes(file.path) as stream:
        content = stream.read(BINARY_PROBE_BYTES)
        binary = b"\0" in content
        content += b"" if binary else stream.read()
    if binary:
        if file.named:
            raise RequestError(f"{file.path}: a binary file, {ACCEPTED}")
        report.skipped_binary += 1
        return
    try:
        text = content.decode("utf-8-sig")  # read_text would turn \r\n into \n
    except UnicodeDecodeError as error:
        if file.named:
            raise RequestError(
                f"{file.path}: not UTF-8 at byte {error.start}, {ACCEPTED}"
            ) from error
        report.skipped_encoding += 1
        return
    yield Document(file.id, text)


def _read_text_rows(file: _File, report: ReadReport) -> Iterator[Document]:
    """Yield the text of every row; one without text is a `RequestError`, a null one counts as
    empty.
    """
    counts = RowCounts(unread=report.unread)
    for row in read_rows(file.path, text_column=TEXT_KEY, counts=counts):
        if row.columns is None:
            raise RequestError(f"{row.where}: {row.problem}")
        text = row.columns.get(TEXT_KEY)
        if TEXT_KEY not in row.columns or not isinstance(text, str | None):
            shown = (
                ", ".join(row.columns)
                if TEXT_KEY not in row.columns
                else f"{TEXT_KEY} = {str(text)[:40]!r}"
            )
            raise RequestError(
                f'{row.where}: {shown}: expected a JSON object with a string "{TEXT_KEY}"'
            )
        report.unread |= row.columns.keys() - {TEXT_KEY}
        yield Document(f"{file.id}:{row.id.rpartition(':')[2]}", text or "")
    report.empty += counts.blank

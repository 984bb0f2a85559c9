"""Documents of a file, a folder or a glob: plain text, or rows of JSON and Parquet.

Every file and document that is left out is counted.
"""

from __future__ import annotations

import glob
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from transom.base.errors import RequestError, expect, located, short_repr
from transom.base.fields import check_bounds, describe
from transom.data.file_formats import open_bytes, readable, row_format
from transom.data.row_files import WHOLE_FILE, FileRange, read_rows
from transom.planning.tables import counted, counted_words

TEXT_KEY = "text"  # of a row of JSON, and the column of a Parquet file
EXPECTED = "UTF-8 text, .jsonl, .json or .parquet"
BINARY_PROBE_BYTES = 8192
HEAD, TAIL = "#head", "#tail"  # of the id of a single document that is cut in two
MANIFEST = "tokenized.json"  # of a folder of tokens that `transom data tokenize` wrote
# Files that tell a run, which changes while it trains, an entry of the cache, or tokens.
OWN_FOLDERS = (
    ("config.yaml", "run.json"),
    ("meta.json", "train.tokens"),
    ("meta.json", "rows.tokens"),
    (MANIFEST,),
)
OWN = "folders of runs or of cached tokens left out"
PATTERNS = "names or globs of files, folders"


@dataclass(frozen=True)
class SourceArgs:
    """One place that documents come from."""

    path: str = describe(
        MISSING,
        "file, folder (with its subfolders) or glob of .txt, .jsonl, .json, .parquet, code, ..., "
        "also compressed",
        path=True,
    )
    weight: float | tuple[tuple[int, float], ...] = describe(
        1.0,
        "share of the rows drawn from this source, relative to the other weights; "
        "[[0, 0.8], [1000, 0.2]]: 0.8 from step 0, 0.2 from step 1000",
    )
    name: str = describe("", "name in reports; the path when empty")
    include: tuple[str, ...] = describe((), f"read only what matches one of these: {PATTERNS}")
    exclude: tuple[str, ...] = describe((), f"leave out what matches one of these: {PATTERNS}")

    @property
    def label(self) -> str:
        """Return the name in reports."""
        return self.name or self.path

    def __post_init__(self) -> None:
        check_bounds(self)
        expect(bool(self.path), "path", self.path, "a file, a folder or a glob")
        plan = self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)
        steps = [step for step, _ in plan]
        fits = steps == sorted({0, *steps}) and all(0 <= one < math.inf for _, one in plan)
        expected = "a finite number of more than 0, or a list of [step, weight] from step 0"
        expect(fits and self.weight != 0, "weight", self.weight, expected)


class Document(NamedTuple):
    """One text.

    Attributes:
        id: Its path below the source, and `:ROW` (from 1) in a file of rows.
        text: Its text.
    """

    id: str
    text: str


@dataclass
class ReadReport:
    """Counts of what was found in a source.

    Attributes:
        files: Files to read.
        documents: Documents that have text.
        notes: How often each phrase applies, such as "binary files left out".
        unread: Names of columns besides the text.
    """

    files: int = 0
    documents: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    unread: set[str] = field(default_factory=set)

    def counts(self) -> list[str]:
        """Return a phrase for everything that was left out or read in an unexpected way."""
        out = [counted_words(count, what) for what, count in sorted(self.notes.items()) if count]
        return (
            [*out, f"columns not read: {short_repr(sorted(self.unread))}"] if self.unread else out
        )


def require_whole(
    source: SourceArgs, reader: str, names: Sequence[str] = ("weight", "include", "exclude")
) -> None:
    """Raise `RequestError` for the fields of a source that its reader does not know."""
    for name in names:
        value = getattr(source, name)
        expect(
            value == (1.0 if name == "weight" else ()),
            f"data.sources {name}",
            value,
            f"no {name} for {reader}",
        )


def read_documents(source: SourceArgs, report: ReadReport | None = None) -> Iterator[Document]:
    """Return the documents of a source in the order of their paths.

    Files in a folder or a glob that are not text are counted in `report` and left out. A file that
    is given by its own path must be text.

    Raises:
        RequestError: The source is missing, can't be read, or has no text.
    """
    report = ReadReport() if report is None else report
    files = list_files(source, report)
    return _read_all(source, files, report)


def read_split(
    source: SourceArgs, fraction: float, report: ReadReport | None = None
) -> Iterator[Document]:
    """Yield the documents of a source; a single document is cut in two, so that one is held out.

    The second part is about `fraction` of the characters and starts at the beginning of a line.
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
    """Return whether a document is held out, which depends on nothing but its id."""
    if document_id.endswith((HEAD, TAIL)):
        return document_id.endswith(TAIL)
    return draw_of(document_id) < fraction * 2**64


def draw_of(document_id: str) -> int:
    """Return a number below 2**64 by the hash of an id. The smallest ones are held out."""
    digest = hashlib.sha256(f"held out: {document_id}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8])


class TextFile(NamedTuple):
    """One file of a source.

    Attributes:
        path: The file.
        id: Its path below the source.
        named: Whether the source is this file, so that a fault is an error.
        piece: Which of its rows are read.
    """

    path: Path
    id: str
    named: bool = False
    piece: FileRange = WHOLE_FILE

    @property
    def size(self) -> int:
        """Return the bytes of the piece."""
        return int(min(self.piece.last, self.path.stat().st_size)) - self.piece.first


def read_files(files: Sequence[TextFile], report: ReadReport) -> Iterator[Document]:
    """Yield the documents of files that have text, and count them and the others in `report`."""
    for file in files:
        with readable(file.path):
            for document in _read_file(file, report):
                if document.text:
                    report.documents += 1
                    yield document
                else:
                    report.notes["empty documents left out"] += 1


def _read_all(
    source: SourceArgs, files: Sequence[TextFile], report: ReadReport
) -> Iterator[Document]:
    yield from read_files(files, report)
    if not report.documents:
        found = [counted(report.files, "file"), *report.counts()] if report.files else ["no files"]
        raise RequestError(f"path: got {source.path!r}; expected text (found {', '.join(found)})")


# -- which files -----------------------------------------------------------------------------------


def is_tokenized(path: str) -> bool:
    """Return whether a source is a folder of tokens: a URL, or a folder with a manifest."""
    return "://" in path or (Path(path).expanduser() / MANIFEST).is_file()


def list_files(source: SourceArgs, report: ReadReport) -> list[TextFile]:
    """Return the files of a source in the order of their ids, without those that are excluded.

    Raises:
        RequestError: The source is missing, can't be read, or has tokens.
    """
    path = Path(source.path).expanduser()
    expected = "text; tokens are only read with the tokenizer that made them"
    expect(not is_tokenized(source.path), "path", source.path, expected)
    if path.is_file():
        found = [TextFile(path, path.name, named=True)]
    elif path.is_dir():
        found = list(_walk(path, path, report))
    else:
        expected = "a file, a folder or a glob that exists"
        expect(glob.has_magic(source.path), "path", source.path, expected)
        found = list(_match(str(path), report))
    kept = [file for file in found if _selected(file.id, source)]
    report.notes["files left out by include and exclude"] = len(found) - len(kept)
    report.files = len(kept)
    return sorted(kept, key=lambda file: file.id)


def _walk(folder: Path, root: Path, report: ReadReport) -> Iterator[TextFile]:
    """Yield the files below a folder, with ids below `root`."""
    with readable(folder):
        paths = list(folder.iterdir())
    for path in paths:
        if path.name.startswith("."):
            report.notes["hidden paths left out"] += 1
        elif path.is_file():
            yield TextFile(path, path.relative_to(root).as_posix())
        elif path.is_symlink() or not path.is_dir():
            report.notes["paths left out (links to folders, special files)"] += 1
        elif is_own_folder(path):
            report.notes[OWN] += 1
        else:
            yield from _walk(path, root, report)


def is_own_folder(folder: Path) -> bool:
    """Return whether Transom wrote a folder: a run, or an entry of the cache."""
    return any(all((folder / name).is_file() for name in names) for names in OWN_FOLDERS)


def _match(pattern: str, report: ReadReport) -> Iterator[TextFile]:
    """Yield the files that a glob matches. As in a shell, hidden files need a dot in the glob."""
    parts = Path(pattern).parts
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    # Path.glob would match hidden files, and two `**` match a file twice.
    matches = map(Path, set(glob.glob(pattern, recursive=True)))  # noqa: PTH207
    paths = [path for path in matches if path.is_file()]
    below = {folder for path in paths for folder in path.parents if root in folder.parents}
    own = {folder for folder in below if is_own_folder(folder)}
    report.notes[OWN] += len(own)
    for path in paths:
        if own.isdisjoint(path.parents):
            yield TextFile(path, path.relative_to(root).as_posix())


def _selected(id: str, source: SourceArgs) -> bool:
    """Return whether a relative path passes `include` and `exclude`, which may match any part."""
    names = [id, *id.split("/")]
    included, excluded = (
        any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
        for patterns in (source.include, source.exclude)
    )
    return (included or not source.include) and not excluded


# -- what is in them -------------------------------------------------------------------------------


def _read_file(file: TextFile, report: ReadReport) -> Iterator[Document]:
    format = row_format(file.path)
    if format is not None and (format != "json" or file.named or _has_text_rows(file.path)):
        return _read_text_rows(file, report)
    report.notes[".json files without rows read as plain text"] += format == "json"
    return _read_text(file, report)


def _has_text_rows(path: Path) -> bool:
    """Return whether a .json file begins with a row of text. Folders of code have many others."""
    try:
        first = next(read_rows(path), None)
        return first is not None and isinstance(first.given.get(TEXT_KEY), str)
    except RequestError:
        return False


def _read_text(file: TextFile, report: ReadReport) -> Iterator[Document]:
    with open_bytes(file.path) as stream:
        content = stream.read(BINARY_PROBE_BYTES)
        if b"\0" in content:
            expect(not file.named, str(file.path), "a binary file", EXPECTED)
            report.notes["binary files left out"] += 1
            return
        content += stream.read()
    try:
        text = content.decode("utf-8-sig")  # Path.read_text would change line ends
    except UnicodeDecodeError as error:
        where = f"{file.path}: byte {error.start}"
        expect(not file.named, where, "bytes that are not UTF-8", EXPECTED)
        report.notes["files left out because the text is not UTF-8"] += 1
    else:
        yield Document(file.id, text)


def _read_text_rows(file: TextFile, report: ReadReport) -> Iterator[Document]:
    """Yield the text of every row. Raise `RequestError` for a row without text, unless it is
    null.
    """
    expected = f'a JSON object with a string "{TEXT_KEY}"'
    for row in read_rows(file.path, TEXT_KEY, file.piece, report.notes):
        with located(row.where):
            columns = row.columns
            expect(TEXT_KEY in columns, "columns", list(columns), expected)
            text = columns[TEXT_KEY]
            expect(isinstance(text, str | None), TEXT_KEY, text, expected)
        report.unread |= columns.keys() - {TEXT_KEY}
        yield Document(f"{file.id}:{row.id.rpartition(':')[2]}", text or "")

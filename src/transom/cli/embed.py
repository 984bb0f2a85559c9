"""`transom embed`: one vector per text, or the labels of a classifier."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transom.base.errors import expect, explained, notice
from transom.cli.main import user_path
from transom.cli.options import add_json, add_model, add_offloading, opening, option
from transom.planning.tables import counted

OUT_SUFFIXES = (".safetensors", ".npy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_model(parser)
    add_offloading(parser)
    option(parser, "-t --text TEXT", "a text to read; may be repeated", action="append", default=[])
    what = "file of texts: one per line, or .jsonl, .json, .parquet; - reads standard input"
    option(parser, "-i --input FILE", what, user_path)
    what = "mean over the tokens of a text, or its last token (default: the folder's, or mean)"
    parser.add_argument("--pooling", choices=("mean", "last"), help=what)
    option(parser, "--normalize", "scale vectors to length 1")
    option(parser, "--out FILE", "write float32 vectors to FILE.safetensors or FILE.npy", user_path)
    option(parser, "--overwrite", "replace an existing file of --out")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print vectors or labels, one text a line, write vectors to a file, or print one document."""
    check_arguments(options)
    texts = [*options.text, *(read_texts(options.input) if options.input is not None else [])]
    from transom.checkpoints.open_model import open_model
    from transom.data.labelled import read_labels
    from transom.inference.embedding import embed

    opened = open_model(**opening(options))
    result = embed(opened, texts, pooling=options.pooling, normalize=options.normalize)
    dim = result.vectors_RD.size(1)
    document: dict[str, Any] = {
        "model": str(opened.location),
        "pooling": result.pooling,
        "texts": len(texts),
        "tokens": result.tokens,
        "dim": dim,
    }
    if result.logits_RL is not None:
        document["labels"] = result.best_labels(read_labels(opened.location.model))
    if options.out is not None:
        result.save(options.out)
        document["out"] = options.out
    else:
        document["embeddings"] = result.vectors_RD.tolist()
    counts = f"{counted(len(texts), 'text')}, {counted(result.tokens, 'token')}"
    print(f"{counts}, {result.pooling} pooling, vectors of {dim:,}", file=sys.stderr)
    if not options.json:
        show(document)
    return document


def check_arguments(options: argparse.Namespace) -> None:
    """Raise a `RequestError` for wrong options before torch is imported."""
    given = bool(options.text) or options.input is not None
    expect(given, "--text, --input", None, "a text, a file, or - for standard input")
    if options.out is not None:
        out = Path(options.out)
        expected = f"a file name that ends in {' or '.join(OUT_SUFFIXES)}"
        expect(out.suffix in OUT_SUFFIXES, "--out", options.out, expected)
        expect(out.parent.is_dir(), "--out", options.out, "a file in an existing folder")
        fits = not out.exists() or options.overwrite
        expect(fits, "--out", options.out, "--overwrite, since the file exists")


def read_texts(name: str) -> list[str]:
    """Return the lines of a text file or of standard input, or the texts of a file of rows."""
    from transom.data.file_formats import open_bytes, readable, row_format

    if row_format(name) is not None:
        from transom.data.text.sources import ReadReport, SourceArgs, read_documents

        report = ReadReport()
        texts = [document.text for document in read_documents(SourceArgs(name), report)]
        if report.counts():
            notice(f"{name}: {', '.join(report.counts())}")
        return texts
    with explained(f"--input: got {name!r}; expected UTF-8", UnicodeDecodeError):
        if name == "-":
            content = sys.stdin.read().removeprefix("\ufeff")
        else:
            with readable(Path(f"--input {name}")), open_bytes(Path(name)) as stream:
                content = stream.read().decode("utf-8-sig")
    # A text may contain other line ends than \n.
    texts = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    for number, text in enumerate(texts, start=1):
        expect(bool(text), "--input", name, f"a text in line {number}, which is empty")
    return texts


def show(document: dict[str, Any]) -> None:
    """Print one line per text: its label and probability, or the numbers of its vector."""
    for row in document.get("labels", ()):
        print(f"{row['label']}\t{row['probability']:.4f}")
    for vector in () if "labels" in document else document.get("embeddings", ()):
        print(" ".join(f"{value:.6g}" for value in vector))

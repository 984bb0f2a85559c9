"""`transom embed`: one vector per text, from a language model or a model with a head, whose labels
it shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transom.base.errors import RequestError, WorkError, notice, require
from transom.cli.generate import add_folder_arguments
from transom.cli.main import emit_json, user_path

if TYPE_CHECKING:
    from torch import Tensor

    from transom.tokenizers.tokenizer import Tokenizer

OUT_SUFFIXES = (".safetensors", ".npy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_folder_arguments(parser)
    parser.add_argument(
        "-t", "--text", action="append", default=[], metavar="TEXT", help="may be given again"
    )
    parser.add_argument(
        "-i",
        "--input",
        type=user_path,
        metavar="FILE",
        help="texts, one a line, or those of a .jsonl, .json or .parquet; - is standard input",
    )
    parser.add_argument(
        "--pooling", choices=("mean", "last"),
        help="mean over all tokens of a text, or its last one (default: what the folder states, "
"else mean)",
    )  # fmt: skip
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="FILE",
        help="write float32 vectors to FILE.safetensors or FILE.npy",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the files' own)"
    )


def run(options: argparse.Namespace) -> int:
    """Print vectors or labels, one text a line; or write vectors to a file; or both as one
    document.
    """
    check_arguments(options)
    texts = [*options.text, *(read_texts(options.input) if options.input is not None else [])]
    for number, text in enumerate(texts, start=1):
        require(
            bool(text), f"text {number} of {len(texts)}", text, "expected one character or more"
        )
    from transom.checkpoints.files.pooling import stated_pooling, tell_other_modules
    from transom.checkpoints.open_model import open_model
    from transom.config.layer_args import BASE_HEAD
    from transom.data.labelled import encode_texts, read_labels
    from transom.training.losses.heads import run_rows

    opened = open_model(
        options.folder, device=options.device, dtype=options.dtype, revision=options.revision
    )
    model, tokenizer, folder = opened.model, opened.tokenizer, opened.location.model
    head = model.args.head
    say_spelled(tokenizer, texts)
    rows = encode_texts(tokenizer, texts, model.args.max_seq_len)
    stated = stated_pooling(folder) if head is None or head == BASE_HEAD else head.pooling
    pooling: Literal["mean", "last"] = options.pooling or stated or "mean"
    tell_other_modules(folder, options.normalize)
    vectors_RD, logits_RL = run_rows(model, rows, pooling)
    vectors_RD = vectors_RD.float().cpu()
    broken = [
        number
        for number, finite in enumerate(vectors_RD.isfinite().all(1).tolist(), 1)
        if not finite
    ]
    if broken:
        dtype = str(model.dtype).removeprefix("torch.")
        raise WorkError(
            f"text {broken[0]} of {len(texts)}: its vector is NaN or infinite ({len(broken)} "
            f"such texts); a weight is not finite, or values are too large for {dtype}"
        )
    if options.normalize:
        vectors_RD = vectors_RD / vectors_RD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    document: dict[str, Any] = {
        "model": str(opened.location),
        "pooling": pooling,
        "texts": len(texts),
        "tokens": sum(map(len, rows)),
        "dim": vectors_RD.size(1),
    }
    if logits_RL is not None:
        document["labels"] = labels_of(logits_RL, read_labels(folder))
    if options.out is not None:
        write_vectors(Path(options.out), vectors_RD)
        document["out"] = options.out
    else:
        document["embeddings"] = vectors_RD.tolist()
    print(
        f"{document['texts']} texts, {document['tokens']} tokens, {document['pooling']} pooling, "
        f"vectors of {document['dim']}", file=sys.stderr,
    )  # fmt: skip
    if options.json:
        emit_json(document)
    elif options.out is None or "labels" in document:
        show(document)
    return 0


def say_spelled(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Print one notice about texts that spell control tokens, which are read as plain text."""
    found = [spelled for text in texts if (spelled := tokenizer.spelled_in(text))]
    if found:
        notice(
            f"{len(found)} of {len(texts)} texts spell control tokens, as {found[0][0]}: read as "
            f"plain text"
        )


def check_arguments(options: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is imported."""
    if not options.text and options.input is None:
        raise RequestError(
            "--text, --input: neither is given; expected a text, a file, or - for standard input"
        )
    if options.out is not None:
        out = Path(options.out)
        expected = f"expected a file name that ends in {' or '.join(OUT_SUFFIXES)}"
        require(out.suffix in OUT_SUFFIXES, "--out", options.out, expected)
        require(
            out.parent.is_dir(),
            "--out",
            options.out,
            "expected a file in a folder that is there",
        )
        fits = not out.exists() or options.overwrite
        require(fits, "--out", options.out, "this file is there; valid only with --overwrite")


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
    try:
        if name == "-":
            whole = sys.stdin.read().removeprefix("\ufeff")
        else:
            with readable(Path(f"--input {name}")), open_bytes(Path(name)) as stream:
                whole = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"--input {name}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    lines = whole.removesuffix("\n").split("\n")  # at \n only: a text may hold other line ends
    texts = [line.removesuffix("\r") for line in lines]
    for number, text in enumerate(texts, start=1):
        if not text:
            raise RequestError(f"--input {name}: line {number} is empty; expected one text a line")
    return texts


def labels_of(logits_RL: Tensor, names: list[str] | None) -> list[dict[str, Any]]:
    """The most likely label of each row and its probability; numbers where nobody named them."""
    best_R = logits_RL.double().softmax(1).max(1)
    pairs = zip(best_R.indices.tolist(), best_R.values.tolist(), strict=True)
    return [{"label": str(i) if names is None else names[i], "probability": p} for i, p in pairs]


def write_vectors(path: Path, vectors_RD: Tensor) -> None:
    """`embeddings` [texts, dim] as safetensors, or the bare array as .npy."""
    from transom.checkpoints.files.safetensors_files import write_tensors

    if path.suffix == ".safetensors":
        write_tensors(path, {"embeddings": vectors_RD})
        return
    import numpy as np

    try:
        np.save(path, vectors_RD.numpy())
    except OSError as error:
        raise WorkError(f"{path}: could not be written ({error})") from None


def show(document: dict[str, Any]) -> None:
    """One line per text: its label and probability, or the numbers of its vector."""
    if "labels" in document:
        for row in document["labels"]:
            print(f"{row['label']}\t{row['probability']:.4f}")
        return
    for vector in document["embeddings"]:
        print(" ".join(f"{value:.6g}" for value in vector))

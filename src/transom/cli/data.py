"""`transom data` checks and shows a data set for fine-tuning, and tokenizes text for training.

`check` counts the rows that `transom finetune` would train on with the same words and flags, and
lists the rows that can't be used. `show` prints an example token by token. `tokenize` writes a
folder of tokens, which `transom train` reads as a source.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from transom.base.errors import expect, notice, require
from transom.base.yaml_files import read_yaml
from transom.cli.finetune import FLAGS, Flag, fields_of_flags
from transom.cli.main import emit_json, user_path
from transom.cli.options import add_json, add_revision, option, require_unset
from transom.cli.runs import add_words, split_words
from transom.planning.tables import counted, heading, pairs, show, table, visible
from transom.tokenizers.stream import StreamDecoder

if TYPE_CHECKING:
    from rich.text import Text

    from transom.data.chat.tokens import RowToken
    from transom.data.chat.turns import EncodedChat
    from transom.tokenizers.tokenizer import Tokenizer
    from transom.training.finetune.check import FinetuneSet

# Flags that set fields of fine-tuning: those of `finetune` and three more.
FIELDS: tuple[Flag, ...] = (
    *(flag for flag in FLAGS if flag[0] != "--out"),
    (
        "--chat-template",
        "finetune.template",
        user_path,
        "a built-in template, one of the folder's by name, or a file",
    ),
    ("--train-on", "finetune.train_on", str, "turns that have loss: assistant (default) or all"),
    ("--truncate", "finetune.truncate", str, "what happens to longer rows: cut (default) or drop"),
)
# What the counts of `check` mean, besides `COUNTS`.
WORDS = {
    "longest": "length of the longest row, tokens",
    "with_bos": "rows that begin with BOS",
    "too_long": "prompts without room for an answer",
    "held_out": "examples held out",
    "malformed_rows": "malformed rows",
    "packed_rows": "packed into rows",
    "fill": "share of packed rows that is used",
    "rows_per_step": "rows per step",
    "steps": "optimizer steps",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    what = "check: count rows and list faults; show: print one example; tokenize: text for `train`"
    parser.add_argument("what", choices=("check", "show", "tokenize"), help=what)
    data = (
        ".jsonl, .json or .parquet file, folder with train, valid and test files, name of the "
        "`datasets` library, or stdlib-docs: questions about Python's own library"
    )
    option(parser, "DATA", data, user_path)
    model = "folder, GGUF file, hub id or smollm2, whose tokenizer and chat template are used"
    option(parser, "--model FOLDER", model, user_path, required=True)
    add_revision(parser)
    option(parser, "--split SPLIT", "train (default), valid or test", default="train")
    add_words(parser, "as for finetune")
    for flag, field, kind, meaning in FIELDS:
        names = f"--seq-len {flag}" if flag == "--max-seq-length" else flag
        dest = flag[2:].replace("-", "_")
        option(parser, f"{names} X", f"{meaning} ({field})", kind, dest=dest)
    index = "show: number of the example or packed row, from 0 (default: 0)"
    option(parser, "--index N", index, int)
    option(parser, "--packed", "show: print a row of several examples, as in training")
    option(parser, "--seed N", "show --packed: seed of the packing (default: 0)", int)
    option(parser, "--out FOLDER", "tokenize: folder or URL of tokens, for all parts", user_path)
    option(parser, "--workers N", "tokenize: processes (default: as many as cores)", int)
    option(parser, "--part I/N", "tokenize: make part I of N (default: 1/1)")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any] | int:
    """Check or show a data set. Return 1 if rows are malformed or nothing can be trained on."""
    from transom.training.finetune.check import open_finetune_set

    shows, tokenizes = options.what == "show", options.what == "tokenize"
    require_unset(options, shows, "with show", "index", "packed")
    require_unset(options, shows and options.packed, "with show --packed", "seed")
    require_unset(options, tokenizes, "with tokenize", "out", "workers", "part")
    expect((options.index or 0) >= 0, "--index", options.index, "0 or more")
    path, words = split_words(options.words)
    fields = fields_of_flags(options, FIELDS)
    overrides = [f"{field}={value}" for field, value in fields.items()]
    overrides += [] if options.seed is None else [f"seed={options.seed}"]
    if tokenizes:
        given = overrides + options.words
        expect(not given, "tokenize", given, "no fields of fine-tuning")
        return tokenize_text(options)
    data = open_finetune_set(
        options.model,
        options.data,
        [*overrides, *words],
        read_yaml(path) if path else {},
        split=options.split,
        revision=options.revision,
        collect=not shows,
    )
    return show_example(data, options) if shows else check(data, options)


def tokenize_text(options: argparse.Namespace) -> dict[str, Any]:
    """Write a part of a folder of tokens, and print its counts."""
    from transom.checkpoints.open_model import load_tokenizer
    from transom.data.text.sources import SourceArgs
    from transom.data.text.tokenizing import tokenize

    expect(bool(options.out), "--out", options.out, "a folder or a URL")
    manifest, report = tokenize(
        SourceArgs(options.data),
        load_tokenizer(options.model, options.revision),
        options.out,
        workers=options.workers,
        part=options.part or "1/1",
        progress=not options.json,
    )
    state = "parts are missing" if manifest["shards"] is None else "all parts are there"
    notice("; ".join([f"{options.out}: {state}", *report.counts()]))
    return {"out": options.out, **manifest}


# -- check -----------------------------------------------------------------------------------------


def check(data: FinetuneSet, options: argparse.Namespace) -> int:
    """Print counts and faults. Return 1 if there are faults, or nothing to train on."""
    from transom.training.finetune.check import check_rows

    template = data.encoder.template
    facts: dict[str, Any] = {
        "data": str(options.data),
        "split": options.split,
        "model": data.model,
        "template": None if template is None else template.origin,
        "seq_len": data.args.data.seq_len,
        "objective": data.args.finetune_settings.objective,
        "kinds": sorted({**data.train.kinds, **data.measured.kinds}),
        **check_rows(data),
    }
    facts["trains"] = facts["rows"] > 0
    facts["malformed"] = [{"where": one.where, "problem": one.sentence} for one in data.problems]
    if options.json:
        emit_json(facts)
    else:
        print_check(facts)
    if not facts["trains"]:
        notice(f"{options.data}: nothing to train on")
    return 1 if data.problems or not facts["trains"] else 0


def print_check(facts: dict[str, Any]) -> None:
    """Print a table of the counts, and the malformed rows with their lines."""
    from transom.data.chat.rows import COUNTS

    heading(f"{facts['data']} ({facts['split']}), for {facts['model']}")
    words = COUNTS | WORDS
    lines = [
        ("kinds of rows", ", ".join(facts["kinds"])),
        ("chat template", facts["template"] or "plain text"),
        ("objective", facts["objective"]),
        ("maximum length of a row", f"{facts['seq_len']:,} tokens"),
        *((words[name], amount(value)) for name, value in facts.items() if name in words),
    ]
    show(pairs(lines))
    if facts["malformed"]:
        heading("Malformed rows")
    for fault in facts["malformed"]:
        print(f"{fault['where']}: {fault['problem']}")


def amount(value: int | float) -> str:
    """Return a count, or a share in percent."""
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"


# -- show ------------------------------------------------------------------------------------------


def show_example(data: FinetuneSet, options: argparse.Namespace) -> dict[str, Any] | int:
    """Print the rows of one example, or a packed row, as coloured text and token by token."""
    from transom.data.chat.tokens import row_tokens

    tokenizer, template = data.encoder.tokenizer, data.encoder.template
    rows = chosen_rows(data, options.index or 0, options.packed)
    ends = () if template is None else template.stop_tokens
    tokens = [list(row_tokens(row, tokenizer, ends)) for row in rows]
    names = [[one.id for one in row] for row in rows]
    if not rows:
        return 1
    documents = []
    for ids, part in zip(names, tokens, strict=True):
        documents.append({"examples": ids, "tokens": [token._asdict() for token in part]})
        if not options.json:
            print_row(ids, part, tokenizer)
    document = {"data": str(options.data), "index": options.index or 0}
    return {**document, "packed": options.packed, "rows": documents}


def chosen_rows(data: FinetuneSet, index: int, packed: bool) -> list[list[EncodedChat]]:
    """Return the rows of example `index`, or packed row `index`; none if they have no loss."""
    from transom.data.chat.finetune_sets import find_examples
    from transom.data.chat.packing import first_fit_decreasing
    from transom.data.chat.shards import prepare_chats

    examples = find_examples(data.train.name, data.train.split)
    if packed:
        encoded = prepare_chats([examples], data.encoder, data.args.data.cache_dir)
        expected = "valid only for examples that are not compared with each other"
        require(not encoded.compared, "--packed", True, expected)
        packs = first_fit_decreasing(encoded.lengths, data.args.data.seq_len, data.args.seed)
        expect(index < len(packs), "--index", index, f"0 to {len(packs) - 1}")
        return [[encoded.items[at][0] for at in packs[index]]]
    expect(index < len(examples), "--index", index, f"0 to {len(examples) - 1}")
    encoded = data.encoder.encode(islice(examples, index, index + 1))
    if not encoded.items:
        notice(f"example {index} has nothing to train on: {encoded}")
    return [[row] for item in encoded.items for row in item]


def print_row(ids: Sequence[str], tokens: Sequence[RowToken], tokenizer: Tokenizer) -> None:
    """Print the text with its loss in colour, then a line for each token."""
    trained = sum(token.weight > 0 for token in tokens)
    sizes = (
        f"{counted(len(tokens), 'token')}, {trained:,} with loss, {counted(len(ids), 'segment')}"
    )
    heading(f"{', '.join(ids)}: {sizes}")
    show(coloured(tokens, tokenizer))
    heading("Token by token (above, green text has loss and bold text are control tokens)")
    lines = []
    for one in tokens:
        numbers = (str(one.id), f"{one.weight:g}", str(one.segment), str(one.position))
        lines.append((visible(one.text), one.mark, *numbers))
    show(table(("token", "mark"), ("id", "loss", "segment", "position"), lines))


def coloured(tokens: Sequence[RowToken], tokenizer: Tokenizer) -> Text:
    """Return the text of a row: green where it has loss, every other example underlined."""
    from rich.text import Text

    out, stream = Text(), StreamDecoder(tokenizer, skip_special=False)
    for token in tokens:
        style = "green" if token.weight > 0 else "dim"
        style += (" bold" if token.mark else "") + (" underline" if token.segment % 2 else "")
        out.append(printable(stream.push(token.id)), style)
    return out.append(printable(stream.finish()))


def printable(text: str) -> str:
    """Return a text that the terminal can print, without control characters."""
    safe = "".join(one if one == "\n" or one.isprintable() else repr(one)[1:-1] for one in text)
    encoding = sys.stdout.encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)

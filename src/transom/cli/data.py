"""`transom data`: what a set for fine-tuning comes to with a model's tokenizer and chat template.

`check` counts, and names every row that cannot be used; `show` prints an example token by token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from transom.checkpoints.folders import Found, find_model, is_model, lacks_vocabulary, read_args
from transom.cli.chat import find_template
from transom.cli.inspect import heading, pairs, show, shown, table, token_text
from transom.cli.main import emit_json
from transom.errors import notice, require

if TYPE_CHECKING:
    from rich.text import Text

    from transom.chat.template import ChatTemplate
    from transom.data.conversations import Example
    from transom.data.tuning_rows import EncodedRows, TuningRow
    from transom.data.tuning_sets import Problem
    from transom.tokenizer import Tokenizer

SEQ_LEN = 4096  # tokens of the longest example where no model states a length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("what", choices=("check", "show"), help="count and find faults, or print one example")
    files = ".jsonl, .json or .parquet file, a folder with train, valid and test files, a name of `datasets`"
    parser.add_argument("data", metavar="DATA", help=f"{files}, or stdlib-docs: questions on Python's own library")
    model = "the folder or hub id whose tokenizer and chat template are used"
    parser.add_argument("--model", required=True, metavar="FOLDER", help=model)
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--split", default="train", help="train (default), valid or test")
    parser.add_argument(
        "--seq-len", "--max-seq-length", dest="seq_len", type=int, metavar="N",
        help="longest example, tokens (default: the model's max_seq_len)",
    )  # fmt: skip
    which = "a built-in template, one of the folder's by name, or a file (default: the folder's)"
    parser.add_argument("--chat-template", metavar="NAME", help=which)
    parser.add_argument(
        "--train-on", choices=("assistant", "all"), default="assistant", help="turns that carry loss"
    )
    parser.add_argument(
        "--truncate", choices=("cut", "drop"), default="cut", help="what becomes of longer examples (default: cut)"
    )
    parser.add_argument("--index", type=int, metavar="N", help="show: which example, from 0 (default: 0)")
    parser.add_argument(
        "--packed", action="store_true", help="show: a row of several examples, as they are trained"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="show --packed: seed of the packing (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")


def run(options: argparse.Namespace) -> int:
    """Check or show; 1 where rows are malformed or nothing would be trained on."""
    for flag, fits in (("index", "show"), ("packed", "show"), ("seed", "show --packed")):
        value = getattr(options, flag)
        given = value is not None and value is not False
        fine = options.what == "show" and (flag != "seed" or options.packed)
        require(fine or not given, f"--{flag}", value, f"accepted with {fits}")
    index = options.index or 0
    require(index >= 0, "--index", options.index, "accepted is 0 or more")
    subject = open_subject(options)
    return check(subject, options) if options.what == "check" else show_example(subject, index, options)


class Subject(NamedTuple):
    """The data, its faults, and what writes it as tokens."""

    examples: list[Example]
    problems: list[Problem]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    seq_len: int
    found: Found


def open_subject(options: argparse.Namespace) -> Subject:
    """Read data, tokenizer and template; `check` collects malformed rows, `show` refuses the first."""
    from transom.checkpoints.load import open_tokenizer
    from transom.data.tuning_rows import template_for
    from transom.data.tuning_sets import read_examples

    found = find_model(options.model, options.revision, settings_only=True)
    if lacks_vocabulary(found.model):
        found = find_model(options.model, options.revision)
    seq_len = longest_example(found, options.seq_len)
    tokenizer = open_tokenizer(found)
    problems: list[Problem] = []
    examples = read_examples(options.data, options.split, problems if options.what == "check" else None)
    template = template_for(examples, tokenizer, find_template(found, tokenizer, options.chat_template))
    return Subject(examples, problems, tokenizer, template, seq_len, found)


def longest_example(found: Found, asked: int | None) -> int:
    """Return the length that was asked for, or the model's; without a model `SEQ_LEN`, which is said."""
    if is_model(found.model):
        most = read_args(found.model).max_seq_len
        seq_len = most if asked is None else asked
        require(2 <= seq_len <= most, "--seq-len", seq_len, f"accepted is 2 to {most}, the model's max_seq_len")
        return seq_len
    if asked is None:
        notice(f"{found}: a tokenizer without a model; examples may have {SEQ_LEN} tokens, or --seq-len N")
    require(asked is None or asked >= 2, "--seq-len", asked, "expected 2 or more")
    return SEQ_LEN if asked is None else asked


def encode(subject: Subject, examples: Sequence[Example], options: argparse.Namespace) -> EncodedRows:
    """Rows of some of the examples, as they are trained on; what cannot be written is added to the faults."""
    from transom.data.tuning_rows import encode_examples

    return encode_examples(
        examples,
        subject.tokenizer,
        subject.template,
        seq_len=subject.seq_len + 1,  # as in training: the last token of a row is a target only
        train_on=options.train_on,
        truncate=options.truncate,
        problems=subject.problems,
    )


# -- check -------------------------------------------------------------------------------------------


def check(subject: Subject, options: argparse.Namespace) -> int:
    """Print counts and faults; 1 where there are faults, or nothing to train on."""
    facts: dict[str, Any] = {
        "data": str(options.data),
        "split": options.split,
        "model": str(subject.found),
        "template": None if subject.template is None else subject.template.origin,
        "seq_len": subject.seq_len,
        "kinds": sorted({example.kind for example in subject.examples}),
    }
    asks = facts["kinds"] == ["answer"]
    facts |= prompt_facts(subject) if asks else row_facts(subject, encode(subject, subject.examples, options))
    nothing = not facts["rows"]
    facts["trains"] = not nothing
    facts["malformed"] = [{"where": where, "problem": sentence} for where, sentence in subject.problems]
    if options.json:
        emit_json(facts)
    else:
        print_check(facts)
    if nothing:
        notice(f"{options.data}: nothing to train on")
    return 1 if nothing or subject.problems else 0


def row_facts(subject: Subject, encoded: EncodedRows) -> dict[str, Any]:
    """Counts of rows, and how many rows of full length they would be packed into."""
    from transom.data.packing import first_fit_decreasing

    rows = [row for item in encoded.items for row in item]
    lengths = [len(row.ids) for row in rows]
    bos = subject.tokenizer.bos_id
    facts = {
        **asdict(encoded.counts),
        "malformed_rows": len(subject.problems),
        "longest": max(lengths, default=0),
        "with_bos": sum(bos is not None and int(row.ids[0]) == bos for row in rows),
    }
    if rows and encoded.rows_per_item == 1 and encoded.labels is None:
        inputs = [length - 1 for length in lengths]
        packs = len(first_fit_decreasing(inputs, subject.seq_len, seed=0))
        facts |= {"packed_rows": packs, "fill": round(sum(inputs) / (packs * subject.seq_len), 4)}
    return facts


def prompt_facts(subject: Subject) -> dict[str, Any]:
    """Counts of prompts, whose answers are still to be drawn."""
    from transom.data.tuning_rows import prompt_ids
    from transom.data.tuning_sets import Problem
    from transom.errors import RequestError

    lengths = []
    for example in subject.examples:
        try:
            lengths.append(len(prompt_ids(example, subject.tokenizer, subject.template)))
        except RequestError as error:
            subject.problems.append(Problem(example.id, str(error)))
    return {
        "examples": len(subject.examples),
        "malformed_rows": len(subject.problems),
        "rows": len(lengths),
        "tokens": sum(lengths),
        "longest": max(lengths, default=0),
        "too_long": sum(length >= subject.seq_len for length in lengths),
    }


WORDS = {
    "examples": "examples",
    "malformed_rows": "malformed rows",
    "rows": "rows to train on",
    "tokens": "tokens in them",
    "trained_tokens": "tokens with loss",
    "longest": "longest row, tokens",
    "with_bos": "rows that begin with BOS",
    "truncated": "rows cut at their end",
    "dropped": "examples left out as too long",
    "fully_masked": "examples left out as fully masked",
    "beyond": "examples left out, answers beyond",
    "without_end": "answers without an end of turn",
    "split_rows": "further rows of split conversations",
    "unlike_prompt": "answers not behind their own prompt",
    "alike": "pairs left out, answers of the same tokens",
    "too_long": "prompts without room for an answer",
    "packed_rows": "packed into rows",
    "fill": "fill of packed rows",
}


def print_check(facts: dict[str, Any]) -> None:
    """One table, then the faults with their lines."""
    heading(f"{facts['data']} ({facts['split']}), for {facts['model']}")
    written = facts["template"] or "plain text"
    lines = [("kinds of rows", ", ".join(facts["kinds"])), ("written by", written)]
    lines.append(("longest allowed", f"{facts['seq_len']:,} tokens"))
    show(pairs([*lines, *((words, amount(facts[name])) for name, words in WORDS.items() if name in facts)]))
    if facts["malformed"]:
        heading("Malformed rows")
        for fault in facts["malformed"]:
            print(f"{fault['where']}: {fault['problem']}")


def amount(value: int | float) -> str:
    """A count, or a share in percent."""
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"


# -- show --------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """One token: its example among those of the row, its place there, what it counts as a target, what it marks."""

    segment: int
    position: int
    id: int
    text: str
    weight: float
    mark: str  # BOS, EOS, end of turn, control, or nothing


def show_example(subject: Subject, index: int, options: argparse.Namespace) -> int:
    """Print the rows of one example, or a packed row, as coloured text and token by token."""
    from transom.data.packing import first_fit_decreasing

    examples = subject.examples
    chosen = examples if options.packed else examples[index : index + 1]
    accepted = f"accepted is 0 to {len(examples) - 1}"
    require(bool(chosen), "--index", index, accepted)
    encoded = encode(subject, chosen, options)
    for fault in subject.problems:
        notice(f"{fault.where}: {fault.sentence}")
    rows = [[row] for item in encoded.items for row in item]
    if options.packed and rows:
        alone = encoded.rows_per_item == 1 and encoded.labels is None
        require(alone, "--packed", True, "accepted for sets whose examples are not compared with each other")
        inputs = [len(row.ids) - 1 for (row,) in rows]
        packs = first_fit_decreasing(inputs, subject.seq_len, options.seed or 0)
        require(index < len(packs), "--index", index, f"accepted with --packed is 0 to {len(packs) - 1}")
        rows = [[rows[at][0] for at in packs[index]]]
    if not rows:
        notice(f"example {index} has nothing to train on: {encoded.counts}")
        return 1
    tokens = [list(tokens_of(row, subject)) for row in rows]
    if options.json:
        documents = [
            {"examples": [one.id for one in row], "tokens": [token._asdict() for token in part]}
            for row, part in zip(rows, tokens, strict=True)
        ]
        emit_json({"data": str(options.data), "index": index, "packed": options.packed, "rows": documents})
        return 0
    for row, part in zip(rows, tokens, strict=True):
        print_row([one.id for one in row], part, subject.tokenizer)
    return 0


def tokens_of(row: Sequence[TuningRow], subject: Subject) -> Iterator[Token]:
    """The tokens of the examples of one row."""
    tokenizer = subject.tokenizer
    ends = () if subject.template is None else subject.template.stop_tokens
    for segment, one in enumerate(row):
        for position, (id, weight) in enumerate(zip(one.ids.tolist(), one.weights.tolist(), strict=True)):
            known = {"BOS": id == tokenizer.bos_id, "EOS": id == tokenizer.eos_id, "end of turn": id in ends}
            marks = [name for name, fits in known.items() if fits]
            mark = ", ".join(marks) or ("control" if id in tokenizer.special_ids else "")
            yield Token(segment, position, id, token_text(tokenizer, id), weight, mark)


def print_row(ids: Sequence[str], tokens: Sequence[Token], tokenizer: Tokenizer) -> None:
    """The text with its loss in colour, then a line for each token."""
    trained, segments = sum(token.weight > 0 for token in tokens), len(ids)
    heading(f"{', '.join(ids)}: {len(tokens)} tokens, {trained} with loss, {segments} segments")
    show(coloured(tokens, tokenizer))
    heading("Token by token (in the text above: green is learnt, bold are control tokens)")
    lines = [
        (shown(tokenizer, one.id), one.mark, str(one.id), f"{one.weight:g}", str(one.segment), str(one.position))
        for one in tokens
    ]
    show(table(("token", "mark"), ("id", "loss", "segment", "position"), lines))


def coloured(tokens: Sequence[Token], tokenizer: Tokenizer) -> Text:
    """The text of a row, green where it carries loss; every other example is underlined."""
    from rich.text import Text

    out, stream = Text(), tokenizer.stream(skip_special=False)
    for token in tokens:
        style = "green" if token.weight > 0 else "dim"
        style += (" bold" if token.mark else "") + (" underline" if token.segment % 2 else "")
        out.append(printable(stream.push(token.id)), style)
    return out.append(printable(stream.finish()))


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey, in what standard output can write."""
    safe = "".join(one if one == "\n" or one.isprintable() else repr(one)[1:-1] for one in text)
    encoding = sys.stdout.encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)

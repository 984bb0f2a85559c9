"""`transom data show`: an example, or a packed row, token by token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from transom.base.errors import notice, require
from transom.cli.main import emit_json
from transom.planning.tables import heading, show, table, visible
from transom.tokenizers.stream import StreamDecoder

if TYPE_CHECKING:
    from rich.text import Text

    from transom.cli.data import Subject
    from transom.data.chat.rows import EncodedChat
    from transom.tokenizers.tokenizer import Tokenizer


class Token(NamedTuple):
    """One token: number of its example in the row, position there, weight as a target, kind of
    control token.
    """

    segment: int
    position: int
    id: int
    text: str
    weight: float
    mark: str  # BOS, EOS, end of turn, control, or nothing


def show_example(subject: Subject, index: int, options: argparse.Namespace) -> int:
    """Print the rows of one example, or a packed row, as coloured text and token by token."""
    from transom.cli.data import encode
    from transom.data.chat.packing import first_fit_decreasing

    examples = subject.examples
    chosen = examples if options.packed else examples[index : index + 1]
    expected = f"expected 0 to {len(examples) - 1}"
    require(bool(chosen), "--index", index, expected)
    encoded = encode(subject, chosen)
    for fault in subject.problems:
        notice(f"{fault.where}: {fault.sentence}")
    rows = [[row] for item in encoded.items for row in item]
    if options.packed and rows:
        alone = encoded.rows_per_item == 1 and encoded.labels is None
        require(
            alone,
            "--packed",
            True,
            "valid only for sets whose examples are not compared with each other",
        )
        inputs = [len(row.ids) - 1 for (row,) in rows]
        packs = first_fit_decreasing(inputs, subject.args.data.seq_len, subject.args.seed)
        require(
            index < len(packs),
            "--index",
            index,
            f"valid only with --packed is 0 to {len(packs) - 1}",
        )
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
        emit_json(
            {"data": str(options.data), "index": index, "packed": options.packed, "rows": documents}
        )
        return 0
    for row, part in zip(rows, tokens, strict=True):
        print_row([one.id for one in row], part, subject.tokenizer)
    return 0


def tokens_of(row: Sequence[EncodedChat], subject: Subject) -> Iterator[Token]:
    """Yield the tokens of the examples of one row."""
    tokenizer = subject.tokenizer
    ends = () if subject.template is None else subject.template.stop_tokens
    for segment, one in enumerate(row):
        for position, (id, weight) in enumerate(
            zip(one.ids.tolist(), one.weights.tolist(), strict=True)
        ):
            known = {
                "BOS": id == tokenizer.bos_id,
                "EOS": id == tokenizer.eos_id,
                "end of turn": id in ends,
            }
            marks = [name for name, fits in known.items() if fits]
            mark = ", ".join(marks) or ("control" if id in tokenizer.special_ids else "")
            yield Token(segment, position, id, tokenizer.token_text(id), weight, mark)


def print_row(ids: Sequence[str], tokens: Sequence[Token], tokenizer: Tokenizer) -> None:
    """Print the text with its loss in colour, then a line for each token."""
    trained, segments = sum(token.weight > 0 for token in tokens), len(ids)
    heading(f"{', '.join(ids)}: {len(tokens)} tokens, {trained} with loss, {segments} segments")
    show(coloured(tokens, tokenizer))
    heading("Token by token (in the text above: green is learnt, bold are control tokens)")
    lines = [
        (
            visible(one.text),
            one.mark,
            str(one.id),
            f"{one.weight:g}",
            str(one.segment),
            str(one.position),
        )
        for one in tokens
    ]
    show(table(("token", "mark"), ("id", "loss", "segment", "position"), lines))


def coloured(tokens: Sequence[Token], tokenizer: Tokenizer) -> Text:
    """Return the text of a row, green where it has loss, with every other example underlined."""
    from rich.text import Text

    out, stream = Text(), StreamDecoder(tokenizer, skip_special=False)
    for token in tokens:
        style = "green" if token.weight > 0 else "dim"
        style += (" bold" if token.mark else "") + (" underline" if token.segment % 2 else "")
        out.append(printable(stream.push(token.id)), style)
    return out.append(printable(stream.finish()))


def printable(text: str) -> str:
    """Return a text without control characters for the terminal, in the encoding of standard
    output.
    """
    safe = "".join(one if one == "\n" or one.isprintable() else repr(one)[1:-1] for one in text)
    encoding = sys.stdout.encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)

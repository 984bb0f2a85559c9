"""What a model is trained on is what the files say: every document framed once, every next token a
target.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from transom.data.batch import NO_TARGET, Batch
from transom.data.text.batches import TextBatches
from transom.data.text.shards import TokenFile, prepare
from transom.data.text.sources import SourceArgs
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer
from transom.verify.findings import Finding
from transom.verify.tiny_runs import documents, temporary_corpus

SEQ_LEN, ROWS = 24, 4


def check_data() -> Iterator[Finding]:
    """One epoch of the built-in corpus, byte by byte; each error is a count of wrong places."""
    tokenizer = byte_tokenizer()
    with temporary_corpus() as folder:
        file = tokenized(folder, tokenizer)
        begin, end = tokenizer.bos_id, tokenizer.eos_id
        assert begin is not None and end is not None, "byte_tokenizer has both"
        expected = [bytes_framed(text, begin, end) for text in documents().values()]
        batches = make_batches(file, begin, end)
        count = batches.items_per_epoch // ROWS
        rows = [row for _ in range(count) for row in rows_of(batches.next())]
        yield from judge_rows(rows, expected, begin, end)
        yield from judge_order(file, begin, end)


def tokenized(folder: Path, tokenizer: Tokenizer) -> TokenFile:
    """The corpus of a temporary_corpus, all of it to train on."""
    return prepare(SourceArgs(path=str(folder / "corpus")), tokenizer, folder / "cache").train


def bytes_framed(text: str, begin: int, end: int) -> list[int]:
    """A document as it should be read: BOS, its bytes, EOS."""
    return [begin, *text.encode(), end]


def make_batches(
    file: TokenFile, begin: int, end: int, rank: int = 0, world_size: int = 1
) -> TextBatches:
    """Batches over one token file."""
    return TextBatches(
        [file], [1.0], bos_id=begin, eos_id=end, vocab_size=max(begin, end) + 1, seq_len=SEQ_LEN,
        rows_per_step=ROWS, seed=0, rank=rank, world_size=world_size,
    )  # fmt: skip


def rows_of(batch: Batch) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Every row as (tokens, targets) of its documents."""
    assert batch.sizes is not None, "rows of text have them"
    for tokens, targets, sizes in zip(batch.tokens, batch.targets, batch.sizes, strict=True):
        parts = zip(tokens.split(list(sizes)), targets.split(list(sizes)), strict=True)
        yield [(a.tolist(), b.tolist()) for a, b in parts]


def judge_rows(
    rows: list[list[tuple[list[int], list[int]]]], documents: list[list[int]], begin: int, end: int
) -> Iterator[Finding]:
    """Count places where rows and documents disagree."""
    pieces = [(row, at, *piece) for row, parts in enumerate(rows) for at, piece in enumerate(parts)]
    inner = [(row, tokens) for row, _, tokens, _ in pieces if begin in tokens[1:]]
    yield counted("one BOS per document", "BOS behind another token", [row for row, _ in inner])
    whole = [
        "".join(map(chr, document)) for document in documents
    ]  # a character per id: `in` finds runs of them
    foreign = [
        row
        for row, _, tokens, _ in pieces
        if not any("".join(map(chr, tokens)) in one for one in whole)
    ]
    yield counted(
        "rows are runs of documents", "tokens that no document holds in this order", foreign
    )
    ends: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for row, at, tokens, targets in pieces:
        for place, (target, following) in enumerate(zip(targets, [*tokens[1:], None], strict=True)):
            last = at == len(rows[row]) - 1
            # Nothing is predicted across documents; the last target of a row stands behind it.
            fits = target == (NO_TARGET if following is None else following) or (
                following is None and last
            )
            if not fits:
                (ends if following == end else others).append((row, place))
    yield counted(
        "EOS is a target", "ends of documents that are not predicted", [row for row, _ in ends]
    )
    yield counted(
        "targets are next tokens", "targets that are not the next token", [row for row, _ in others]
    )


def judge_order(file: TokenFile, begin: int, end: int) -> Iterator[Finding]:
    """Two ranks see the rows of one; a state leads back to the same rows."""
    alone = make_batches(file, begin, end).next()
    ranks = [make_batches(file, begin, end, rank, 2).next().tokens for rank in range(2)]
    same = torch.equal(torch.cat(ranks), alone.tokens)
    yield counted("two ranks = one", "rows that differ", [] if same else [0])
    first, second = make_batches(file, begin, end), make_batches(file, begin, end)
    first.next()
    second.load_state(first.state)
    same = torch.equal(first.next().tokens, second.next().tokens)
    yield counted("data state", "rows that differ behind a state", [] if same else [0])


def counted(comparison: str, what: str, rows: list[int]) -> Finding:
    """A finding whose error is a count, with the first row it was seen in."""
    return Finding(
        comparison, what, float(len(rows)), 0.0, f"first in row {rows[0]}" if rows else ""
    )

"""The rows that a model is trained on are the documents of its files.

Every document begins with BOS and ends with EOS once, and every next token is a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from transom.data.batch import NO_TARGET
from transom.data.text.batches import TextBatches
from transom.data.text.shards import TokenFile, prepare
from transom.data.text.sources import SourceArgs
from transom.tokenizers.training import byte_tokenizer
from transom.verify.findings import Finding, exact
from transom.verify.tiny_runs import documents, temporary_corpus

SEQ_LEN, ROWS = 24, 4
BOS, EOS = 256, 257  # of the byte tokenizer

Piece = tuple[list[int], list[int]]  # tokens and targets of one document in a row


def check() -> Iterator[Finding]:
    """Compare one epoch of the built-in corpus with its documents; errors count wrong places."""
    with temporary_corpus() as folder:
        source = SourceArgs(path=str(folder / "corpus"))
        file = prepare(source, byte_tokenizer(), folder / "cache").train
        batches = _batches(file)
        rows: list[list[Piece]] = []
        for _ in range(batches.items_per_epoch // ROWS):
            batch = batches.next()
            for tokens, targets, sizes in zip(
                batch.tokens, batch.targets, batch.sizes, strict=True
            ):
                parts = (tokens.split(list(sizes)), targets.split(list(sizes)))
                rows.append([(a.tolist(), b.tolist()) for a, b in zip(*parts, strict=True)])
        yield from _compare_rows(rows)
        alone = _batches(file).next().tokens
        ranks = [_batches(file, rank, 2).next().tokens for rank in range(2)]
        yield exact("two ranks = one rank", "rows", not torch.equal(torch.cat(ranks), alone))
        resumed = _batches(file)
        first = _batches(file)
        first.next()
        resumed.load_state(first.state)
        same = torch.equal(first.next().tokens, resumed.next().tokens)
        yield exact("resumed data = uninterrupted", "rows", not same)


def _batches(file: TokenFile, rank: int = 0, world_size: int = 1) -> TextBatches:
    """Return the batches of one rank."""
    return TextBatches(
        [file],
        [1.0],
        bos_id=BOS,
        eos_id=EOS,
        vocab_size=EOS + 1,
        seq_len=SEQ_LEN,
        rows_per_step=ROWS,
        seed=0,
        rank=rank,
        world_size=world_size,
    )


def _compare_rows(rows: Sequence[Sequence[Piece]]) -> Iterator[Finding]:
    """Count the places at which rows and documents disagree."""
    framed = [[BOS, *text.encode(), EOS] for text in documents().values()]
    joined = ["".join(map(chr, ids)) for ids in framed]  # `in` then finds a run of ids
    wrong: dict[str, list[int]] = {
        "one BOS for each document": [],
        "rows consist of runs of documents": [],
        "EOS is a target": [],
        "targets are the next tokens": [],
    }
    inner, foreign, ends, others = wrong.values()
    for index, row in enumerate(rows):
        for at, (tokens, targets) in enumerate(row):
            run = "".join(map(chr, tokens))
            inner += [index] * (BOS in tokens[1:])
            foreign += [index] * (not any(run in document for document in joined))
            for target, following in zip(targets, [*tokens[1:], None], strict=True):
                # The target of the last token of a row comes after the row, and other documents
                # have no target after their last token.
                unknown = following is None and at == len(row) - 1
                if not unknown and target != (NO_TARGET if following is None else following):
                    (ends if following == EOS else others).append(index)
    for comparison, rows_of in wrong.items():
        yield exact(comparison, "built-in corpus", [f"in row {row}" for row in rows_of])

"""What a run learns from and is measured on: rows of text, or labelled lines where the model has a
head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transom.base.errors import notice, require
from transom.base.files import sha256_of
from transom.chat.template import ChatTemplate
from transom.config.layer_args import HeadArgs
from transom.config.model_args import ModelArgs
from transom.data.labelled import (
    EncodedText,
    LabelledBatches,
    encode_rows,
    label_names,
    read_labelled,
    split_held_out,
)
from transom.data.order import Batches
from transom.data.text.batches import TextBatches
from transom.data.text.shards import Corpus, TokenFile, prepare
from transom.data.text.sources import SourceArgs, require_whole
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.defaults import head_rows

# The name of a hash of all rows: it changes with a source, the chat template and the longest row.
TOKENS = "the tokens of the rows"
NOTHING_HELD_OUT = "nothing is held out: no score, and the last step is the best"


@dataclass(frozen=True)
class RunData:
    """Batches, held-out text by source or held-out lines, names of labels, and a hash of each
    source.

    `rows_per_step` is the batch size that the batches were built for. `template` writes
    conversations, where rows are some; `stop_tokens` end an answer.
    """

    batches: Batches
    hashes: Mapping[str, str]
    rows_per_step: int
    held_out: Mapping[str, TokenFile] = field(default_factory=dict)
    head_rows: Sequence[EncodedText] = ()
    labels: Sequence[str] | None = None
    template: ChatTemplate | None = None
    stop_tokens: Sequence[int] = ()


def open_data(
    args: TrainArgs,
    model_args: ModelArgs,
    tokenizer: Tokenizer,
    *,
    rank: int,
    world_size: int,
    quiet: bool,
) -> RunData:
    """The data of a run's config, tokenised; this rank's share of each batch.

    Documents begin with BOS where the tokenizer's makers put one (`adds_bos`), and end with EOS
    wherever there is one: the makers' tokenizers put none behind a prompt, but a packed document
    has to end.
    """
    if model_args.head is not None:
        return _labelled(args, model_args.head, tokenizer, rank, world_size, quiet)
    corpora, rows_per_step = open_corpora(args, tokenizer, quiet=quiet), args.data.rows_per_step
    batches = TextBatches(
        [corpus.train for corpus in corpora.values()],
        [source.weight for source in args.data.source_list],
        bos_id=tokenizer.bos_id if tokenizer.adds_bos else None,
        eos_id=tokenizer.eos_id,
        vocab_size=model_args.vocab_size,
        seq_len=args.data.seq_len,
        rows_per_step=rows_per_step,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
    )
    hashes = {name: corpus.sha256 for name, corpus in corpora.items()}
    held = {name: corpus.held_out for name, corpus in corpora.items() if len(corpus.held_out)}
    if not held and not quiet:
        notice(NOTHING_HELD_OUT)
    return RunData(batches, hashes, rows_per_step, held)


def _labelled(
    args: TrainArgs, head: HeadArgs, tokenizer: Tokenizer, rank: int, world_size: int, quiet: bool
) -> RunData:
    # Negatives are the other rows of a rank: cutting a step changes the loss.
    whole = head.kind == "classification" or world_size == 1
    require(whole, "ranks", world_size, "expected 1 with an embedding head")
    sources = args.data.source_list
    for source in sources:
        require_whole(source, "a model with a head")
    rows = [row for source in sources for row in read_labelled(source.path, head.kind)]
    labels = label_names(rows, head.num_labels) if head.kind == "classification" else None
    train, measured = split_held_out(rows, args.data.held_out)
    rows_per_step = head_rows(
        len(train), head.kind, args.data.batch_size, world_size * args.accumulate
    )
    if not quiet:
        notice(
            f"{len(train)} labelled lines to train on, {rows_per_step} in a step, "
            f"{len(measured)} held out"
        )
    batches = LabelledBatches(
        train,
        tokenizer,
        labels=labels,
        seq_len=args.data.seq_len,
        rows_per_step=rows_per_step,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
    )
    hashes = {source.label: sha256_of(Path(source.path)) for source in sources}
    held_rows = encode_rows(measured, tokenizer, labels, args.data.seq_len) if measured else []
    return RunData(batches, hashes, rows_per_step, head_rows=held_rows, labels=labels)


def open_corpora(args: TrainArgs, tokenizer: Tokenizer, *, quiet: bool) -> dict[str, Corpus]:
    """Token files of every source by name, with what was skipped said in one line each."""
    out: dict[str, Corpus] = {}
    for source in args.data.source_list:
        corpus = prepare(
            source,
            tokenizer,
            args.data.cache_dir,
            held_out_fraction=args.data.held_out,
            progress=not quiet,
        )
        out[source.label] = corpus
        if not quiet:
            notice(describe_corpus(source, corpus))
    return out


def describe_corpus(source: SourceArgs, corpus: Corpus) -> str:
    """One line: what was read, held out and left out."""
    kept, rest = corpus.train, corpus.held_out
    counts = corpus.report.counts()
    if corpus.unknown_tokens:
        counts.append(f"{corpus.unknown_tokens} places the vocabulary cannot write")
    more = "".join(f", {count}" for count in counts)
    return (
        f"{source.label}: {len(kept)} documents, {len(kept.tokens):,} tokens to train on; "
        f"{len(rest)} documents, {int(rest.bytes.sum()):,} bytes held out{more}"
    )

"""The data of a run: text, or labelled texts for a model with a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.base.errors import expect
from transom.base.files import sha256_of
from transom.chat.template import ChatTemplate
from transom.config.layer_args import HeadArgs
from transom.config.model_args import ModelArgs
from transom.data.labelled import (
    LabelledBatches,
    encode_rows,
    label_names,
    read_labelled,
    split_held_out,
)
from transom.data.order import Batches
from transom.data.text.batches import TextBatches
from transom.data.text.shards import Corpus, TokenFile
from transom.data.text.sources import SourceArgs, require_whole
from transom.data.text.token_folder import open_corpus
from transom.distributed.ranks import Ranks
from transom.planning.tables import counted
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.defaults import head_rows

# The name of a hash of all rows: it changes with a source, the chat template and the longest row.
TOKENS = "the tokens of the rows"
NOTHING_HELD_OUT = "nothing is held out: there is no score, and the last step counts as the best"


@dataclass(frozen=True)
class RunData:
    """The training batches of a run and its held-out items.

    Attributes:
        batches: This rank's share of the training batches.
        hashes: A hash of each source by its name.
        rows_per_step: The batch size, over all ranks, that `batches` were built with.
        held_out: Token files by source for text, and otherwise what `Objective.evaluate` scores.
        labels: Names of the labels of a classification.
        template: The template of conversations, if rows are written with one.
        stop_tokens: Ids that end an answer.
    """

    batches: Batches
    hashes: Mapping[str, str]
    rows_per_step: int
    held_out: Mapping[str, TokenFile] | Sequence[Any] = ()
    labels: Sequence[str] | None = None
    template: ChatTemplate | None = None
    stop_tokens: Sequence[int] = ()


def open_data(
    args: TrainArgs, model_args: ModelArgs, tokenizer: Tokenizer, ranks: Ranks
) -> RunData:
    """Tokenize the sources of a config.

    Documents begin with BOS if the tokenizer adds one (`adds_bos`), and end with EOS if there is
    one: tokenizers don't add it to a prompt, but a packed document has to end.

    Raises:
        RequestError: If a source is missing, unreadable or too small.
    """
    if model_args.head is not None:
        return _labelled(args, model_args.head, tokenizer, ranks)
    corpora: dict[str, Corpus] = {}
    for source in args.data.source_list:
        with ranks.notices_of_first():
            corpora[source.label] = open_corpus(
                source,
                tokenizer,
                args.data.cache_dir,
                held_out_fraction=args.data.held_out,
                progress=ranks.verbose,
            )
        ranks.say(_describe(source, corpora[source.label]))
    rows_per_step = args.data.rows_per_step
    batches = TextBatches(
        [corpus.train for corpus in corpora.values()],
        [source.weight for source in args.data.source_list],
        bos_id=tokenizer.bos_id if tokenizer.adds_bos else None,
        eos_id=tokenizer.eos_id,
        vocab_size=model_args.vocab_size,
        seq_len=args.data.seq_len,
        rows_per_step=rows_per_step,
        seed=args.seed,
        rank=ranks.row_rank,
        world_size=ranks.row_ranks,
    )
    hashes = {name: corpus.sha256 for name, corpus in corpora.items()}
    held_out = {name: one.held_out for name, one in corpora.items() if len(one.held_out)}
    ranks.say(None if held_out else NOTHING_HELD_OUT)
    return RunData(batches, hashes, rows_per_step, held_out)


def _labelled(args: TrainArgs, head: HeadArgs, tokenizer: Tokenizer, ranks: Ranks) -> RunData:
    # Negatives are the other rows of a rank: cutting a step changes the loss.
    divisible = head.kind == "classification" or ranks.row_ranks == 1
    expect(divisible, "ranks", ranks.row_ranks, "1 with an embedding head")
    sources = args.data.source_list
    for source in sources:
        require_whole(source, "a model with a head")
    rows = [row for source in sources for row in read_labelled(source.path, head.kind)]
    labels = label_names(rows, head.num_labels) if head.kind == "classification" else None
    train, held_out = split_held_out(rows, args.data.held_out)
    shares = ranks.row_ranks * args.accumulate
    rows_per_step = head_rows(len(train), head.kind, args.data.batch_size, shares)
    ranks.say(
        f"{len(train)} labelled lines to train on, {rows_per_step} in a step, "
        f"{len(held_out)} held out"
    )
    batches = LabelledBatches(
        train,
        tokenizer,
        labels=labels,
        seq_len=args.data.seq_len,
        rows_per_step=rows_per_step,
        seed=args.seed,
        rank=ranks.row_rank,
        world_size=ranks.row_ranks,
    )
    hashes = {source.label: sha256_of(Path(source.path)) for source in sources}
    scored = encode_rows(held_out, tokenizer, labels, args.data.seq_len) if held_out else []
    return RunData(batches, hashes, rows_per_step, scored, labels)


def _describe(source: SourceArgs, corpus: Corpus) -> str:
    """Return one line about what was read, held out and left out."""
    train, held_out = corpus.train, corpus.held_out
    counts = corpus.report.counts()
    if corpus.unknown_tokens:
        counts.append(f"{corpus.unknown_tokens} places the vocabulary cannot write")
    return ", ".join(
        (
            f"{source.label}: {counted(len(train), 'document')}, "
            f"{counted(int(train.offsets[-1]), 'token')} to train on; "
            f"{counted(len(held_out), 'document')}, "
            f"{counted(int(held_out.bytes.sum()), 'byte')} held out",
            *counts,
        )
    )

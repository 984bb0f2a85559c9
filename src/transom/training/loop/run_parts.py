"""What a run trains: a model with its tokenizer, data and objective, new or on top of one that is
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transom.base.errors import RequestError, notice, require
from transom.checkpoints.files.layout import Format, folder_format
from transom.checkpoints.files.location import find_model, read_pointer
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.state import meta_model
from transom.data.text.sources import held_out, read_split
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer, train_bpe, train_chars
from transom.training.config import TrainArgs
from transom.training.loop.checkpoint_writer import Companions, StepModel, WholeModel
from transom.training.loop.dtype_choice import DtypeChoice
from transom.training.loop.run_data import RunData, open_data
from transom.training.loop.run_folder import RunFolder
from transom.training.losses.objectives import HeadObjective, NextToken, Objective


class Share(NamedTuple):
    """A rank's part of the work, and whether it speaks."""

    rank: int = 0
    world_size: int = 1
    quiet: bool = False


@dataclass
class Subject:
    """All that is particular to one kind of run; `args` replaces the config where the data decides
    parts of it.
    """

    model: LLM
    tokenizer: Tokenizer
    data: RunData
    objective: Objective
    step_model: StepModel
    args: TrainArgs | None = None


def new_subject(
    args: TrainArgs, run: RunFolder, choice: DtypeChoice, share: Share, *, resume: bool
) -> Subject:
    """A model from nothing; its weights are drawn unless a checkpoint is going to fill them."""
    tokenizer = run_tokenizer(args, run, resume, progress=not share.quiet)
    model_args = args.model_args(tokenizer.vocab_size)
    data = open_data(args, model_args, tokenizer, **share._asdict())
    # Weights are drawn once, from the seed of the run.
    model = meta_model(model_args).to_empty(device=choice.ranks.device)
    if not resume or args.dry_run:  # a dry run of a resumed one reads no checkpoint
        model.init_weights(args.seed)
    lowered = objective(args, model, data, choice, share)
    return Subject(model, tokenizer, data, lowered, WholeModel(model, tokenizer, data.labels))


def continued_subject(args: TrainArgs, choice: DtypeChoice, share: Share) -> Subject:
    """A model that goes on reading text where it was left, with a new optimizer; saved in the
    format it had.
    """
    assert args.base is not None, "what the caller goes by"
    folder = whole_model(args.base)
    tokenizer = load_tokenizer(folder)
    model = load(folder, str(choice.ranks.device), "float32").train()
    args.check_model(model.args)
    data = open_data(args, model.args, tokenizer, **share._asdict())
    step_model = WholeModel(
        model, tokenizer, data.labels, Companions(folder, tokenizer, None), writable_format(folder)
    )
    lowered = objective(args, model, data, choice, share)
    return Subject(model, tokenizer, data, lowered, step_model)


def whole_model(base: str) -> Path:
    """The folder of a model to start from; one that is an adapter on another is a
    `RequestError`.
    """
    found = find_model(base)
    expected = "expected a whole model; `transom merge` makes one of a base and its adapter"
    require(found.adapter is None, "base", base, expected)
    return found.model


def writable_format(folder: Path) -> Format:
    """The format of a folder where a run's steps can be written in it: consolidated files have no
    room for more.
    """
    kind = folder_format(folder)
    return kind if kind in ("hf", "native") else "native"


def objective(
    args: TrainArgs, model: LLM, data: RunData, choice: DtypeChoice, share: Share
) -> Objective:
    """Return the objective, labels for a model with a head or the next token, and settle the dtype
    with it.
    """
    head = model.args.head
    out: Objective = NextToken(model, args.loss_chunk)
    if head is not None:
        out = HeadObjective(model, head, args.contrastive_temperature, data.head_rows)
    choice.limit(model.args)
    choice.settle(model, out, data.batches, data.rows_per_step // share.world_size, frozen=False)
    return out


def run_tokenizer(
    args: TrainArgs, run: RunFolder, resume: bool, progress: bool = False
) -> Tokenizer:
    """The run's tokenizer: its own when resuming, else as the config says, trained on training
    documents only.
    """
    if resume:
        step = read_pointer(run.path, "latest")
        assert step is not None, "RunFolder.check has refused a run without steps"
        return Tokenizer.load(step)
    kind = args.tokenizer.kind
    if kind == "file":
        assert args.tokenizer.path is not None, "TokenizerArgs checks it"
        return Tokenizer.load(args.tokenizer.path)
    if kind == "bytes":
        return byte_tokenizer()
    texts = (
        document.text
        for source in args.data.source_list
        for document in read_split(source, args.data.held_out)
        if kind == "chars" or not held_out(document.id, args.data.held_out)
    )
    if kind == "chars":
        return train_chars(texts)
    try:
        if progress:
            notice(
                f"tokenizer: {args.tokenizer.vocab_size:,} byte pairs are learnt from the "
                f"training documents"
            )
        return train_bpe(texts, args.tokenizer.vocab_size, progress=progress)
    except RequestError as error:
        field = "tokenizer." if str(error).startswith("vocab_size") else ""
        raise RequestError(f"{field}{error}") from None

"""What a run trains: a new model, or an existing one that reads on, with its data and objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transom.base.errors import RequestError, expect
from transom.checkpoints.files.layout import Format, folder_format
from transom.checkpoints.files.location import find_model, read_pointer
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.data.text.sources import held_out, read_split
from transom.distributed.loading import allocate, load_parts
from transom.distributed.parts import copy_full
from transom.distributed.ranks import Ranks
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer, train_bpe, train_chars
from transom.training.config import TrainArgs
from transom.training.loop.checkpoint_writer import AdapterWriter, Companions, ModelWriter
from transom.training.loop.dtype_choice import DtypeChoice
from transom.training.loop.run_data import RunData, open_data
from transom.training.loop.run_folder import RunFolder
from transom.training.losses.objectives import HeadObjective, NextToken, Objective


@dataclass
class RunParts:
    """Everything that one kind of run differs in from another.

    Attributes:
        model: The model, on its device, with its initial weights.
        tokenizer: Its tokenizer.
        data: The training batches and held-out items.
        objective: The loss.
        writer: Writes the model of each checkpoint.
        args: The config with values that follow from the data; None if none do.
    """

    model: LLM
    tokenizer: Tokenizer
    data: RunData
    objective: Objective
    writer: ModelWriter | AdapterWriter
    args: TrainArgs | None = None


def new_parts(args: TrainArgs, run: RunFolder, choice: DtypeChoice, *, resume: bool) -> RunParts:
    """Return the parts of a run that trains a new model.

    With `resume` the weights are left uninitialised, since a checkpoint is going to fill them.
    """
    ranks = choice.ranks
    tokenizer = _run_tokenizer(args, run, resume, ranks)
    model_args = args.model_args(tokenizer.vocab_size)
    data = open_data(args, model_args, tokenizer, ranks)
    model = allocate(model_args, ranks.meshes, ranks.device)
    if not resume or args.dry_run:  # the dry run of a resumed run precedes reading the checkpoint
        model.init_weights(args.seed, copy_full)
    writer = ModelWriter(model, tokenizer, data.labels)
    return RunParts(model, tokenizer, data, _objective(args, model, data, choice), writer)


def continued_parts(args: TrainArgs, choice: DtypeChoice) -> RunParts:
    """Return the parts of a run that trains `base` on more text, with a new optimizer.

    Checkpoints are written in the format of the base.
    """
    assert args.base is not None, "the caller checks it"
    folder = base_folder(args.base)
    tokenizer = load_tokenizer(folder)
    ranks = choice.ranks
    model = (
        load_parts(folder, ranks.meshes, ranks.device)
        if ranks.divided and ranks.meshes is not None
        else load(folder, str(ranks.device), "float32", keep_quantized=False)
    ).train()
    args.check_model(model.args)
    data = open_data(args, model.args, tokenizer, choice.ranks)
    companions = Companions(folder, tokenizer, None)
    writer = ModelWriter(model, tokenizer, data.labels, companions, writable_format(folder))
    return RunParts(model, tokenizer, data, _objective(args, model, data, choice), writer)


def base_folder(base: str) -> Path:
    """Return the folder of a model to start from.

    Raises:
        RequestError: If it is an adapter of another model.
    """
    found = find_model(base)
    expected = "a complete model; `transom merge` makes one of a base and its adapter"
    expect(found.adapter is None, "base", base, expected)
    return found.model


def writable_format(folder: Path) -> Format:
    """Return the format of a folder, or `native` if checkpoints cannot be written in it."""
    kind = folder_format(folder)
    return kind if kind in ("hf", "native") else "native"


def _objective(args: TrainArgs, model: LLM, data: RunData, choice: DtypeChoice) -> Objective:
    """Return the objective for text or labelled rows, and settle the dtype by timing it."""
    head = model.args.head
    objective: Objective = NextToken(model, args.loss_chunk)
    if head is not None:
        objective = HeadObjective(model, head, args.contrastive_temperature)
    items = data.rows_per_step // choice.ranks.row_ranks
    choice.settle(model, objective, data.batches, items, frozen=False)
    return objective


def _run_tokenizer(args: TrainArgs, run: RunFolder, resume: bool, ranks: Ranks) -> Tokenizer:
    """Return the tokenizer of the latest step, or else the one that the config describes.

    Byte pairs are learnt from training documents only.
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
    size = args.tokenizer.vocab_size
    ranks.say(f"tokenizer: {size:,} byte pairs are learnt from the training documents")
    try:
        return train_bpe(texts, size, progress=ranks.verbose)
    except RequestError as error:
        field = "tokenizer." if str(error).startswith("vocab_size") else ""
        raise RequestError(f"{field}{error}") from None

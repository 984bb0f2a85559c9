"""Fine-tuning: the weights of an existing model that train, their rows and their objective."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

from transom.base.errors import notice, require
from transom.base.fields import write
from transom.base.runtime import dtype_name
from transom.chat.template import ChatTemplate
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.read_args import read_args
from transom.lora.adapters import activate_adapters, active_adapters, adapter_names, remove_adapter
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.coverage import coverage_lines
from transom.lora.vocabulary import add_tokens
from transom.models.llm import LLM
from transom.quantize.leaves import quantize_model
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.defaults import RowChoice, few_steps_warning
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.data import open_finetune_data
from transom.training.finetune.objectives import finetune_objective
from transom.training.loop.checkpoint_writer import (
    ADAPTER,
    AdapterWriter,
    CheckpointWriter,
    Companions,
    ModelWriter,
)
from transom.training.loop.dtype_choice import DtypeChoice
from transom.training.loop.random_states import random_state, restore_random_state
from transom.training.loop.run_parts import RunParts, whole_model, writable_format
from transom.training.losses.noise import EmbeddingNoise
from transom.training.losses.objectives import NextToken


def finetune_parts(args: TrainArgs, finetune: FinetuneArgs, choice: DtypeChoice) -> RunParts:
    """Return the base with its trained weights, rows and objective; print a line about each
    role.
    """
    assert args.base is not None, "TrainArgs checks it"
    folder = whole_model(args.base)
    choice.limit(read_args(folder))
    model, tokenizer = finetune_model(folder, args, finetune, choice)
    base_fingerprint = fingerprint(folder)
    for line in coverage_lines(model):
        choice.ranks.say(line)
    template, finetune = dated(ChatTemplate.find(folder, tokenizer, finetune.template), finetune)
    data = open_finetune_data(
        args, finetune, tokenizer, template, folder, choice.ranks, base_fingerprint
    )
    base, args = base_name(args.base, folder), decided(args, finetune, data.choice)
    if choice.ranks.rank == 0:  # also with --quiet, since given values may have changed
        for line in filter(None, (data.choice.reason, few_steps_warning(args.steps))):
            notice(line)
    if choice.is_open:
        items, lora = data.choice.batch_size // choice.ranks.world_size, finetune.method == "lora"
        choice.settle(model, NextToken(model, args.loss_chunk), data.batches, items, frozen=lora)
        if lora:
            del model  # before there is another one
            model, tokenizer = finetune_model(folder, args, finetune, choice)
    companions = Companions(folder, tokenizer, data.template, new_tokens=bool(finetune.new_tokens))
    writer: CheckpointWriter = ModelWriter(
        model, tokenizer, None, companions, writable_format(folder)
    )
    if finetune.method == "lora":
        how = None if finetune.quantize is None else dict(write(finetune.quantize))
        check_written(model, base)
        writer = AdapterWriter(
            model, companions, base, base_fingerprint, dtype_name(choice.dtype), how
        )
    objective = finetune_objective(
        args, finetune, model, tokenizer, data, choice.dtype, choice.ranks
    )
    return RunParts(model.train(), tokenizer, data, objective, writer, args)


def finetune_model(
    folder: Path, args: TrainArgs, finetune: FinetuneArgs, choice: DtypeChoice
) -> tuple[LLM, Tokenizer]:
    """Return the base with its adapter or all its weights ready to train, and its tokenizer with
    new tokens.

    Frozen weights are in the dtype of the products, since autocast would cast them at every use.
    While the choice of that dtype is open, they are in float32. The random state does not change.
    """
    before = random_state(choice.ranks.device)
    wide = finetune.method == "full" or choice.is_open
    model = load(folder, str(choice.ranks.device), "float32" if wide else dtype_name(choice.dtype))
    expected = "valid only for fine-tuning is a language model without a head"
    require(model.args.head is None, "base", args.base, expected)
    args.check_model(model.args)
    tokenizer = add_tokens(
        model, load_tokenizer(folder), finetune.new_tokens, finetune.vocab_multiple
    )
    choose_weights(model, finetune, args.seed, new_tokens=bool(finetune.new_tokens))
    if finetune.noise:
        EmbeddingNoise(model, finetune.noise)
    restore_random_state(choice.ranks.device, before)
    return model, tokenizer


def dated(
    template: ChatTemplate | None, finetune: FinetuneArgs
) -> tuple[ChatTemplate | None, FinetuneArgs]:
    """Return the template and the arguments with a fixed date, so that a resumed run has the same
    rows.
    """
    if template is None or not template.reads_time:
        return template, finetune
    day = finetune.date or date.today().isoformat()
    return template.at(datetime.fromisoformat(day)), replace(finetune, date=day)


def decided(args: TrainArgs, finetune: FinetuneArgs, choice: RowChoice) -> TrainArgs:
    """Return the config with the steps, batch size, packing and epochs that follow from the
    rows.
    """
    packing = choice.packing if finetune.packing is None else finetune.packing
    data = replace(args.data, batch_size=choice.batch_size)
    return replace(
        args,
        data=data,
        finetune=replace(finetune, packing=packing, epochs=choice.epochs),
        steps=choice.steps,
    )


def choose_weights(model: LLM, finetune: FinetuneArgs, seed: int, *, new_tokens: bool) -> None:
    """Quantize, freeze, add the adapter: what trains is what requires a gradient afterwards."""
    if finetune.method == "full":
        model.requires_grad_(True)
        for name, weight in model.named_parameters():
            if name.endswith("choice_bias"):
                weight.requires_grad_(False)  # the balancing moves it
            elif ".router." in name and not finetune.trains_router:
                weight.requires_grad_(False)
        return
    if finetune.quantize is not None:
        quantize_model(model, finetune.quantize)
    apply_lora(model, lora_args(model, finetune, new_tokens), seed=seed, quiet=True)


def lora_args(model: LLM, finetune: FinetuneArgs, new_tokens: bool) -> LoraArgs:
    """The adapter asked for, with the modules that are trained whole beside it."""
    whole = list(finetune.lora.modules_to_save)
    if finetune.trains_router:
        require(
            model.args.moe_args is not None,
            "finetune.train_router",
            True,
            "valid only with a mixture of experts",
        )
        whole.append("router")
    if new_tokens:
        whole += ["tok_embeddings", *(["output"] if model.output is not None else [])]
    return LoraArgs.from_dict(
        {**dict(write(finetune.lora)), "modules_to_save": list(dict.fromkeys(whole))}
    )


def check_written(model: LLM, base: str) -> None:
    """Refuse an adapter that no file could hold now, and not when the first steps have been
    trained.

    It is written as the run writes it and read back beside itself; the model is afterwards as it
    was.
    """
    active, read = active_adapters(model), f"{ADAPTER}_read"
    with tempfile.TemporaryDirectory(prefix="transom-") as folder:
        save_adapter(model, folder, ADAPTER, base=base)
        activate_adapters(model, ())  # what is read is measured against the base
        try:
            load_adapter(model, folder, read)
        finally:
            if read in adapter_names(model):
                remove_adapter(model, read)
            activate_adapters(model, active)


def base_name(base: str, folder: Path) -> str:
    """What the adapter calls its base: a folder by its whole path, a hub id as it is."""
    return str(folder.resolve()) if Path(base).exists() else base

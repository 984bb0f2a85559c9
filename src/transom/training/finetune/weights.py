"""The parts of a fine-tuning run: the base with the weights that train, its data, its objective."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from transom.base.errors import expect, notice
from transom.base.fields import write
from transom.base.files import shown_name
from transom.base.runtime import dtype_name
from transom.chat.template import ChatTemplate
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import load, open_weights
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.read_args import read_args
from transom.distributed.loading import MakeModule, read_parts
from transom.lora.adapters import (
    Adapters,
    activate_adapters,
    active_adapters,
    adapter_names,
    remove_adapter,
)
from transom.lora.apply import apply_lora, initial_weights
from transom.lora.args import LoraArgs
from transom.lora.coverage import coverage_lines
from transom.lora.vocabulary import add_tokens, with_rows
from transom.lora.weights import LEAVES
from transom.models.llm import LLM
from transom.quantize.formats import dequantize
from transom.quantize.leaves import Quantized
from transom.quantize.methods import check_finite, quantize_model, rounded_parts
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.defaults import RowChoice, few_steps_warning
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.data import open_finetune_data
from transom.training.finetune.objectives import finetune_objective
from transom.training.loop.checkpoint_writer import (
    ADAPTER,
    AdapterWriter,
    Companions,
    ModelWriter,
)
from transom.training.loop.dtype_choice import DtypeChoice
from transom.training.loop.random_states import random_state, restore_random_state
from transom.training.loop.run_parts import RunParts, base_folder, writable_format
from transom.training.losses.noise import add_embedding_noise
from transom.training.losses.objectives import NextToken


def finetune_parts(args: TrainArgs, choice: DtypeChoice) -> RunParts:
    """Return the parts of a run that fine-tunes `args.base`, and print which weights train.

    Args:
        args: The config of the run.
        choice: The dtype of training, which is settled here if it is open.

    Raises:
        RequestError: The base, the data and the settings do not fit each other.
    """
    assert args.base is not None, "TrainArgs checks it"
    folder, ranks = base_folder(args.base), choice.ranks
    # An adapter names its base: a folder by its absolute path, or a hub id.
    base = shown_name(folder.resolve()) if Path(args.base).exists() else args.base
    choice.limit(read_args(folder))
    model, tokenizer, coverage = finetune_model(folder, args, choice, base)
    mark = ranks.on_first(lambda: fingerprint(folder))
    for line in coverage:
        ranks.say(line)
    template = ChatTemplate.find(folder, tokenizer, args.finetune_settings.template)
    template, args = dated(template, args)
    data = open_finetune_data(args, tokenizer, template, folder, ranks, mark)
    args = decided(args, data.choice)
    finetune = args.finetune_settings
    if ranks.rank == 0:  # also with --quiet, since given values may have changed
        for line in filter(None, (data.choice.reason, few_steps_warning(args.steps))):
            notice(line)
    lora = finetune.method == "lora"
    if choice.is_open:
        items, timed = data.choice.batch_size // ranks.row_ranks, NextToken(model, args.loss_chunk)
        choice.settle(model, timed, data.batches, items, frozen=lora)
        if lora:
            del model, timed  # before there is another model
            model, tokenizer, _ = finetune_model(folder, args, choice, base)
    companions = Companions(folder, tokenizer, data.template, new_tokens=bool(finetune.new_tokens))
    writer: ModelWriter | AdapterWriter
    if lora:
        quantize = None if finetune.quantize is None else dict(write(finetune.quantize))
        dtype = dtype_name(choice.dtype)
        writer = AdapterWriter(model, companions, base, mark, dtype, quantize)
    else:
        writer = ModelWriter(model, tokenizer, None, companions, writable_format(folder))
    objective = finetune_objective(args, model, tokenizer, data, choice.dtype, ranks)
    return RunParts(model.train(), tokenizer, data, objective, writer, args)


def finetune_model(
    folder: Path, args: TrainArgs, choice: DtypeChoice, base: str
) -> tuple[LLM, Tokenizer, list[str]]:
    """Return the base, ready to train with its adapter or all its weights, and its tokenizer.

    Frozen weights have the dtype of autocast, which would otherwise cast them at every use. They
    are in float32 while the choice of that dtype is open. The random state does not change.

    Returns:
        The model, of which ranks that divide it have their parts, its tokenizer, and the lines of
        the coverage report.
    """
    ranks, finetune = choice.ranks, args.finetune_settings
    before = random_state(ranks.device)
    wide = finetune.method == "full" or choice.is_open
    dtype, keep = "float32" if wide else dtype_name(choice.dtype), finetune.keep_quantized
    if finetune.method == "full" or finetune.quantize is not None:
        keep = False
    weights = None
    if ranks.divided:  # each weight is read when it is divided
        model, weights = open_weights(folder, dtype, keep_quantized=keep)
    else:
        model = load(folder, str(ranks.device), dtype, keep_quantized=keep)
    expected = "a language model without a head for fine-tuning"
    expect(model.args.head is None, "base", args.base, expected)
    args.check_model(model.args)
    words = finetune.new_tokens
    tokenizer = add_tokens(model, load_tokenizer(folder), words, finetune.vocab_multiple)
    choose_weights(model, finetune, args.seed, new_tokens=bool(words))
    if finetune.method == "lora":
        check_written(model, base)
    if finetune.noise:
        add_embedding_noise(model, finetune.noise)
    coverage = coverage_lines(model)
    if weights is not None and ranks.meshes is not None:
        changed = finetune.method == "lora" or words
        make = leaf_maker(finetune, args.seed, ranks.device) if changed else None
        read_parts(model, weights, ranks.meshes, ranks.device, shown_name(folder), make)
    restore_random_state(ranks.device, before)
    return model, tokenizer, coverage


def leaf_maker(finetune: FinetuneArgs, seed: int, device: torch.device) -> MakeModule:
    """Return what makes the parameters of a leaf from those of files, as `choose_weights` does.

    Args:
        finetune: The settings.
        seed: Seed of the adapter's weights.
        device: Where weights are quantized.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(path: str, module: nn.Module, read: dict[str, Tensor]) -> dict[str, Tensor]:
        made, adapters = dict(read), module._modules.get("lora")
        replaced = adapters.replaced if isinstance(adapters, Adapters) else {}
        if not isinstance(module, LEAVES):
            return with_replacements(made, replaced)
        if "weight" in read:
            own = module if isinstance(module, Quantized) else replaced.get("weight", module.weight)
            dtype = own.dtype
            weight = read["weight"].to(device if not read["weight"].is_meta else "meta", dtype)
            if isinstance(module, Quantized):
                assert finetune.quantize is not None, "else the files have the codes"
                check_finite(path, weight)
                del made["weight"]
                made |= rounded_parts(weight, module.format, finetune.quantize)
            else:
                made["weight"] = weight = with_rows(weight, len(module.weight))
        if replaced:
            return with_replacements(made, replaced)
        if isinstance(adapters, Adapters):
            if isinstance(module, Quantized):
                parts = {name: made[name] for name in module.part_names}
                weight = dequantize(parts, module.format).to(module.dtype)
            lora = initial_weights(module, finetune.lora, generator, weight)
            made |= {f"lora.{ADAPTER}.{key}": one for key, one in lora.named_parameters()}
        return made

    return make


def with_replacements(made: dict[str, Tensor], replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a module with those of its adapter, which begin as they are.

    Args:
        made: The parameters.
        replaced: Those that the adapter replaces, whose values are not read.
    """
    rounded = {key: made[key].to(own.dtype) for key, own in replaced.items()}
    return made | rounded | {f"lora.{ADAPTER}.{key}": one for key, one in rounded.items()}


def dated(template: ChatTemplate | None, args: TrainArgs) -> tuple[ChatTemplate | None, TrainArgs]:
    """Return the template and the config with a fixed day, if the template writes one.

    A resumed run then has the same rows.
    """
    if template is None or not template.reads_time:
        return template, args
    day = args.finetune_settings.date or date.today().isoformat()
    args = replace(args, finetune=replace(args.finetune_settings, date=day))
    return template.at(datetime.fromisoformat(day)), args


def decided(args: TrainArgs, choice: RowChoice) -> TrainArgs:
    """Return the config with the batch size, packing, epochs and steps of the rows."""
    finetune = args.finetune_settings
    packing = choice.packing if finetune.packing is None else finetune.packing
    finetune = replace(finetune, packing=packing, epochs=choice.epochs)
    data = replace(args.data, batch_size=choice.batch_size)
    return replace(args, data=data, finetune=finetune, steps=choice.steps)


def choose_weights(model: LLM, finetune: FinetuneArgs, seed: int, *, new_tokens: bool) -> None:
    """Set `requires_grad` of every weight, after quantizing the base and adding the adapter.

    Args:
        model: The base.
        finetune: The settings.
        seed: Seed of the adapter's weights.
        new_tokens: Whether tokens were added, so that an adapter trains all embeddings.

    Raises:
        RequestError: The adapter or the routers do not fit the model.
    """
    if finetune.method == "full":
        for name, weight in model.named_parameters():
            frozen = ".router." in name and not finetune.trains_router
            # Balancing moves the choice biases, not the gradient.
            weight.requires_grad_(not frozen and not name.endswith("choice_bias"))
        return
    if finetune.quantize is not None:
        quantize_model(model, finetune.quantize)
    modules = list(finetune.lora.modules_to_save)
    if finetune.trains_router:
        fits = model.args.moe_args is not None
        expect(fits, "finetune.train_router", True, "a mixture of experts")
        modules.append("router")
    if new_tokens:
        modules += ["tok_embeddings", *(["output"] if model.output is not None else [])]
    saved = {"modules_to_save": list(dict.fromkeys(modules))}
    lora = LoraArgs.from_dict({**dict(write(finetune.lora)), **saved})
    apply_lora(model, lora, seed=seed, quiet=True)


def check_written(model: LLM, base: str) -> None:
    """Raise `RequestError` now, and not after the first steps, if no file can hold the adapter.

    The adapter is written and read back as a second one. The model is afterwards as it was, and it
    may be on the meta device.
    """
    active, copy = active_adapters(model), f"{ADAPTER}_read"
    weights = None
    if model.device.type == "meta":
        named = model.named_parameters()
        weights = {
            name: LazyTensor.of(torch.zeros_like(one, device="cpu"))
            for name, one in named
            if one.requires_grad
        }
    with tempfile.TemporaryDirectory(prefix="transom-") as folder:
        save_adapter(model, folder, ADAPTER, base=base, weights=weights)
        activate_adapters(model, ())  # the files are read for the base alone
        try:
            load_adapter(model, folder, copy)
        finally:
            if copy in adapter_names(model):
                remove_adapter(model, copy)
            activate_adapters(model, active)

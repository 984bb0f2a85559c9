"""Which objective a fine-tuning run has, with the second model or the reference that some of them
need.
"""

from __future__ import annotations

import torch

from transom.base.runtime import dtype_name, evaluating
from transom.checkpoints.load import load, load_tokenizer
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.finetune.args import NEEDS_REFERENCE, TuneArgs
from transom.training.finetune.data import TuneData, held_batches
from transom.training.loop.ranks import Ranks
from transom.training.losses.distillation import Distillation, check_same_tokenizer
from transom.training.losses.objectives import NextToken, Objective
from transom.training.losses.preferences import Preference, precompute_reference
from transom.training.rl.policy import PolicyGradient


def tune_objective(
    args: TrainArgs,
    tune: TuneArgs,
    model: LLM,
    tokenizer: Tokenizer,
    data: TuneData,
    dtype: torch.dtype,
    ranks: Ranks,
    quiet: bool,
) -> Objective:
    """The objective that the config names."""
    chunk = args.loss_chunk
    if tune.objective == "sft":
        return NextToken(model, args.loss_chunk, data.held_out)
    if tune.objective == "grpo":
        return _policy(tune, model, tokenizer, data, dtype, ranks, quiet, chunk)
    if tune.objective == "distill":
        return _distillation(tune, model, tokenizer, data, dtype, chunk)
    return _preference(tune, model, data, dtype, ranks, chunk)


def _distillation(
    tune: TuneArgs,
    model: LLM,
    tokenizer: Tokenizer,
    data: TuneData,
    dtype: torch.dtype,
    chunk: int | None,
) -> Distillation:
    assert tune.teacher is not None, "TuneArgs checks it"
    check_same_tokenizer(tokenizer, load_tokenizer(tune.teacher))
    teacher = load(tune.teacher, str(_device(model)), dtype_name(dtype))
    return Distillation(
        model, teacher, tune.temperature, tune.alpha, tune.reverse, chunk, data.held_out
    )


def _policy(
    tune: TuneArgs,
    model: LLM,
    tokenizer: Tokenizer,
    data: TuneData,
    dtype: torch.dtype,
    ranks: Ranks,
    quiet: bool,
    chunk: int | None,
) -> PolicyGradient:
    assert data.reward is not None, "open_tune_data opens it"
    return PolicyGradient(
        model,
        tokenizer,
        data.reward,
        data.stop_tokens,
        tune.answer_tokens,
        tune.temperature,
        tune.strength,
        tune.scale_rewards,
        dtype=dtype,
        chunk=chunk,
        held_out=data.held_out,
        ranks=ranks,
        quiet=quiet,
    )


def _preference(
    tune: TuneArgs, model: LLM, data: TuneData, dtype: torch.dtype, ranks: Ranks, chunk: int | None
) -> Preference:
    reference = None
    if tune.method == "full" and tune.objective in NEEDS_REFERENCE and tune.objective != "kto":
        assert data.train is not None, "rows of pairs"
        kind = model.tok_embeddings.weight.device.type
        with evaluating(model), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            batches = (*held_batches(data.train), *data.held_out)
            reference = precompute_reference(model, batches, chunk)
    return Preference(
        model,
        kind=tune.objective,  # type: ignore[arg-type]  # what is left of the names
        beta=tune.strength,
        label_smoothing=tune.label_smoothing,
        desirable_weight=tune.desirable_weight,
        undesirable_weight=tune.undesirable_weight,
        chunk=chunk,
        reference=reference,
        held_out=data.held_out,
        ranks=ranks,
    )


def _device(model: LLM) -> torch.device:
    return model.tok_embeddings.weight.device

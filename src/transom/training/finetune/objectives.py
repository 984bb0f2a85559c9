"""Which objective a fine-tuning run has, with the second model or the reference that some of them
need.
"""

from __future__ import annotations

import torch

from transom.base.runtime import dtype_name, evaluating
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.data import FinetuneData, held_batches
from transom.training.loop.ranks import Ranks
from transom.training.losses.distillation import Distillation, check_same_tokenizer
from transom.training.losses.objectives import NextToken, Objective
from transom.training.losses.preferences import Preference, precompute_reference
from transom.training.rl.policy import PolicyGradient


def finetune_objective(
    args: TrainArgs,
    finetune: FinetuneArgs,
    model: LLM,
    tokenizer: Tokenizer,
    data: FinetuneData,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Objective:
    """The objective that the config names."""
    chunk = args.loss_chunk
    if finetune.objective == "sft":
        return NextToken(model, args.loss_chunk)
    if finetune.objective == "grpo":
        return _policy(finetune, model, tokenizer, data, dtype, ranks, chunk)
    if finetune.objective == "distill":
        return _distillation(finetune, model, tokenizer, data, dtype, chunk)
    return _preference(finetune, model, data, dtype, ranks, chunk)


def _distillation(
    finetune: FinetuneArgs,
    model: LLM,
    tokenizer: Tokenizer,
    data: FinetuneData,
    dtype: torch.dtype,
    chunk: int | None,
) -> Distillation:
    assert finetune.teacher is not None, "FinetuneArgs checks it"
    check_same_tokenizer(tokenizer, load_tokenizer(finetune.teacher))
    teacher = load(finetune.teacher, str(_device(model)), dtype_name(dtype))
    return Distillation(
        model, teacher, finetune.temperature, finetune.alpha, finetune.reverse, chunk
    )


def _policy(
    finetune: FinetuneArgs,
    model: LLM,
    tokenizer: Tokenizer,
    data: FinetuneData,
    dtype: torch.dtype,
    ranks: Ranks,
    chunk: int | None,
) -> PolicyGradient:
    assert data.reward is not None, "open_finetune_data opens it"
    return PolicyGradient(
        model,
        tokenizer,
        data.reward,
        data.stop_tokens,
        finetune.answer_tokens,
        finetune.temperature,
        finetune.strength,
        finetune.scale_rewards,
        dtype=dtype,
        chunk=chunk,
        ranks=ranks,
    )


def _preference(
    finetune: FinetuneArgs,
    model: LLM,
    data: FinetuneData,
    dtype: torch.dtype,
    ranks: Ranks,
    chunk: int | None,
) -> Preference:
    reference = None
    if finetune.method == "full" and finetune.objective in ("dpo", "ipo"):
        assert data.train is not None, "rows of pairs"
        kind = model.device.type
        with evaluating(model), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            batches = (*held_batches(data.train), *data.held_out)
            reference = precompute_reference(model, batches, chunk)
    return Preference(
        model,
        kind=finetune.objective,  # type: ignore[arg-type]  # what is left of the names
        beta=finetune.strength,
        label_smoothing=finetune.label_smoothing,
        desirable_weight=finetune.desirable_weight,
        undesirable_weight=finetune.undesirable_weight,
        chunk=chunk,
        reference=reference,
        ranks=ranks,
    )


def _device(model: LLM) -> torch.device:
    return model.device

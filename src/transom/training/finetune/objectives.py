"""The objective of a fine-tuning run, with the second model or the reference that it needs."""

from __future__ import annotations

from functools import partial

import torch

from transom.base.errors import RequestError, expect, notice
from transom.base.runtime import dtype_name, evaluating
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.read_args import read_args
from transom.checkpoints.state import meta_model
from transom.distributed.checkpoint import between_steps
from transom.distributed.loading import load_parts
from transom.distributed.pipeline import scored, stage_of
from transom.distributed.ranks import Ranks
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.config import TrainArgs
from transom.training.finetune.data import FinetuneData, held_batches
from transom.training.losses.distillation import Distillation
from transom.training.losses.objectives import NextToken, Objective
from transom.training.losses.preferences import Preference, precompute_reference
from transom.training.rl.policy import PolicyGradient


def finetune_objective(
    args: TrainArgs,
    model: LLM,
    tokenizer: Tokenizer,
    data: FinetuneData,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Objective:
    """Return the objective that a config names.

    Args:
        args: The config of the run.
        model: The model that is trained.
        tokenizer: Its tokenizer.
        data: The data of the run.
        dtype: The dtype of autocast.
        ranks: The ranks of the run.

    Raises:
        RequestError: The teacher cannot be opened, or has another tokenizer.
    """
    chunk, finetune = args.loss_chunk, args.finetune_settings
    if finetune.objective == "sft":
        return NextToken(model, chunk)
    if finetune.objective == "grpo":
        assert data.reward is not None, "open_finetune_data opens it"
        return PolicyGradient(
            model, tokenizer, data.reward, data.stop_tokens, finetune, dtype, chunk, ranks
        )
    if finetune.objective == "distill":
        assert finetune.teacher is not None, "FinetuneArgs checks it"
        tokenizer.check_same_tokens(load_tokenizer(finetune.teacher), "teacher")
        teacher = open_teacher(finetune.teacher, model, dtype, ranks)
        return Distillation(model, teacher, finetune, chunk, ranks)
    reference = None
    if finetune.method == "full" and finetune.objective in ("dpo", "ipo"):
        assert data.train is not None, "rows of pairs"
        kind, enabled = model.device.type, dtype != torch.float32
        with evaluating(model), torch.autocast(kind, dtype, enabled=enabled):
            batches = (*held_batches(data.train), *data.held_out)
            reference = scored(model, partial(precompute_reference, model, batches, chunk))
        between_steps(model)  # the optimizer takes the parts of the parameters
    return Preference(model, finetune, chunk, reference, ranks)


def open_teacher(name: str, model: LLM, dtype: torch.dtype, ranks: Ranks) -> LLM:
    """Return the teacher of a model, of which ranks that divide the model have their parts.

    In a pipeline only the last stage has one, on the meta device elsewhere. A teacher that cannot
    be divided is read by every rank, after a notice.

    Raises:
        RequestError: As for `load`.
    """
    location, stage, kind = find_model(name), stage_of(model), dtype_name(dtype)
    if stage is not None and not stage.last:
        return meta_model(read_args(location.model))
    if ranks.meshes is not None and ranks.divided:
        try:
            expect(location.adapter is None, "teacher", name, "merged weights and no adapter")
            return load_parts(
                location.model, ranks.meshes.of_stage(), ranks.device, kind, keep_quantized=None
            )
        except RequestError as error:
            notice(f"finetune.teacher: rank {ranks.rank} reads all of it, since {error}")
    return load(location, str(ranks.device), kind)

"""Divided models of which each rank allocates its parts only, and reads tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch

from transom.base.files import shown_name
from transom.checkpoints.files.checksums import verify_step
from transom.checkpoints.files.generation_config import stated_settings
from transom.checkpoints.load import count_nonfinite, warn_nonfinite
from transom.checkpoints.read_args import read_args
from transom.checkpoints.state import meta_model, open_parameters
from transom.config.model_args import ModelArgs
from transom.distributed.mesh import Meshes
from transom.distributed.parallelize import parallelize
from transom.distributed.parts import copy_full
from transom.models.llm import LLM


def allocate(args: ModelArgs, meshes: Meshes | None, device: torch.device) -> LLM:
    """Return a model with this rank's parts of its weights, which are not filled yet.

    Args:
        args: The model.
        meshes: The ranks; None for one rank, which has everything.
        device: The device of this rank.
    """
    model = meta_model(args)
    if meshes is not None:
        parallelize(model, meshes)
    return model.to_empty(device=device)


def load_parts(folder: Path, meshes: Meshes | None, device: torch.device) -> LLM:
    """Return a model in float32 with this rank's parts of its weights.

    Args:
        folder: A model folder of any format. Quantized weights are dequantized.
        meshes: The ranks; None for one rank.
        device: The device of this rank.

    Raises:
        RequestError: The files are damaged or do not fit the config.
    """
    verify_step(folder)
    args = read_args(folder)
    source, model = open_parameters(folder, args), allocate(args, meshes, device)
    counts = {}
    for name, weight in model.named_parameters():
        full = source[name].read()
        counts[name] = count_nonfinite(full)
        copy_full(weight, full.to(weight.dtype))
    warn_nonfinite(counts, shown_name(folder))
    model.generation_settings = stated_settings((folder,))
    return model

"""A step that leaves no trace: what tells before the first one whether the steps of a run fit into memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transom.training.config import TrainArgs
from transom.training.objectives import RunBatch

RANDOM = ("rng", "rng_cuda")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators by the names of `RANDOM`: the host's, and a GPU's where that is `device`."""
    state = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` returned; a run that has moved between CPU and GPU brings the host's only."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"], device)


def too_large(args: TrainArgs, micro: RunBatch, device: torch.device) -> str:
    """One sentence: a micro-batch does not fit, and what to change."""
    rows, length = micro.tokens.shape
    chunk = "automatic" if args.loss_chunk is None else args.loss_chunk
    return (
        f"a micro-batch of {rows} x {length} tokens does not fit into the memory of {device}; accepted is a "
        f"smaller data.batch_size (now {args.data.rows_per_step}), more accumulate (now {args.accumulate}), "
        f"activation_checkpoint = full (now {args.activation_checkpoint}) or a smaller loss_chunk (now {chunk})"
    )

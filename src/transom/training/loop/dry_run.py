"""A trial step that shows whether the run fits into memory, and the random states that it leaves
unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transom.base.runtime import mixed_seed
from transom.data.batch import Batch
from transom.training.config import TrainArgs
from transom.training.loop.ranks import Ranks

RANDOM = ("rng", "rng_cuda")  # in a checkpoint, with ".N" for rank N above 0


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators by the names of `RANDOM`: the host's, and a GPU's where that
    is `device`.
    """
    state = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` returned; a run that has moved between CPU and GPU brings the
    host's only.
    """
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"], device)


def random_states(ranks: Ranks) -> dict[str, Tensor]:
    """Return the `random_state` of every rank by its name in a checkpoint."""
    out: dict[str, Tensor] = {}
    for name, state in random_state(ranks.device).items():
        out.update({_name(name, rank): one for rank, one in enumerate(ranks.each(state))})
    return out


def take_random_states(ranks: Ranks, tensors: dict[str, Tensor], seed: int, step: int) -> None:
    """Remove what `random_states` returned from `tensors`, and put this rank's state back.

    A rank that the checkpoint has no state of, since the run had fewer ranks, draws new numbers.
    """
    found = {name: tensors.pop(name) for name in list(tensors) if name.partition(".")[0] in RANDOM}
    own = {name: found[key] for name in RANDOM if (key := _name(name, ranks.rank)) in found}
    if own:
        restore_random_state(ranks.device, own)
    else:
        draw_apart(ranks, seed, step)


def draw_apart(ranks: Ranks, seed: int, step: int = 0) -> None:
    """Give every rank but the first its own random numbers for dropout and noise. All draw the
    weights before.
    """
    if ranks.rank:
        torch.manual_seed(mixed_seed(seed, ranks.rank, step))


def _name(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def too_large(args: TrainArgs, micro: Batch, device: torch.device) -> str:
    """One sentence: a micro-batch does not fit, and what to change."""
    rows, length = micro.tokens.shape
    chunk = "automatic" if args.loss_chunk is None else args.loss_chunk
    return (
        f"a micro-batch of {rows} x {length} tokens does not fit into the memory of {device}; "
        f"expected a smaller data.batch_size (now {args.data.rows_per_step}), more accumulate (now "
        f"{args.accumulate}), "
        f"activation_checkpoint = full (now {args.activation_checkpoint}) or a smaller "
        f"loss_chunk (now {chunk})"
    )

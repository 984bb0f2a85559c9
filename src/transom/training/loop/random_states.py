"""States of torch's random generators: taken, restored, and stored for each rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transom.base.runtime import mixed_seed
from transom.distributed.ranks import Ranks

# Names in a checkpoint of the generators of the host and the GPU, with `.N` for rank N above 0.
RANDOM = ("rng", "rng_cuda")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the host's generator and, on a GPU, of that of `device`."""
    state = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned; a state from a CPU leaves a GPU's generator alone."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"], device)


def random_states(ranks: Ranks) -> dict[str, Tensor]:
    """Return the states of all ranks by their names in a checkpoint. Call it on every rank."""
    return {
        _name(name, rank): one
        for rank, state in enumerate(ranks.each(random_state(ranks.device)))
        for name, one in state.items()
    }


def take_random_states(ranks: Ranks, tensors: dict[str, Tensor], seed: int, step: int) -> None:
    """Remove the states of all ranks from `tensors`, and restore that of this rank.

    A rank without a stored state draws new numbers: the run had fewer ranks.
    """
    stored = {name: tensors.pop(name) for name in list(tensors) if name.partition(".")[0] in RANDOM}
    own = {name: stored[key] for name in RANDOM if (key := _name(name, ranks.rank)) in stored}
    if own:
        restore_random_state(ranks.device, own)
    else:
        seed_apart(ranks, seed, step)


def seed_apart(ranks: Ranks, seed: int, step: int = 0) -> None:
    """Give every share of a batch but the first its own random numbers for dropout and noise.

    Tensor ranks compute the same rows, with the same numbers.

    Call it after the weights are initialised, which all ranks do alike.
    """
    if ranks.token_rank:
        torch.manual_seed(mixed_seed(seed, ranks.token_rank, step))


def _name(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name

"""The place of this process among the ranks of a run, as torchrun describes it. No torch."""

from __future__ import annotations

import os
import uuid

RESTARTS = "TRANSOM_RESTARTS"  # set by `distributed.launch.launch`, also to 0
_chosen: list[int] = []  # this process, if it prints the error of all ranks


def world_size() -> int:
    """Return the number of ranks."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Return the index of this process among the ranks."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the index of this process among the ranks of its machine, which is that of its GPU."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1) if world_size() > 1 else 1


def _number(name: str, default: int) -> int:
    """Return a number from the environment. `distributed.launch.joined` refuses other text."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def restarts() -> int:
    """Return how often all ranks were started again after one of them had ended."""
    return int(os.environ.get(RESTARTS) or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def launch_id() -> str:
    """Return what identifies the launch that this process belongs to, also after restarts."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # `none` is torchrun's name for no name
    return uuid.uuid4().hex if given == "none" else given


def prints() -> bool:
    """Return whether this process prints notices and errors: the first rank of each machine does.

    A rank that `choose_to_print` has chosen prints an error that it alone has.
    """
    return local_rank() == 0 or bool(_chosen)


def choose_to_print() -> None:
    """Let this process print, whatever its rank."""
    _chosen.append(rank())

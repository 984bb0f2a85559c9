"""Communication between the ranks of a run: gradients, scores, and work that only rank 0 does.

Nothing else in `training` knows how ranks communicate. With one rank each method returns at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from transom.base.errors import RequestError, WorkError, notice

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """The ranks that train one model, and the place of this process among them.

    All ranks must call each method in the same order, except `say`, `verbose` and `share`.

    Args:
        rank: Index of this process, from 0.
        world_size: Number of ranks.
        device: Device of this rank's model.
        mesh: The ranks that communicate. None stands for the default process group.
        quiet: Whether no rank prints what the run does.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None
    quiet: bool = False

    @property
    def verbose(self) -> bool:
        """Whether this process prints what the run does: rank 0, unless the run is quiet."""
        return self.rank == 0 and not self.quiet

    def say(self, message: str | None) -> None:
        """Print a notice if there is a message and this process is `verbose`."""
        if message and self.verbose:
            notice(message)

    def sum(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return the items that this rank scores: every `world_size`-th one."""
        return items[self.rank :: self.world_size]

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        found = torch.tensor(number, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return int(found)

    def first(self, value: T) -> T:
        """Return the value of rank 0."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def on_first(self, call: Callable[[], None]) -> None:
        """Run `call` on rank 0 while the other ranks wait. If it fails, every rank fails.

        Raises:
            RequestError or WorkError: On the other ranks, with the message of rank 0, which raises
                the exception of `call` itself.
        """
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                call()
            except BaseException as error:
                failure = error
        failed = self.first(failure and (isinstance(failure, RequestError), str(failure)))
        if failure is not None:
            raise failure
        if failed:
            raise (RequestError if failed[0] else WorkError)(f"rank 0: {failed[1]}")

    def each(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group()


ALONE = Ranks()

"""What the ranks of a run tell each other; alone, nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Ranks:
    """`world_size` ranks of `mesh` (absent: the default group); every call must be made by all of
    them.
    """

    world_size: int
    mesh: DeviceMesh | None
    device: torch.device
    rank: int = 0

    def sum(self, tensor: Tensor | None) -> None:
        """Replace `tensor`, where there is one, by its sum over ranks."""
        if self.world_size > 1 and tensor is not None:
            dist.all_reduce(tensor, group=self._group)

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def first(self, number: int) -> int:
        """Return the number of rank 0."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.broadcast(tensor, group=self._group, group_src=0)
        return int(tensor)

    def each(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which have one shape and dtype, in the order of the
        ranks.
        """
        if self.world_size == 1:
            return [tensor]
        here = tensor.to(self.device)
        out = [torch.empty_like(here) for _ in range(self.world_size)]
        dist.all_gather(out, here, group=self._group)
        return [one.to(tensor.device) for one in out]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self._group)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group()

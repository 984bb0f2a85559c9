"""Matrices that ranks have in parts: gathered to one owner, changed there, and sent back.

Shape letters: N matrices, O out (rows), I in (columns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Region = tuple[slice, ...]


class MatrixPart(NamedTuple):
    """This rank's part of one matrix.

    Attributes:
        local: The part, which is empty if this rank has none.
        regions: The rows and columns that each rank of the group has.
    """

    local: Tensor
    regions: Sequence[Region]


def regions(parameter: DTensor, ranks: Sequence[int]) -> list[Region]:
    """Return which part of a parameter each of `ranks` has, one slice per dimension."""
    mesh, found = parameter.device_mesh, []
    for rank in ranks:
        (places,) = (mesh.mesh == rank).nonzero().tolist()
        region = [slice(0, size) for size in parameter.shape]
        # The last dimensions of a mesh divide first: FSDP divides what tensor ranks have.
        divided = zip(places, mesh.shape, parameter.placements, strict=True)
        for place, size, how in reversed(list(divided)):
            if how.is_replicate():
                continue
            dim: int = how.dim
            start, stop = region[dim].start, region[dim].stop
            each = -(-(stop - start) // size)
            start = min(start + place * each, stop)
            region[dim] = slice(start, min(start + each, stop))
        found.append(tuple(region))
    return found


def parts_of(tensor: Tensor, where: Sequence[Region], rank: int) -> list[MatrixPart]:
    """Return this rank's part of every matrix of a parameter.

    Args:
        tensor: This rank's part of the parameter [O, I] or [N, O, I].
        where: The `regions` of the parameter.
        rank: Index of this rank in them.
    """
    if tensor.ndim == 2:
        return [MatrixPart(tensor, where)]
    nothing, found = slice(0, 0), []
    first = where[rank][0].start
    for matrix in range(max(region[0].stop for region in where)):
        have = [region[0].start <= matrix < region[0].stop for region in where]
        local = tensor[matrix - first] if have[rank] else tensor.new_empty(0, 0)
        rows = [
            region[1:] if there else (nothing, nothing)
            for there, region in zip(have, where, strict=True)
        ]
        found.append(MatrixPart(local, rows))
    return found


class MatrixExchange:
    """Changes matrices as a whole, each on one rank, though every rank has a part of them.

    All ranks of the group must make the same calls. Each rank owns as many matrices as any other,
    over several calls too.

    Args:
        group: The ranks that have all parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, group.rank()
        self.ranks = dist.get_process_group_ranks(group)
        self._first = 0  # the owner of the first matrices of the next call

    def change(
        self, parts: Sequence[MatrixPart], shape: Sequence[int], change: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Return this rank's parts of changed matrices.

        Args:
            parts: This rank's parts.
            shape: The shape [O, I] of every matrix.
            change: Returns new matrices [N, O, I] for those of one owner.
        """
        count = len(self.ranks)
        each = -(-len(parts) // count)
        blocks = [parts[at * each : (at + 1) * each] for at in range(count)]
        owned = [blocks[(rank - self._first) % count] for rank in range(count)]
        self._first = (self._first + -(-len(parts) // each)) % count
        mine = owned[self.rank]
        sent = [sum(part.local.numel() for part in block) for block in owned]
        whole_NOI = parts[0].local.new_empty(len(mine), *shape)

        def pieces(whole_NOI: Tensor) -> list[list[Tensor]]:
            return [
                [one[part.regions[rank]] for part, one in zip(mine, whole_NOI, strict=True)]
                for rank in range(count)
            ]

        into = pieces(whole_NOI)
        received = [sum(piece.numel() for piece in some) for some in into]
        out = torch.cat([part.local.flatten() for block in owned for part in block])
        flat = out.new_empty(sum(received))
        dist.all_to_all_single(flat, out, received, sent, group=self.group)
        _fill([piece for some in into for piece in some], flat)
        changed = pieces(change(whole_NOI) if mine else whole_NOI)
        flat = torch.cat([piece.flatten() for some in changed for piece in some] or [out[:0]])
        dist.all_to_all_single(out, flat, sent, received, group=self.group)
        made = {id(part): torch.empty_like(part.local) for part in parts}
        _fill([made[id(part)] for block in owned for part in block], out)
        return [made[id(part)] for part in parts]


def _fill(pieces: Sequence[Tensor], flat: Tensor) -> None:
    """Copy consecutive numbers into the pieces, one after the other."""
    for piece, values in zip(pieces, flat.split([p.numel() for p in pieces]), strict=True):
        piece.copy_(values.view_as(piece))

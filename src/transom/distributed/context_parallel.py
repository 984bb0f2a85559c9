"""Context parallelism: the tokens of each row divided over ranks.

Each rank computes its own queries. Keys, values, positions and documents of all tokens are
gathered, so that every mask rule and every attention backend works; gradients of keys and values
are added up and scattered (Llama 3, arXiv 2407.21783, section 3.3.2). Jobs that `ring_attention`
can do go there instead if the config says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from transom.attention.backends import Attend
from transom.attention.mask import MaskSpec, place_documents
from transom.attention.view import CacheView, ScoreArgs
from transom.data.batch import NO_TARGET, Batch
from transom.distributed.ring_attention import ring


@dataclass(frozen=True)
class ContextAttend:
    """Attention of this rank's tokens of rows that were cut by `cut_rows` to those of all ranks.

    Attributes:
        attend: The attention backend.
        mesh: The ranks that share a row.
        ring: Whether to use ring attention for the jobs that it can do. A notice names the others.
    """

    attend: Attend
    mesh: DeviceMesh
    ring: bool = False

    def __call__(
        self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /
    ) -> Tensor:
        if self.ring:
            out_BTNH = ring(q_BTNH, view, spec, score, self.mesh.get_group())
            if out_BTNH is not None:
                return out_BTNH
        made: dict[int, Tensor] = {}  # keys and values may be one tensor
        for state in view.states:
            if id(state) not in made:
                made[id(state)] = self._gather(state)
        if "context" not in spec.tables:
            segments_BS = None if view.segments_BS is None else self._gather(view.segments_BS)
            spec.tables["context"] = self._gather(view.positions_BS), segments_BS
        positions_BS, segments_BS = spec.tables["context"]
        states = tuple(made[id(state)] for state in view.states)
        return self.attend(q_BTNH, CacheView(states, positions_BS, segments_BS), spec, score)

    def _gather(self, state: Tensor) -> Tensor:
        """Return the states [B, S, ...] of all ranks, one rank after the other."""
        made = DTensor.from_local(state, self.mesh, [Shard(1)], run_check=False)
        return made.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def cut_rows(batch: Batch, rank: int, ranks: int) -> Batch:
    """Return the tokens of a batch that one of `ranks` ranks computes.

    Every row is padded to a multiple of 2 x ranks, and cut into as many pieces. A rank takes one
    piece from the front and one from the back, since later tokens attend to more keys.

    Args:
        batch: A micro-batch.
        rank: The rank.
        ranks: Number of ranks that share a row.
    """
    rows, count = batch.tokens.shape
    positions, segments = places(batch)
    piece = -(-count // (2 * ranks))
    chosen = torch.cat(
        [torch.arange(at * piece, (at + 1) * piece) for at in (rank, 2 * ranks - 1 - rank)]
    )

    def cut(tensor: Tensor, padding: int | float) -> Tensor:
        more = tensor.new_full((rows, 2 * ranks * piece - count), padding)
        return torch.cat((tensor, more), 1)[:, chosen.to(tensor.device)]

    return replace(
        batch,
        tokens=cut(batch.tokens, 0),
        targets=cut(batch.targets, NO_TARGET),
        weights=None if batch.weights is None else cut(batch.weights, 0.0),
        lengths=None,
        sizes=None,
        positions=cut(positions, -1),
        segments=None if segments is None else cut(segments, -1),
    )


def places(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the positions [B, T] of a batch's tokens, -1 for padding, and their documents."""
    inputs, device = batch.inputs(), batch.tokens.device
    rows, count = batch.tokens.shape
    if inputs.sizes is None:
        positions_BT = torch.arange(count, device=device).expand(rows, -1)
        if batch.lengths is not None:
            positions_BT = positions_BT.masked_fill(positions_BT >= batch.lengths[:, None], -1)
        return positions_BT, None
    sizes = [[one] if isinstance(one, int) else list(one) for one in inputs.sizes]
    return place_documents(sizes, device)

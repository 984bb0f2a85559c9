"""Expert parallelism: each rank has some of the experts, and tokens travel to theirs and back.

The dispatcher of a mixture of experts is replaced (GShard, arXiv 2006.16668); the ranks that divide
the experts have different rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from transom.distributed.parts import divide_parameters, show_parts
from transom.layers.linear import has_data
from transom.layers.moe import Handle, LocalDispatcher, MoE
from transom.models.llm import LLM


class ExchangeHandle(NamedTuple):
    """What `combine` needs to undo `dispatch`.

    Attributes:
        order_R: int64 [R], the order by expert of the rows that this rank has received.
        sent: Number of rows that went to each rank.
        received: Number of rows that came from each rank.
        rows: Number of rows of this rank before those without an expert were left out.
        inner: The handle of the dispatcher of this rank.
    """

    order_R: Tensor
    sent: list[int]
    received: list[int]
    rows: int
    inner: Handle


class ExchangeDispatcher(LocalDispatcher):
    """Sends rows to the ranks of their experts, and brings the outputs back."""

    def __init__(self, num_experts: int, mesh: DeviceMesh) -> None:
        super().__init__(num_experts)
        self.group, self.ranks = mesh.get_group(), mesh.size()

    def dispatch(  # type: ignore[override]  # another handle
        self, x_TD: Tensor, ids_TA: Tensor, scale_TA: Tensor | None = None, *, may_drop: bool = True
    ) -> tuple[Tensor, Tensor, ExchangeHandle]:
        """Sort tokens by expert, and exchange them; see `LocalDispatcher.dispatch`.

        Returns:
            The rows of all ranks for the experts of this rank, sorted by expert, the end of each of
            these experts' rows [E / ranks], and the handle for `combine`.
        """
        rows_RD, ends_E, inner = super().dispatch(x_TD, ids_TA, scale_TA, may_drop=may_drop)
        sent, received, counts_PE = self._exchange_counts(ends_E, len(rows_RD))
        total = len(rows_RD)
        rows_RD = self._exchange(rows_RD[: sum(sent)], received, sent)
        # Rows come sorted by rank, then by expert.
        ids_R = torch.arange(counts_PE.size(1), device=rows_RD.device).repeat(self.ranks)
        ids_R = ids_R.repeat_interleave(counts_PE.flatten(), output_size=len(rows_RD))
        order_R = ids_R.argsort(stable=True)
        handle = ExchangeHandle(order_R, sent, received, total, inner)
        return rows_RD.index_select(0, order_R), counts_PE.sum(0).cumsum(0), handle

    def combine(  # type: ignore[override]  # another handle
        self, rows_RD: Tensor, handle: ExchangeHandle, weights_TA: Tensor | None = None
    ) -> Tensor:
        """Bring the outputs back, and return their sums; see `LocalDispatcher.combine`."""
        rows_RD = rows_RD.index_select(0, handle.order_R.argsort())
        rows_RD = self._exchange(rows_RD, handle.sent, handle.received)
        missing = handle.rows - len(rows_RD)
        if missing:
            rows_RD = torch.cat((rows_RD, rows_RD.new_zeros(missing, rows_RD.size(1))))
        return super().combine(rows_RD, handle.inner, weights_TA)

    def _exchange_counts(self, ends_E: Tensor, rows: int) -> tuple[list[int], list[int], Tensor]:
        """Return how many rows go to each rank, come from each, and come from each per expert.

        Rows without numbers go to all experts alike.
        """
        if not has_data(ends_E):
            with unset_fake_temporarily():
                each = rows // self.num_experts
                counts_PE = torch.full((self.ranks, self.num_experts // self.ranks), each)
                even = counts_PE.sum(1).tolist()
                return even, even, counts_PE
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        counts_PE = torch.empty_like(counts_E).view(self.ranks, -1)
        dist.all_to_all_single(counts_PE.flatten(), counts_E.contiguous(), group=self.group)
        sent = counts_E.view(self.ranks, -1).sum(1).tolist()
        return sent, counts_PE.sum(1).tolist(), counts_PE

    def _exchange(self, rows_RD: Tensor, received: list[int], sent: list[int]) -> Tensor:
        made: Tensor = _Exchange.apply(rows_RD, received, sent, self.group)
        return made


class _Exchange(torch.autograd.Function):
    """Rows sent to other ranks in exchange for theirs; gradients take the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        made = rows_RD.new_empty(sum(received), *rows_RD.shape[1:])
        dist.all_to_all_single(made, rows_RD.contiguous(), received, sent, group=group)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradients[0], ctx.sent, ctx.received, ctx.group), None, None, None


def divide_experts(model: LLM, mesh: DeviceMesh) -> None:
    """Give each rank of `mesh` its share of the experts of every layer.

    Args:
        model: The model, possibly on the meta device. It is changed in place.
        mesh: A mesh of one dimension.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = ExchangeDispatcher(module.moe.num_experts, mesh)
            for leaf in module.experts.children():
                divide_parameters(leaf, mesh, lambda name, parameter: Shard(0))
                show_parts(leaf, lambda name, parameter: parameter.to_local())

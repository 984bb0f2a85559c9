"""Silent bugs of training on several ranks. The registry is `bugs.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.mutations.planting import Call, changed, changed_everywhere
from transom.data.batch import Batch
from transom.distributed import tensor_parallel
from transom.distributed.context_parallel import cut_rows
from transom.distributed.expert_parallel import ExchangeDispatcher, ExchangeHandle
from transom.distributed.matrices import MatrixExchange
from transom.distributed.pipeline import Stage
from transom.distributed.ranks import Ranks
from transom.distributed.vocabulary import divided_log_softmax


def mean_of_means() -> AbstractContextManager[None]:
    """Each rank divides its loss by its own number of targets."""

    def make(original: Call) -> Call:
        def sum_rows(self: Ranks, tensor: Tensor) -> None:
            original(self, tensor)
            tensor.div_(self.row_ranks)  # equal to the sum only if all ranks have as many

        return sum_rows

    return changed(Ranks, "sum", make)


def norm_of_one_rank() -> AbstractContextManager[None]:
    """The gradient norm counts the shards of one rank only."""

    def make(original: Call) -> Call:
        def clip(self: Ranks, *given: Any) -> Tensor:
            reduced, dist.all_reduce = dist.all_reduce, lambda *_, **__: None
            try:
                return original(self, *given)
            finally:
                dist.all_reduce = reduced

        return clip

    return changed(Ranks, "clip", make)


def positions_from_zero() -> AbstractContextManager[None]:
    """Every context rank counts the positions of its tokens from 0."""

    def make(original: Call) -> Call:
        def cut(batch: Batch, rank: int, ranks: int) -> Batch:
            made = original(batch, rank, ranks)
            positions = torch.arange(made.tokens.size(1)).expand_as(made.tokens)
            return replace(made, positions=positions)

        return cut

    return changed_everywhere(cut_rows, make)


def pieces_swapped() -> AbstractContextManager[None]:
    """A context rank has its later piece of a row first, which ring attention does not expect."""

    def make(original: Call) -> Call:
        def cut(batch: Batch, rank: int, ranks: int) -> Batch:
            return original(batch, rank, ranks)._changed(lambda one: one.roll(one.size(1) // 2, 1))

        return cut

    return changed_everywhere(cut_rows, make)


def unsorted_return() -> AbstractContextManager[None]:
    """Outputs of experts are sent back in the order of the experts instead of the ranks."""

    def make(original: Call) -> Call:
        def combine(
            self: ExchangeDispatcher, rows: Tensor, handle: ExchangeHandle, weights: Any = None
        ) -> Tensor:
            order = torch.arange(len(handle.order_R))
            return original(self, rows, handle._replace(order_R=order), weights)

        return combine

    return changed(ExchangeDispatcher, "combine", make)


def own_gradients_of_norms() -> AbstractContextManager[None]:
    """Tensor ranks do not add up their gradients of norms."""

    def make(original: Call) -> Call:
        def show(module: nn.Module, region: Any, *, inside: bool) -> None:
            original(module, replace(region, scattered=False), inside=False)

        return show

    return changed(tensor_parallel, "_show_parts", make)


def softmax_of_own_rows() -> AbstractContextManager[None]:
    """Each tensor rank takes the softmax over its own rows of the vocabulary."""

    def make(original: Call) -> Call:
        def log_softmax(
            logits: Tensor, target: Tensor, share: Tensor, group: Any
        ) -> tuple[Tensor, Tensor]:
            log = logits.log_softmax(1)
            return log, -log.gather(1, target) * share

        return log_softmax

    return changed_everywhere(divided_log_softmax, make)


def parts_orthogonalised() -> AbstractContextManager[None]:
    """Muon orthogonalises the part of a matrix that each rank has."""

    def make(original: Call) -> Call:
        def change(self: Any, parts: Any, shape: Any, turn: Call) -> list[Tensor]:
            return [turn(part.local.unsqueeze(0)).squeeze(0) for part in parts]

        return change

    return changed(MatrixExchange, "change", make)


def own_gradients_of_embeddings() -> AbstractContextManager[None]:
    """The first and last stage do not add up their gradients of shared embeddings."""
    return changed(Stage, "sum_shared", lambda original: lambda self: None)

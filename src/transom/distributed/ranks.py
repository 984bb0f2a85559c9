"""Communication between the ranks of a run: gradients, scores, and work that only rank 0 does.

Nothing in `training` knows how ranks communicate. With one rank each method returns at once.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from transom.base.errors import RequestError, WorkError, notice
from transom.base.runtime import replaced
from transom.data.batch import Batch
from transom.distributed.context_parallel import ContextAttend, cut_rows
from transom.distributed.mesh import Meshes
from transom.models.llm import LLM

T = TypeVar("T")
CPU = torch.device("cpu")
BUCKET = 1 << 23  # numbers of gradients that one call sums


@dataclass(frozen=True)
class Ranks:
    """The ranks that train one model, and the place of this process among them.

    All ranks must call each method in the same order, except `say`, `verbose`, `share`, `cut` and
    `notices_of_first`.

    Args:
        rank: Index of this process, from 0.
        world_size: Number of ranks.
        device: Device of this rank's model.
        meshes: How the ranks share the model and its rows. None if every rank has the model and
            rows of its own.
        quiet: Whether no rank prints what the run does.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    meshes: Meshes | None = None
    quiet: bool = False

    @property
    def verbose(self) -> bool:
        """Whether this process prints what the run does: rank 0, unless the run is quiet."""
        return self.rank == 0 and not self.quiet

    def say(self, message: str | None) -> None:
        """Print a notice if there is a message and this process is `verbose`."""
        if message and self.verbose:
            notice(message)

    @contextlib.contextmanager
    def notices_of_first(self) -> Iterator[None]:
        """Print the notices of the block on rank 0 only, for work that every rank does alike."""
        silent = contextlib.redirect_stderr(io.StringIO())
        with silent if self.rank else contextlib.nullcontext():
            yield

    @property
    def divided(self) -> bool:
        """Whether no rank has all weights, so that all ranks must call the model together."""
        return self.meshes is not None and self.meshes.args.divides_model

    @property
    def row_ranks(self) -> int:
        """Number of shares of a batch; ranks of one tensor or context group have the same."""
        return self.world_size if self.meshes is None else self.meshes.size("rows")

    @property
    def row_rank(self) -> int:
        """Index of this rank's share of a batch."""
        return self.rank if self.meshes is None else self.meshes.index("rows")

    @property
    def token_rank(self) -> int:
        """Index of this rank's share of the tokens of a batch."""
        return self.rank if self.meshes is None else self.meshes.index("tokens")

    @property
    def divides_rows(self) -> bool:
        """Whether other ranks have tokens of the same rows."""
        return self.meshes is not None and self.meshes.args.context > 1

    def sum(self, tensor: Tensor) -> None:
        """Replace a count or a sum over this rank's rows by that over all rows of the step."""
        self._reduce(tensor, "rows")

    def sum_parts(self, tensor: Tensor) -> None:
        """Replace a sum over this rank's tokens and layers by that over all tokens and layers."""
        self._reduce(tensor, "parts")

    def over_tokens(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks that have tokens of the same rows."""
        total = tensor.clone()
        self._reduce(total, "context")
        return total

    def cut(self, micro: Batch) -> Batch:
        """Return the tokens of a micro-batch that this rank computes."""
        if self.meshes is None or not self.divides_rows:
            return micro
        return cut_rows(micro, self.meshes.index("context"), self.meshes.args.context)

    @contextlib.contextmanager
    def gathering(self, model: LLM) -> Iterator[None]:
        """Let attention see the tokens of all ranks, in calls of `cut` rows."""
        if self.meshes is None or not self.divides_rows:
            yield
            return
        context, ring = self.meshes.groups["context"], self.meshes.args.context_ring
        attend = ContextAttend(model.attend, context, ring)
        with replaced(model, "attend", attend):
            yield

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its sum over the ranks that computed a part of it.

        FSDP2 has done so in the backward pass. Gradients of a model that is only replicated are
        summed here, many in one call.
        """
        if self.world_size == 1:
            return
        plain: list[Tensor] = []
        for parameter in parameters:
            grad = parameter.grad
            if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
                parameter.grad = grad.redistribute(placements=parameter.placements)
            elif grad is not None:
                plain.append(grad)
        while plain:
            size = 0
            bucket: list[Tensor] = []
            while plain and (not bucket or size + plain[-1].numel() <= BUCKET):
                bucket.append(plain.pop())
                size += bucket[-1].numel()
            flat = torch.cat([grad.flatten() for grad in bucket])
            self._reduce(flat, "tokens")
            for grad, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(total.view_as(grad))

    @torch.no_grad()
    def clip(
        self, parameters: Sequence[Tensor], limit: float | None, repeated: Tensor | None = None
    ) -> Tensor:
        """Clip the summed gradients of a divided model to a global norm.

        The norm spans all ranks and all meshes. Each number counts once, however many ranks have
        it.

        Args:
            parameters: The parameters.
            limit: The largest norm; None clips nothing.
            repeated: One of the parameters, if another stage of a pipeline counts it.

        Returns:
            The norm before clipping, as a scalar.
        """
        assert self.meshes is not None, "the model is divided"
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        grads = [one.grad for one in parameters if one.grad is not None]
        for grad in (one.grad for one in parameters if one is not repeated):
            if grad is None:
                continue
            local, copies = grad, self.world_size // self.meshes.args.pipeline
            if isinstance(grad, DTensor):
                local = grad.to_local()
                copies //= math.prod(
                    grad.device_mesh.size(dim)
                    for dim, place in enumerate(grad.placements)
                    if not place.is_replicate()
                )
            total += torch.linalg.vector_norm(local).double().square() / copies
        dist.all_reduce(total)
        norm = total.sqrt()
        if limit is not None:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local.mul_(factor.to(local.dtype))
        return norm

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return the items that this rank scores; see `gathered`."""
        return items if self.divided else items[self.rank :: self.world_size]

    def gathered(self, value: T) -> list[T]:
        """Return the values of `share` that add up to those of all items.

        Ranks that call the model together score all items alike.
        """
        return [value] if self.divided else self.each(value)

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.world_size == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def first(self, value: T) -> T:
        """Return the value of rank 0."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_first(self, call: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `call` on rank 0 while the others wait, and return its value; see `together`."""
        return cast(T, self.together(lambda: call() if self.rank == 0 else None, group)[0])

    def together(self, call: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Run `call` on every rank, and return its values. If it fails on one, every rank fails.

        Args:
            call: A function that does not communicate.
            group: A process group of all ranks; None is the default group.

        Raises:
            RequestError or WorkError: On ranks where `call` did not fail, with the message of the
                first rank where it did. Other ranks raise the exception of `call` itself.
        """
        failure: BaseException | None = None
        made: list[T] = []
        try:
            made = [call()]
        except BaseException as error:
            failure = error
        report = failure and (isinstance(failure, RequestError), str(failure))
        results = self.each((made, report), group)
        if failure is not None:
            raise failure
        for rank, (_, found) in enumerate(results):
            if found:
                raise (RequestError if found[0] else WorkError)(f"rank {rank}: {found[1]}")
        return [one for values, _ in results for one in values]

    def each(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return the values of all ranks, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group)
        return values

    def each_share(self, value: T) -> list[T]:
        """Return a value of each share of a batch, in the order of the rows."""
        values = dict(self.each((self.row_rank, value)))
        return [values[rank] for rank in range(self.row_ranks)]

    def pooled(self, items: Sequence[T]) -> tuple[list[T], slice]:
        """Return the items of all ranks that call the model together, and where this rank's are.

        Every rank has equally many.
        """
        group = 1 if self.meshes is None else self.row_ranks // self.meshes.args.replicate
        place = self.row_rank % group
        shares = self.each_share(items)[self.row_rank - place :][:group]
        own = slice(place * len(items), (place + 1) * len(items))
        return [item for share in shares for item in share], own

    def _reduce(self, tensor: Tensor, name: str) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor, group=None if self.meshes is None else self.meshes.group(name))


ALONE = Ranks()

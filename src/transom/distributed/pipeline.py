"""Pipeline parallelism: consecutive layers on groups of ranks, and micro-batches that run through.

torch.distributed.pipelining says which micro-batch runs next (1F1B: Narayanan et al. 2021, arXiv
2104.04473; GPipe: Huang et al. 2019, arXiv 1811.06965), and sends hidden states and gradients. The
model stays one model: on each rank it lacks the layers of other ranks, and its embeddings come from
the stage before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from transom.base.errors import expect
from transom.cache.model_cache import ModelCache
from transom.config.model_args import ModelArgs
from transom.data.batch import Batch
from transom.distributed.parts import local_part
from transom.layers.initial import Copy, init_weights
from transom.layers.inputs import TransformerInput
from transom.layers.moe import RouterStatistics
from transom.layers.step import Step
from transom.models.llm import LLM
from transom.planning.counts import layer_flops_per_token, output_flops_per_token

T = TypeVar("T")
# What a stage computes for a micro-batch: hidden states, and the loss of its layers.
Compute = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Stage:
    """The part of a pipeline on this rank.

    Calls of the model without gradients return the same hidden states and logits on all stages,
    except in `scored`.

    Attributes:
        model: The model, with the layers of this stage.
        mesh: The ranks of all stages, in order.
        layers: The indices of its layers.
        dtype: Dtype of hidden states between layers.
        whole: All weights of the model on the meta device, by name.
    """

    model: LLM
    mesh: DeviceMesh
    layers: range
    dtype: torch.dtype
    whole: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.index, self.count = self.mesh.get_local_rank(), self.mesh.size()
        self.first, self.last = self.index == 0, self.index == self.count - 1
        self._group = self.mesh.get_group()
        self._schedule: Any = None
        self._made_for: tuple[int, ...] = ()
        self._compute: Callable[..., Tensor] | None = None  # while the schedule runs
        self._received_BTD: Tensor | None = None
        self._waits = True  # for the results of the last stage

    def run(self, micro_batches: Sequence[Batch], compute: Compute) -> None:
        """Run micro-batches forward and backward through all stages.

        Args:
            micro_batches: The micro-batches of a step, the same ones on all stages.
            compute: Calls the model. The loss of the step is the sum of what it returns on all
                stages.
        """
        count, dim = len(micro_batches), self.model.args.dim
        shapes = [micro.tokens.shape for micro in micro_batches]
        rows, tokens = (max(sizes) for sizes in zip(*shapes, strict=True))
        if self._made_for != (count, rows, tokens):
            self._schedule = self._make_schedule(count, (rows, tokens, dim))
            self._made_for = (count, rows, tokens)

        def call(*received: Tensor, place: Tensor) -> Tensor:
            micro = micro_batches[int(place)]
            height, width = micro.tokens.shape
            self._received_BTD = received[0][:height, :width] if received else None
            h_BTD, loss = compute(micro)
            if self.last:
                return loss
            # All hidden states that travel have the shape of the largest.
            h_BTD = F.pad(h_BTD.to(self.dtype), (0, 0, 0, tokens - width, 0, rows - height))
            return _with_loss(h_BTD.contiguous(), loss)

        self._compute = call
        places = torch.arange(count)
        try:
            self._schedule.step(place=places, target=places, return_outputs=False)
        except RuntimeError as error:  # torch wraps errors of the model
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise
        finally:
            self._compute = self._received_BTD = None

    def _make_schedule(self, count: int, shape: Sequence[int]) -> Any:
        # The import takes seconds, and only pipelines need it.
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        hidden = torch.empty(*shape, dtype=self.dtype, device="meta", requires_grad=True)
        stage = PipelineStage(
            _Caller(self),
            self.index,
            self.count,
            self.model.device,
            input_args=() if self.first else (hidden,),
            output_args=(hidden.sum() if self.last else hidden,),
            group=self._group,
        )
        # With fewer micro-batches than stages both are the same, and torch has no 1F1B.
        kind = ScheduleGPipe if count < self.count else Schedule1F1B
        return kind(stage, count, loss_fn=lambda loss, _: loss, scale_grads=False)

    def call(self, *received: Tensor, place: Tensor) -> Tensor:
        """Compute the micro-batch of a place from the hidden states that the stage received."""
        assert self._compute is not None, "called by the schedule of `run`"
        return self._compute(*received, place=place)

    def embed(self, inputs: TransformerInput) -> Tensor:
        """Return the hidden states [B, T, D] of the stage before, in place of embeddings."""
        if self._received_BTD is not None:
            return self._received_BTD
        assert not torch.is_grad_enabled(), "gradients are computed in `run`"
        shape = (*inputs.tokens.shape, self.model.args.dim)
        h_BTD = torch.empty(shape, dtype=self.dtype, device=inputs.tokens.device)
        dist.recv(h_BTD, group=self._group, group_src=self.index - 1)
        return h_BTD

    def run_layers(
        self, h_BTD: Tensor, step: Step, cache: ModelCache | None
    ) -> tuple[Tensor, tuple[RouterStatistics, ...]]:
        """Compute the layers of this stage; see `LLM.run_layers`.

        Outside of `run`, the result is that of the last stage, with the statistics of this one.
        """
        running = self._compute is not None
        assert running == torch.is_grad_enabled(), "gradients are computed in `run`, and no others"
        h_BTD, router = LLM.run_layers(self.model, h_BTD, step, cache)
        if running:
            return h_BTD, router
        h_BTD = h_BTD.to(self.dtype).contiguous()
        if not self.last:
            dist.send(h_BTD, group=self._group, group_dst=self.index + 1)
        return self._from_last(h_BTD), router

    def project(self, h_D: Tensor) -> Tensor:
        """Return the logits [..., V] of the last stage; see `LLM.project`."""
        if self._compute is not None:
            return LLM.project(self.model, h_D)
        wide, shape = torch.promote_types(h_D.dtype, torch.float32), h_D.shape[:-1]
        if self.last:
            return self._from_last(LLM.project(self.model, h_D).to(wide).contiguous())
        return self._from_last(h_D.new_zeros(*shape, self.model.args.vocab_size, dtype=wide))

    def _from_last(self, tensor: Tensor) -> Tensor:
        if self._waits:
            dist.broadcast(tensor, group=self._group, group_src=self.count - 1)
        return tensor

    def scored(self, work: Callable[[], T]) -> T:
        """Return what `work` returns on the last stage.

        Its calls of the model run through all stages at once: none but the last stage waits for
        hidden states after all layers or for logits, and the others go on with numbers that have
        no meaning. Which calls `work` makes must therefore not depend on them.
        """
        self._waits = False
        try:
            found = work()
        finally:
            self._waits = True
        return self.joined(found)[-1]

    def init_weights(self, seed: int = 0, copy: Copy = Tensor.copy_) -> None:
        """Draw the weights of this stage as those of the whole model; see `LLM.init_weights`."""
        own, args = dict(self.model.named_parameters()), self.model.args
        weights = {name: own.get(name, absent) for name, absent in self.whole.items()}
        plus_one, tied = args.norm == "rms_plus_one", args.tie_embeddings
        init_weights(weights, seed, plus_one=plus_one, tied=tied, copy=copy)

    @property
    def mixtures(self) -> slice:
        """Which of the model's layers with experts this stage has."""
        layers = self.model.args.layers
        before, here = (
            sum(layers[index].moe is not None for index in part)
            for part in (range(self.layers.start), self.layers)
        )
        return slice(before, before + here)

    @property
    def mixture_share(self) -> float:
        """The share of the model's layers with experts that this stage has."""
        mine = self.mixtures
        return (mine.stop - mine.start) / sum(one.moe is not None for one in self.model.args.layers)

    def joined(self, values: T) -> list[T]:
        """Return the values of all stages, in order."""
        stages = [values] * self.count
        dist.all_gather_object(stages, values, group=self._group)
        return stages

    def join_sums(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums of all stages on the first one, and zeros of their shapes on the others.

        Scalars are added up. Others have a row per layer, and follow each other.
        """
        rows: dict[str, list[Tensor]] = {}
        for stage in self.joined({name: value.cpu() for name, value in sums.items()}):
            for name, value in stage.items():
                rows.setdefault(name, []).append(value)
        totals = {
            name: (torch.cat(some) if some[0].ndim else torch.stack(some).sum(0))
            for name, some in rows.items()
        }
        kept = {name: one if self.first else torch.zeros_like(one) for name, one in totals.items()}
        return {name: one.to(self.model.device) for name, one in kept.items()}

    @torch.no_grad()
    def sum_shared(self) -> Tensor | None:
        """Add up the gradients of tied embeddings, which the first and the last stage have.

        Returns:
            The embeddings on the last stage, if they have a gradient: the first one counts them.
        """
        tied = self.model.args.tie_embeddings and (self.first or self.last)
        weight = self.model.tok_embeddings.weight if tied else None
        if weight is None or weight.grad is None:
            return None
        mine, peer = local_part(weight.grad), 0 if self.last else self.count - 1
        theirs = torch.empty_like(mine)
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, group=self._group, group_peer=peer),
                dist.P2POp(dist.irecv, theirs, group=self._group, group_peer=peer),
            ]
        ):
            work.wait()
        mine.add_(theirs)
        return weight if self.last else None


class _Caller(nn.Module):
    """What torch's schedule calls. It hides the model, whose gradients torch would handle."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.forward = stage.call


class _WithLoss(torch.autograd.Function):
    """Hidden states whose backward pass also computes the gradients of a loss."""

    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return h_BTD.view_as(h_BTD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.one


def _with_loss(h_BTD: Tensor, loss: Tensor) -> Tensor:
    made: Tensor = _WithLoss.apply(h_BTD, loss)
    return made


def stage_layers(args: ModelArgs, count: int) -> list[range]:
    """Return the layers of each of `count` stages, so that the slowest stage is as fast as can be.

    A stage takes as long as the FLOPs of its layers. Those of the output count for the last layer.
    """
    costs = [layer_flops_per_token(layer, args.max_seq_len) for layer in args.layers]
    costs[-1] += output_flops_per_token(args)
    sums = list(accumulate(costs, initial=0.0))
    # For each number of layers: the FLOPs of the slowest stage, and where stages end.
    plans: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(count):
        plans = {
            end: min(
                (max(most, sums[end] - sums[start]), (*ends, end))
                for start, (most, ends) in plans.items()
                if start < end
            )
            for end in range(stage + 1, len(costs) + 1)
        }
    ends = plans[len(costs)][1]
    return [range(start, end) for start, end in pairwise(ends)]


def divide_layers(model: LLM, mesh: DeviceMesh) -> None:
    """Leave a model the layers of this rank's stage; names of parameters stay.

    The first stage has the embeddings, and the last one the final norm and the output. With tied
    embeddings both have the matrix.

    Args:
        model: The model, possibly on the meta device. It is changed in place.
        mesh: The ranks of all stages, a mesh of one dimension.

    Raises:
        RequestError: If the balancing loss of its experts is no sum over layers.
    """
    moe = model.args.moe_args
    pooled = moe is not None and (moe.balance, moe.balance_scope) == ("mixtral", "batch")
    expected = "sequence in a pipeline, since the loss of batch pools all layers"
    expect(not pooled, "moe_args.balance_scope", "batch", expected)
    layers = stage_layers(model.args, mesh.size())[mesh.get_local_rank()]
    whole = {name: torch.empty_like(one, device="meta") for name, one in model.named_parameters()}
    stage = Stage(model, mesh, layers, model.dtype, whole)
    for index in set(range(model.args.n_layers)) - set(layers):
        delattr(model.layers, str(index))
    names = ("run_layers", "project", "init_weights")
    overrides: dict[str, Any] = {name: getattr(stage, name) for name in names}
    if not stage.first:
        overrides["embed"] = stage.embed
        if not (stage.last and model.args.tie_embeddings):
            absent = nn.Identity()
            vars(absent)["dtype"] = stage.dtype
            model.tok_embeddings = absent  # type: ignore[assignment]  # never called
    if not stage.last:
        model.norm = nn.Identity()  # type: ignore[assignment]
        if model.output is not None:
            model.output = nn.Identity()  # type: ignore[assignment]  # never called
    vars(model).update(overrides, stage=stage)


def stage_of(model: nn.Module) -> Stage | None:
    """Return the stage that a model is divided into; None if it has all layers."""
    return vars(model).get("stage")


def scored(model: nn.Module, work: Callable[[], T]) -> T:
    """Call `work`, which scores with a model, and return its result; see `Stage.scored`."""
    stage = stage_of(model)
    return work() if stage is None else stage.scored(work)

"""Tensor parallelism: every matrix and the vocabulary divided over ranks with the same rows.

Weights are DTensors, so that FSDP and checkpoints know their shape. Modules compute with this
rank's part of each weight as a plain tensor: a hook shows the parts while a module runs. Between
the modules, hidden states are divided along the sequence (Korthikanti et al. 2022, arXiv
2205.05198), if their number of tokens allows it. Inside attention and feed-forward, each rank has
all tokens and some heads or hidden features (Shoeybi et al. 2019, arXiv 1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from transom.distributed.parts import PartsShown, divide_parameters, show_parts
from transom.distributed.placement import BY_INPUT, check_leaves, placement
from transom.layers.moe import MoE
from transom.models.llm import LLM


@dataclass
class TensorRegion:
    """The state of tensor parallelism in one model.

    Attributes:
        mesh: The ranks, in one dimension.
        scattered: Whether hidden states between modules are divided along the sequence in the
            present call.
    """

    mesh: DeviceMesh
    scattered: bool = False

    @property
    def between(self) -> Placement:
        """How hidden states [B, T, D] between modules are placed."""
        return Shard(1) if self.scattered else Replicate()

    def start(self, h_BTD: Tensor) -> Tensor:
        """Return the hidden states of a call as they are placed between modules."""
        self.scattered = h_BTD.size(1) % self.mesh.size() == 0
        return self._move(h_BTD, Replicate(), self.between)

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Return all tokens of hidden states, for products with divided weights."""
        return self._move(x_BTD, self.between, Replicate(), Partial())

    def leave(self, y_BTD: Tensor) -> Tensor:
        """Return the sum of the ranks' outputs, as it is placed between modules."""
        return self._move(y_BTD, Partial(), self.between)

    def finish(self, h_BTD: Tensor) -> Tensor:
        """Return all tokens of the last hidden states, whose gradient every rank computes."""
        # A copy: FSDP2 warns of views, because an operation in place would lose its hooks.
        return self._move(h_BTD, self.between, Replicate()).clone()

    def add(self, rows: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors on every rank."""
        return self._move(rows, Partial(), Replicate())

    def copy(self, h: Tensor) -> Tensor:
        """Return `h`, which all ranks have, so that the gradients of their uses add up."""
        return self._move(h, Replicate(), Replicate(), Partial())

    def join(self, part_V: Tensor, size: int) -> Tensor:
        """Return the ranks' parts [..., V / ranks] next to each other, `size` in all."""
        shape = (*part_V.shape[:-1], size)
        stride = torch.empty(shape, device="meta").stride()
        places = [Shard(part_V.ndim - 1)]
        made = DTensor.from_local(
            part_V, self.mesh, places, run_check=False, shape=torch.Size(shape), stride=stride
        )
        return made.redistribute(placements=[Replicate()]).to_local()

    def _move(
        self, x: Tensor, before: Placement, after: Placement, gradient: Placement | None = None
    ) -> Tensor:
        made = DTensor.from_local(x, self.mesh, [before], run_check=False)
        return made.redistribute(placements=[after]).to_local(grad_placements=[gradient or after])


def divide_tensors(model: LLM, mesh: DeviceMesh) -> None:
    """Divide the weights of a model over the ranks of `mesh`, and let it compute with its parts.

    Args:
        model: The model, possibly on the meta device. It is changed in place.
        mesh: A mesh of one dimension.

    Raises:
        RequestError: See `placement.check_leaves`. The model is then unchanged.
    """
    check_leaves(model, mesh.size())
    region = TensorRegion(mesh)
    divide_parameters(model, mesh, placement)
    _divide_vocabulary(model, region)
    first = next(iter(model.layers))
    first.register_forward_pre_hook(lambda _, inputs: (region.start(inputs[0]), *inputs[1:]))
    for block in model.layers:
        for name, child in block.named_children():
            if name in ("attention", "feed_forward"):
                _divide(child, region)
            else:
                _show_parts(child, region, inside=False)
    _show_parts(model.norm, region, inside=False)
    model.norm.register_forward_hook(lambda _, inputs, h_BTD: region.finish(h_BTD))


def _divide(module: nn.Module, region: TensorRegion) -> None:
    """Let attention or a feed-forward compute with its parts; the ranks' outputs add up."""

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (region.enter(inputs[0]), *inputs[1:])

    def leave(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(module, MoE):
            return region.leave(output)
        y_BTD, statistics = output
        # Every rank computes the losses of the router, and their gradients are added up.
        share = statistics.logits_TE / region.mesh.size()
        logits_TE = share + (statistics.logits_TE - share).detach()
        return region.leave(y_BTD), replace(statistics, logits_TE=logits_TE)

    _show_parts(module, region, inside=True)
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _show_parts(module: nn.Module, region: TensorRegion, *, inside: bool) -> PartsShown:
    """Show this rank's part of every parameter below a module while the module runs.

    Args:
        module: The module.
        region: The state of tensor parallelism.
        inside: Whether the outputs of the ranks add up, so that gradients of replicated parameters
            do, too.
    """

    def part(name: str, parameter: DTensor) -> Tensor:
        whole = parameter.placements[0].is_replicate()
        summed = whole and (inside or region.scattered)
        made = parameter.to_local(grad_placements=[Partial()] if summed else parameter.placements)
        # Outputs of the ranks add up, and a bias is added once.
        once = inside and whole and name.endswith(tuple(f"{leaf}.bias" for leaf in BY_INPUT))
        return made * 0.0 if once and region.mesh.get_local_rank() else made

    return show_parts(module, part)


def _divide_vocabulary(model: LLM, region: TensorRegion) -> None:
    """Let embeddings and output compute with this rank's rows of the vocabulary."""
    leaf, size = model.tok_embeddings, model.args.vocab_size
    each = -(-size // region.mesh.size())  # as DTensor divides
    first = each * region.mesh.get_local_rank()
    shown = _show_parts(leaf, region, inside=True)

    here: list[Tensor] = []  # which ids of the present call are rows of this rank

    def find(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        here[:] = [(inputs[0] >= first) & (inputs[0] < first + each)]
        return (torch.where(here[0], inputs[0] - first, 0),)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        return region.add(rows.masked_fill(~here[0].unsqueeze(-1), 0.0))

    def project(h: Tensor) -> Tensor:
        with shown():
            return region.join(type(leaf).project(leaf, region.copy(h)), size)

    leaf.register_forward_pre_hook(find)
    leaf.register_forward_hook(add)
    vars(leaf)["project"] = project
    if model.output is not None:
        _show_parts(model.output, region, inside=True)
        model.output.register_forward_pre_hook(lambda _, inputs: (region.copy(inputs[0]),))
        model.output.register_forward_hook(lambda _, inputs, part: region.join(part, size))

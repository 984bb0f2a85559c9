"""The meshes of a run: which ranks share rows, weights, tokens, experts and layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transom.config.parallel_args import ParallelArgs


@dataclass(frozen=True)
class Meshes:
    """The ranks of one run, arranged by the kinds of parallelism.

    All ranks must make it in the same order. Neighbouring ranks are in one tensor group, since it
    communicates most.

    Attributes:
        args: The degrees, with a number for `shard`.
        device_type: `cpu` or `cuda`.
        dense: The mesh with the dimensions `pipeline`, `replicate`, `fsdp` and `tensor`. `fsdp` is
            shard x context.
        experts: The same ranks with `fsdp` divided into `rest` and `expert`; None without expert
            parallelism.
        groups: Meshes of one dimension by name: `context` and `pipeline`; `rows`, the ranks with
            different rows; `tokens`, the ranks with different tokens; `parts`, those with different
            terms of the loss, which are `tokens` in all stages of the pipeline; `weights`, the
            ranks that have one copy of a stage together.
    """

    args: ParallelArgs
    device_type: str
    dense: DeviceMesh
    experts: DeviceMesh | None
    groups: dict[str, DeviceMesh]

    @classmethod
    def make(cls, args: ParallelArgs, device_type: str) -> Meshes:
        """Arrange the ranks of the default process group.

        Raises:
            RequestError: If the degrees do not multiply out to their number.
        """
        args = args.resolved(dist.get_world_size())
        assert args.shard is not None, "resolved"
        inner = args.shard * args.context

        def mesh(**sizes: int) -> DeviceMesh:
            return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

        outer = {"pipeline": args.pipeline, "replicate": args.replicate}
        dense = mesh(**outer, fsdp=inner, tensor=args.tensor)
        fine = mesh(**outer, shard=args.shard, context=args.context, tensor=args.tensor)
        groups = {
            "context": fine["context"],
            "pipeline": fine["pipeline"],
            "rows": fine["replicate", "shard"]._flatten("rows"),
            "tokens": fine["replicate", "shard", "context"]._flatten("tokens"),
            "parts": fine["pipeline", "replicate", "shard", "context"]._flatten("parts"),
            "weights": dense["fsdp", "tensor"]._flatten("weights"),
        }
        experts = None
        if args.expert > 1:
            rest, last = inner // args.expert, {"expert": args.expert, "tensor": args.tensor}
            experts = mesh(**outer, rest=rest, **last)
            # torch finds this mesh by itself, and warns if it has to reduce over both in turn.
            experts["rest", "expert"]._flatten("all_experts")
        return cls(args, device_type, dense, experts, groups)

    def of_stage(self) -> Meshes:
        """Return the meshes for a second model, which the ranks of one stage divide.

        Its experts are divided as other weights are, since it may have none. It may also have
        layers for which keys are gathered instead of ring attention.
        """
        args = replace(self.args, pipeline=1, expert=1, context_ring=False)
        return replace(self, args=args, experts=None)

    def set_timeout(self, limit: timedelta) -> None:
        """Limit the time of each call that waits for other ranks; new groups take a default."""
        for mesh in (self.dense, self.experts, *self.groups.values()):
            for dim in range(0 if mesh is None else mesh.ndim):
                assert mesh is not None, "it has dimensions"
                dist.distributed_c10d._set_pg_timeout(limit, mesh.get_group(dim))

    @property
    def rank(self) -> int:
        """Index of this process."""
        return dist.get_rank()

    def group(self, name: str) -> dist.ProcessGroup:
        """Return one of `groups` as a process group."""
        return self.groups[name].get_group()

    def index(self, name: str) -> int:
        """Return the place of this rank in one of `groups`."""
        return self.groups[name].get_local_rank()

    def size(self, name: str) -> int:
        """Return the number of ranks of one of `groups`."""
        return self.groups[name].size()

    @cached_property
    def fsdp(self) -> DeviceMesh:
        """The mesh over which weights outside of experts are replicated and divided."""
        return self.dense["replicate", "fsdp"] if self.args.replicate > 1 else self.dense["fsdp"]

    @cached_property
    def expert_fsdp(self) -> DeviceMesh:
        """The mesh over which the experts of this rank are replicated and divided."""
        assert self.experts is not None, "the caller has expert parallelism"
        wide = self.args.replicate > 1
        return self.experts["replicate", "rest"] if wide else self.experts["rest"]

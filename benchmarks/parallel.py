"""Parallelism: what one rank has of weights, gradients and optimizer state, and what it takes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transom.base.runtime import memory_bytes, reset_peak_memory, resident_bytes
from transom.config.model_args import ModelArgs
from transom.config.parallel_args import ParallelArgs
from transom.data.batch import Batch
from transom.distributed.loading import allocate
from transom.distributed.mesh import Meshes
from transom.distributed.parts import copy_full, local_part
from transom.distributed.pipeline import stage_of
from transom.training.losses.cross_entropy import head_loss
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer

SHAPE: dict[str, Any] = {
    "dim": 384,
    "n_layers": 16,
    "n_heads": 8,
    "n_kv_heads": 4,
    "hidden_dim": 1024,
    "vocab_size": 1024,
    "max_seq_len": 256,
}
EXPERTS = {"num_experts": 8, "top_k": 2, "hidden_dim": 256}
RANKS, LENGTH = 4, 64
SMALL = {"dim": 64, "hidden_dim": 64, "vocab_size": 64, "n_layers": RANKS}
CASES: dict[str, dict[str, int]] = {
    "FSDP over 4": {"shard": 4},
    "hybrid FSDP": {"replicate": 2, "shard": 2},
    "tensor over 4": {"tensor": 4},
    "context over 4": {"context": 4},
    "expert over 4": {"shard": 4, "expert": 4},
    "pipeline over 4": {"pipeline": 4},
}
CPU = torch.device("cpu")


def rows(device: torch.device, part: str = "") -> list[dict[str, Any]]:
    """Return one row per layout. Ranks are processes on this machine, whatever `device` is.

    `part` is the first word of the cases to measure, such as `pipeline`; all by default.
    """
    found = []
    for case, degrees in CASES.items():
        if part not in ("", case.split()[0]):
            continue
        one, rank = (
            measured({"shard": 1}, 1, "expert" in degrees),
            measured(degrees, RANKS, "expert" in degrees),
        )
        found.append(
            {
                "benchmark": "parallel",
                "case": case,
                "peer": f"one process; {SHAPE['n_layers']} layers, dim {SHAPE['dim']}, AdamW",
                "mib": round(rank["kept"] / 2**20, 1),
                "peer_mib": round(one["kept"] / 2**20, 1),
                "memory_share": round(rank["kept"] / one["kept"], 3),
                "peak_share": round(rank["peak"] / one["peak"], 3),
            }
        )
    return found


def measured(degrees: dict[str, int], ranks: int, experts: bool = False) -> dict[str, int]:
    """Return the largest numbers of bytes of any rank of a new model in its first step.

    Args:
        degrees: The fields of `ParallelArgs`.
        ranks: Number of processes.
        experts: Whether the model has experts.

    Returns:
        `kept`: of weights, gradients and optimizer state. `peak`: resident memory above that of
        the process before, from building the model to the end of the step.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = (ranks, folder, degrees, experts)
        spawn: Any = torch.multiprocessing.spawn
        spawn(_measure, args=args, nprocs=ranks)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: max(one[name] for one in found) for name in found[0]}


def _measure(rank: int, ranks: int, folder: str, degrees: dict[str, int], experts: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
    shape = {**SHAPE, "moe_args": EXPERTS if experts else None}
    _step(meshes, {**shape, **SMALL})  # what the first step of any model takes
    reset_peak_memory(CPU)
    before = resident_bytes()
    kept = _step(meshes, shape)
    found = {"kept": kept, "peak": memory_bytes(CPU) - before}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _step(meshes: Meshes, shape: dict[str, Any]) -> int:
    """Take one step; return the bytes of weights, gradients and optimizer state."""
    model = allocate(ModelArgs.from_dict(shape), meshes, CPU)
    model.init_weights(0, copy_full)
    optimizer = build_optimizer(
        model, OptimizerArgs(), device_type="cpu", group=meshes.group("weights")
    )
    tokens = torch.zeros(1, LENGTH // meshes.args.context, dtype=torch.int64)
    micro, stage = Batch(tokens, tokens), stage_of(model)

    def compute(micro: Batch) -> tuple[Tensor, Tensor]:
        hidden_BTD = model(replace(micro.inputs(), logits="none")).hidden_BTD
        ends = stage is None or stage.last
        loss = head_loss(model, hidden_BTD, micro.targets) if ends else torch.zeros(())
        return hidden_BTD, loss

    if stage is None:
        compute(micro)[1].backward()
    else:
        stage.run([micro] * stage.count, compute)
    optimizer.step()
    grads = [one.grad for one in model.parameters() if one.grad is not None]
    kept = [*model.parameters(), *grads, *optimizer.state_tensors().values()]
    return sum(local_part(one).nbytes for one in kept)

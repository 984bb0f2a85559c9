"""Attention of rows that ranks divide: a ring of keys and values against gathering them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import interleaved
from transom.attention.backends import auto
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.base.runtime import memory_bytes, reset_peak_memory
from transom.config.layer_args import LayerRule
from transom.config.parallel_args import ParallelArgs
from transom.data.batch import Batch
from transom.distributed.context_parallel import ContextAttend, cut_rows
from transom.distributed.mesh import Meshes

# (query heads, key heads, head dim) and tokens of a row: those of Llama 3 8B on GPUs. Over two of
# them, the masks of gathered keys would take 70 GB for 131,072 tokens.
SHAPES: dict[str, tuple[tuple[int, int, int], tuple[int, ...]]] = {
    "cuda": ((32, 8, 128), (8192, 32_768)),
    "cpu": ((8, 4, 64), (1024, 4096)),
}


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per length: forward and backward of one layer on all GPUs, or two processes.

    A machine with one GPU has none.
    """
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if ranks < 2:
        return []
    heads, lengths = SHAPES[device.type]
    with tempfile.TemporaryDirectory() as folder:
        spawn: Any = torch.multiprocessing.spawn
        spawn(_measure, args=(ranks, folder, device.type), nprocs=ranks)
        found = json.loads((Path(folder) / "0.json").read_text())
    return [
        {
            "benchmark": "ring attention",
            "case": f"{tokens:,} tokens over {ranks}",
            "peer": f"gathered keys and values; {heads[0]} heads, {heads[1]} of keys",
            "milliseconds": round(1000 * seconds["ring"], 2),
            "ratio": round(seconds["gather"] / seconds["ring"], 3),
            "memory_share": round(memory["ring"] / memory["gather"], 3) if memory else None,
        }
        for tokens, (seconds, memory) in zip(lengths, found, strict=True)
    ]


def _measure(rank: int, ranks: int, folder: str, kind: str) -> None:
    """Write the seconds of both ways, and on a GPU the most bytes besides those of the inputs."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", ranks)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    meshes = Meshes.make(ParallelArgs(context=ranks), kind)
    heads, lengths = SHAPES[kind]
    found = []
    for tokens in lengths:
        cases = {
            name: _step(meshes, device, tokens, heads, name == "ring")
            for name in ("gather", "ring")
        }
        seconds = interleaved(cases, device, rounds=5, warmup=2)
        # Resident memory of a CPU process includes what its allocator keeps.
        measured = cases if kind == "cuda" else {}
        found.append((seconds, {name: _peak(call, device) for name, call in measured.items()}))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _step(
    meshes: Meshes, device: torch.device, tokens: int, heads: tuple[int, int, int], ring: bool
) -> Callable[[], None]:
    """Return a forward and backward pass of this rank's tokens."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    rank, ranks = meshes.index("context"), meshes.size("context")
    positions = cut_rows(Batch(ids, ids), rank, ranks).positions
    assert positions is not None
    own = partial(torch.randn, 1, positions.size(1), device=device, dtype=dtype)
    q_BTNH, k, v = (own(count, heads[2]).requires_grad_() for count in (heads[0], *heads[1:2] * 2))
    grad_BTNH = torch.randn_like(q_BTNH)
    attend = ContextAttend(auto, meshes.groups["context"], ring)

    def step() -> None:
        spec = MaskSpec(LayerRule(), positions)
        attend(q_BTNH, CacheView((k, v), positions), spec, ScoreArgs()).backward(grad_BTNH)
        q_BTNH.grad = k.grad = v.grad = None

    return step


def _peak(call: Callable[[], None], device: torch.device) -> int:
    reset_peak_memory(device)
    before = memory_bytes(device)
    call()
    return memory_bytes(device) - before

"""Runs on several ranks: scores and samples between the steps."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training.runs import tiny_args
from transom.config.parallel_args import ParallelArgs
from transom.distributed.mesh import Meshes
from transom.training.loop.setup import open_run

LAYOUTS = {
    "fsdp": {"shard": 4},
    "tensor": {"shard": 2, "tensor": 2},
    "context": {"context": 4},
    "experts": {"shard": 4, "expert": 2},
    "stages": {"shard": 2, "pipeline": 2},
}
EXPERTS = {"num_experts": 4, "top_k": 2, "hidden_dim": 32, "balance_scope": "sequence"}
SAMPLES = ("sample_every=2", "sample_tokens=4")


def run_args(folder, name):
    words = [f"out={folder}/{name}", "data.batch_size=8", "optimizer.name=adamw", *SAMPLES]
    args = tiny_args(folder, *words)
    args.model["moe_args"] = EXPERTS
    return args


def followed(args, meshes=None):
    """The losses of two steps, the held-out score after them and a sample."""
    trainer = open_run(args, quiet=True, meshes=meshes)
    losses = [trainer.step().loss for _ in range(2)]
    score = trainer.evaluate(None).row()
    torch.manual_seed(0)
    trainer.sample()
    return {"losses": losses, "score": score}


def four_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=4)
    for name, degrees in LAYOUTS.items():
        meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
        found = followed(run_args(Path(folder), name), meshes)
        (Path(folder) / f"{name}{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_train_score_and_sample_as_one_process(tmp_path):
    torch.multiprocessing.spawn(four_ranks, args=(str(tmp_path),), nprocs=4)
    alone = followed(run_args(tmp_path, "alone"))
    for name in LAYOUTS:
        for rank in range(4):
            found = json.loads((tmp_path / f"{name}{rank}").read_text())
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
            assert found["score"] == pytest.approx(alone["score"], rel=1e-5), name
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert sum("samples" in row for row in map(json.loads, rows)) == 1, name

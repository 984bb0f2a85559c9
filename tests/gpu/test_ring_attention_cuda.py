"""Ring attention over GPUs, with flash attention and NCCL."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.context_jobs import difference, job, results

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]


def compared(rank, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", f"file://{folder}/store", rank=rank, world_size=GPUS)
    mesh = init_device_mesh("cuda", (GPUS,))
    given = job(f"cuda:{rank}", torch.bfloat16, tokens=1000)
    # Both round outputs of about 1 to 8 bits; keys of another rank would change them by 1.
    assert difference(results(True, mesh, *given), results(False, mesh, *given)) < 0.1
    dist.destroy_process_group()


def test_the_ring_equals_gathered_keys(tmp_path):
    torch.multiprocessing.spawn(compared, args=(str(tmp_path),), nprocs=GPUS)

"""Blocks that are streamed to a GPU, from the memory of the host or from the disk."""

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.inference.loop import generate
from transom.inference.weight_streaming import Offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [list(range(1, 20)), [7], [5, 9, 30, 2]]


@pytest.mark.parametrize("source", ["cpu", "disk"])
@pytest.mark.parametrize("kind", [{}, {"moe_args": {"num_experts": 4, "top_k": 2}}])
def test_streamed_blocks_give_the_tokens_of_a_model_in_memory(source, kind, tmp_path):
    """Steps are queued ahead of the device, so a buffer that is filled too early shows."""
    args = tiny_args(dim=256, n_layers=9, hidden_dim=1024, **kind)
    save(random_model(args, std=0.05), tmp_path / "model")
    plans = []
    plain = load(tmp_path / "model", "cuda", before_weights=plans.append)
    fewest = plans[0].weight_bytes * 4 // 9
    offload = Offload(source, fewest)
    streamed = load(tmp_path / "model", "cuda", offload=offload, before_weights=lambda plan: 0)
    made = [generate(one, PROMPTS, 40, prefill_step_size=8) for one in (plain, streamed)]
    assert torch.equal(*made)
    assert offload.stream.bytes_read > 0

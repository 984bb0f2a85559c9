"""How often the host waits for the device in a training step, and where no GPU is: all of this
folder on an emulated one.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.gpu.emulated.install import why_not
from tests.training.finetune.runs import base_folder, preferences, run_args
from tests.training.runs import tiny_args as tiny_run
from transom.training.loop.setup import open_run

HERE = Path(__file__).parent
MOE = "model.moe_args={num_experts: 4, top_k: 2, hidden_dim: 64}"
STEPS = {
    "packed": ["dtype=bfloat16"],
    "micro-batches": ["accumulate=4"],
    "experts": [MOE, "dtype=bfloat16", "activation_checkpoint=full"],
    "8-bit states": ["optimizer.state_bits=8", "ema_decay=0.9", "loss_chunk=8"],
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def waits(trainer):
    """How often the third step of a run waits; the first ones probe kernels."""
    trainer.step()
    trainer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in found if "synchronizing" in str(one.message)]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("how", STEPS)
def test_a_step_waits_for_its_loss_its_tokens_and_its_norm(tmp_path, how):
    found = waits(open_run(tiny_run(tmp_path, "device=cuda", *STEPS[how]), quiet=True))
    assert len(found) == 3, found


@pytest.mark.gpu
@on_gpu
def test_a_step_of_preferences_waits_once_more_per_forward(tmp_path):
    """The model and its reference look up which positions have targets."""
    base, rows = base_folder(tmp_path / "model"), preferences(tmp_path / "rows.jsonl")
    args = run_args(tmp_path, base, rows, "device=cuda", "data.batch_size=2", objective="dpo")
    found = waits(open_run(args, quiet=True))
    assert len(found) == 5, found


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=f"the emulated device {why_not()}")
@pytest.mark.parametrize(
    "file", ["cuda", "decode", "finetune_cuda", "training_depth_cuda", "waits"]
)
def test_the_code_for_gpus_runs_on_an_emulated_one(tmp_path, file):
    """It shows tensors on two devices, hidden waits and graphs that read stale inputs; no kernel of
    CUDA, and no speed.
    """
    words = [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'own'}",
    ]
    words.append(f"{HERE}/test_{file}.py")
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "EMULATE_GPU": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout

"""`--nproc`, torchrun and SLURM: processes that become the ranks of one run."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch

from tests.distributed.processes import ROOT, environment, losses, run, words
from tests.distributed.ranks import run_ranks
from transom.base.errors import RequestError, notice
from transom.base.processes import launch_id
from transom.cli.main import main
from transom.config.parallel_args import ParallelArgs
from transom.distributed import launch as launch_module
from transom.distributed.ranks import Ranks
from transom.training.finetune.args import FinetuneArgs
from transom.training.loop.continuation import begun_by_this_launch

TWO = ("--nproc", "2")
RING = ("parallel.context=2", "parallel.context_ring=true")


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run a command that must end before any process starts, and leave nothing on the disk."""

    def refused(*more):
        monkeypatch.setattr(launch_module, "launch", None)
        before = sorted(tmp_path.iterdir())
        code = main([*words(tmp_path, f"out={tmp_path}/run"), *more])
        assert sorted(tmp_path.iterdir()) == before
        out, err = capsys.readouterr()
        assert code == 2 and not out
        return err

    words(tmp_path)
    return refused


DPO = {"objective": "dpo"}


@pytest.mark.parametrize(
    ("finetune", "degrees", "message"),
    [
        (DPO, {"context": 2}, "parallel.context: got 2; expected 1 with finetune.objective = dpo"),
        (DPO, {"pipeline": 2}, "parallel.pipeline: got 2; .* and an adapter, whose reference"),
        ({"objective": "grpo", "beta": 0.1}, {"pipeline": 2}, "parallel.pipeline: got 2; .*grpo"),
        ({**DPO, "method": "full"}, {"pipeline": 2}, None),
        ({"objective": "sft"}, {"pipeline": 2, "context": 2}, None),
    ],
)
def test_ranks_that_would_change_an_objective_are_refused(finetune, degrees, message):
    args = FinetuneArgs(**finetune)
    with (
        contextlib.nullcontext() if message is None else pytest.raises(RequestError, match=message)
    ):
        args.check_ranks(ParallelArgs(**degrees))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["parallel.tensor=3"], "parallel: replicate 1 x shard 1 x context 1 x tensor 3"),
        (["parallel.tensor=4"], "parallel.tensor: got 4; expected a divisor of 2, the greatest"),
        (["parallel.pipeline=4"], "parallel.pipeline: got 4; expected at most the 2 layers"),
        (
            ["parallel.expert=4"],
            "parallel.expert: got 4; expected 1, since the model has no experts",
        ),
        (["parallel.context_ring=true"], "parallel.context_ring: got True; expected false without"),
        ([*RING, "model.sliding_window=8"], "parallel.context_ring: got True; expected false for"),
        ([*RING, "device=cuda"], "dtype: got 'float32'; expected bfloat16 or float16 with"),
        (
            [*RING, "base=smollm2", "finetune.packing=true"],
            "finetune.packing: got True; expected false with parallel.context_ring",
        ),
        (["data.batch_size=6"], "data.batch_size: got 6; expected a multiple of"),
        (["accumulate=4"], "data.batch_size: got 8; expected a multiple of"),
        (["--nproc", "0"], "--nproc: got 0; expected 1 or more processes"),
        (["--max-restarts", "-1"], "--max-restarts: got -1; expected 0 or more"),
    ],
)
def test_wrong_degrees_end_before_a_process_starts(refused, wrong, message):
    error = refused("--nproc", "4", *wrong)
    assert error.startswith(f"transom: {message}") and error.count("\n") == 1


def test_a_run_that_another_process_writes_is_refused_before_a_process_starts(refused, tmp_path):
    code = (
        "from transom.base.locks import FolderLock; import sys\n"
        f"lock = FolderLock({str(tmp_path / 'run')!r}); print('locked', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert other.stdout.readline()
    assert "is writing there" in refused("--nproc", "2")
    other.communicate(b"\n")


def test_a_folder_with_files_is_refused_before_a_process_starts(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    assert "which is not empty" in refused("--nproc", "2")


def test_a_restart_overwrites_no_run_of_its_own_launch(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"launch": "job-1"}')
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    assert begun_by_this_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    assert not begun_by_this_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's name for launches without one
    assert launch_id() != launch_id()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    alone = run(words(tmp_path, f"out={tmp_path}/one", "steps=4"))
    assert alone[0] == 0, alone
    two = [*words(tmp_path, f"out={tmp_path}/two", "steps=4"), *TWO, "--json"]
    code, out, err = run(two)
    assert code == 0, err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert "2 ranks (shard 2) with 1 thread each" in err
    for line in [*out.splitlines(), *err.splitlines()]:
        assert (out + err).splitlines().count(line) == 1, "only one rank prints"
    assert not list(tmp_path.glob(".*.lock"))


@pytest.mark.slow
def test_torchrun_by_hand_runs_the_same_command(tmp_path):
    options = ["--standalone", "--nproc-per-node", "2"]
    command = words(tmp_path, f"out={tmp_path}/run", "steps=4")
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "transom"]
    for more in ([], ["data.batch_size=7"]):
        done = subprocess.run(
            [*torchrun, *command, *more, "--overwrite"],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        if not more:
            assert done.returncode == 0, done.stderr
            assert len(losses(tmp_path / "run")) == 4
    assert done.returncode != 0
    assert done.stderr.count("transom: data.batch_size: got 7;") == 1, done.stderr
    assert len(losses(tmp_path / "run")) == 4, "the former run is untouched"


def test_the_slurm_script_starts_torchrun_on_every_machine(tmp_path):
    for name, body in {
        "srun": 'printf "%s\\n" "$@"',
        "scontrol": "printf 'node7\\nnode8\\n'",
    }.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    job = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }

    def started(**more):
        script = [str(ROOT / "examples" / "slurm.sh"), "train", "config.yaml", "steps=3"]
        return subprocess.run(
            ["bash", *script], capture_output=True, text=True, check=True, env={**job, **more}
        ).stdout.splitlines()

    arguments = started()
    assert arguments == [
        *("--kill-on-bad-exit=1", "torchrun", "--nnodes=2", "--nproc-per-node=4"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=node7:21234", "--rdzv-id=41234"),
        *("--max-restarts=3", "-m", "transom", "train", "config.yaml", "steps=3"),
    ]
    assert started(SLURM_RESTART_COUNT="1") == [*arguments, "--resume"]


def printed():
    """Return what a rank prints that is the first one of its machine."""
    rank = torch.distributed.get_rank()
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0"}
    ranks = Ranks(rank, 2)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        with ranks.notices_of_first():
            notice("of work that every rank does")
        ranks.say("of the run")
        notice("of one machine")
    return err.getvalue()


def test_notices_of_work_that_every_rank_does_are_those_of_rank_0(tmp_path):
    first, second = run_ranks(printed, 2, tmp_path)
    assert first == "".join(
        f"transom: {what}\n"
        for what in ("of work that every rank does", "of the run", "of one machine")
    )
    assert second == "transom: rank 1: of one machine\n"

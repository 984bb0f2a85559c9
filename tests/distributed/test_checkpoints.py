"""Checkpoints of divided runs: written by all ranks, and resumed in any other layout."""

import errno
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.training.finetune.runs import base_folder, chats, run_args
from tests.training.runs import losses, tiny_args, write_corpus
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.files import safetensors_files
from transom.checkpoints.load import load
from transom.config.parallel_args import ParallelArgs
from transom.distributed.failures import is_lost
from transom.distributed.mesh import Meshes
from transom.distributed.parts import full_tensor
from transom.training.loop.setup import open_run

PLAIN = ("optimizer.name=adamw", "data.batch_size=12", "keep_last=3")
ARGS = (*PLAIN, "ema_decay=0.9")
STEPS = 12


def opened(folder, name, meshes=None, args=ARGS):
    """Begin or continue a run of a new model, or the run of a config."""
    resume = (folder / name / "latest").exists()
    if isinstance(args, tuple):
        args = tiny_args(folder, *args)
    degrees = ParallelArgs() if meshes is None else meshes.args
    config = replace(args, out=f"{folder}/{name}", parallel=degrees)
    return open_run(config, quiet=True, resume=resume, meshes=meshes)


def train(folder, name, until, meshes=None, args=ARGS):
    """Begin or continue a run, and save it at step `until`."""
    trainer = opened(folder, name, meshes, args)
    while trainer.progress.step < until:
        trainer.log(trainer.step(), 1.0)
    save(trainer)
    trainer.run.release()


def save(trainer):
    trainer.save(None)
    if trainer.saver is not None:
        trainer.saver.wait()


def launch(job, folder, size, *arguments):
    work = folder / f"{job.__name__}-{size}"
    work.mkdir()
    run_ranks(job, size, work, folder, *arguments)


def meshes_of(**layout):
    return Meshes.make(ParallelArgs(**layout), "cpu")


def shards(folder, until):
    train(folder, "run", until, meshes_of())


def test_a_checkpoint_of_four_ranks_continues_on_one_and_then_on_two(tmp_path):
    launch(shards, tmp_path, 4, 4)
    train(tmp_path, "run", 8)
    launch(shards, tmp_path, 2, STEPS)
    train(tmp_path, "alone", STEPS)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    steps = [tmp_path / "run" / f"step_{step:06d}" for step in (4, 8, STEPS)]
    files = [{path.name for path in step.iterdir()} for step in steps]
    assert files[0] - {"trainer"} == files[1] - {"trainer.safetensors"}
    assert [len(list((step / "trainer").glob("*"))) for step in steps] == [4, 0, 2]
    last = {name: one.clone() for name, one in load(tmp_path / "alone").named_parameters()}
    for name, one in load(steps[-1]).named_parameters():
        torch.testing.assert_close(one, last[name], rtol=1e-4, atol=1e-5)


def two_configs(folder):
    rate = 1 + torch.distributed.get_rank()
    with pytest.raises(RequestError) as error:
        opened(folder, "run", meshes_of(), (*PLAIN, f"optimizer.lr={rate}", f"save_every={rate}"))
    return str(error.value)


def test_ranks_with_different_configs_are_refused(tmp_path):
    expected = "optimizer.lr: got 1.0 on rank 0 and 2.0 on rank 1; expected the same on all ranks"
    assert run_ranks(two_configs, 2, tmp_path, tmp_path) == [expected] * 2
    assert not (tmp_path / "run").exists()


MIXTURE = (
    *ARGS,
    "model.moe_args.num_experts=4",
    "model.moe_args.top_k=2",
    "model.moe_args.hidden_dim=32",
)
LAYOUTS = {
    "same": {"shard": 4},
    "tensors": {"shard": 2, "tensor": 2},
    "experts": {"shard": 4, "expert": 2},
    "copies": {"replicate": 2, "shard": 2},
    "stages": {"pipeline": 2, "shard": 2},
    "replicas": {"replicate": 4, "shard": 1},
}


EIGHT_BITS = (*PLAIN, "model.dim=64", "model.hidden_dim=128", "optimizer.state_bits=8")


def states(folder, meshes=None):
    """The full states of the optimizer after step 4, which a run begins or continues with."""
    trainer = opened(folder, "run", meshes, EIGHT_BITS)
    while trainer.progress.step < 4:
        trainer.log(trainer.step(), 1.0)
        save(trainer)
    trainer.run.release()
    found = trainer.optimizers.state_tensors()
    return {name: full_tensor(one).clone() for name, one in found.items()}


def eight_bits(folder):
    layouts = {"shard": 4}, {"replicate": 2, "shard": 2}
    return [states(folder, meshes_of(**layout)) for layout in layouts]


@pytest.mark.slow
def test_divided_8_bit_states_continue_in_other_layouts(tmp_path):
    begun, *continued = run_ranks(eight_bits, 4, tmp_path, tmp_path)[0]
    assert sum(one.dtype == torch.uint8 for one in begun.values()) == 2 * (2 * 7 + 1)
    for found in (*continued, states(tmp_path)):
        assert found.keys() == begun.keys()
        assert all(torch.equal(one, begun[name]) for name, one in found.items())


def copied(folder, name):
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "run", folder / name)
    torch.distributed.barrier()


def layouts(folder):
    train(folder, "run", 4, meshes_of(shard=4), MIXTURE)
    for name, layout in LAYOUTS.items():
        copied(folder, name)
        train(folder, name, 8, meshes_of(**layout), MIXTURE)
    train(folder, "run", 8, meshes_of(shard=4), MIXTURE)
    train(folder, "uninterrupted", 8, meshes_of(shard=4), MIXTURE)


def three(folder):
    for name in ("tensors", "experts", "stages"):
        train(folder, name, STEPS, meshes_of(), MIXTURE)


@pytest.mark.slow
def test_every_layout_continues_with_the_same_losses(tmp_path):
    launch(layouts, tmp_path, 4)
    launch(three, tmp_path, 3)
    train(tmp_path, "alone", STEPS, args=MIXTURE)
    assert losses(tmp_path / "same") == losses(tmp_path / "uninterrupted")
    alone = losses(tmp_path / "alone")
    for name in LAYOUTS:
        found = losses(tmp_path / name)
        assert found == pytest.approx(alone[: len(found)], rel=1e-5), name


def in_trouble(folder):
    rank, run = torch.distributed.get_rank(), folder / "run"
    write, messages = safetensors_files._write_tensor, folder / f"messages{rank}"
    trainer = opened(folder, "run", meshes_of(), PLAIN)

    def latest():
        return (run / "latest").read_text().strip()

    trainer.log(trainer.step(), 1.0)
    save(trainer)

    may_write = threading.Event()

    def slow(*words):
        return may_write.wait(60) and write(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "_write_tensor", slow)
        trainer.log(trainer.step(), 1.0)
        trainer.save(None)
        weight = trainer.model.tok_embeddings.weight.full_tensor()
        trainer.step()  # goes on while files are written
        assert latest() == "step_000001"
        may_write.set()
        trainer.saver.wait()
    assert latest() == "step_000002"
    torch.testing.assert_close(load(run).tok_embeddings.weight, weight, rtol=0, atol=0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 2:
            patch.setattr(safetensors_files, "_write_tensor", full)
        trainer.save(None)
        with pytest.raises(WorkError) as raised:
            trainer.saver.wait()
    messages.write_text(f"{raised.value}\n")
    trainer.run.release()

    cut = run / "step_000002" / "trainer" / "rank-00002.safetensors"
    whole = cut.read_bytes()
    torch.distributed.barrier()
    if rank == 0:
        cut.write_bytes(whole[:-1])
    torch.distributed.barrier()
    with pytest.raises(RequestError) as raised:
        opened(folder, "run", meshes_of(), PLAIN)
    with messages.open("a") as file:
        file.write(f"{raised.value}\n")
    torch.distributed.barrier()
    if rank == 0:
        cut.write_bytes(whole)
    torch.distributed.barrier()

    again = opened(folder, "run", meshes_of(), PLAIN)
    again.log(again.step(), 1.0)
    if rank == 1:
        safetensors_files._write_tensor = lambda *_: os._exit(9)
    again.save(None)
    with pytest.raises(RuntimeError) as raised:
        again.saver.wait()
    with messages.open("a") as file:
        file.write("lost\n" if is_lost(raised.value) else f"{raised.value}\n")
    os._exit(0)


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path):
    with pytest.raises(WorkError, match=r"exit codes \[0, 9, 0, 0\]"):
        launch(in_trouble, tmp_path, 4)
    messages = [(tmp_path / f"messages{rank}").read_text().splitlines() for rank in range(4)]
    for full, cut, *_ in messages:
        assert "rank-00002.safetensors: could not be written" in full
        assert "rank-00002.safetensors: altered or cut" in cut
    assert [len(lines) for lines in messages] == [3, 2, 3, 3]  # rank 1 was killed while it wrote
    assert [messages[rank][2] for rank in (0, 2, 3)] == ["lost"] * 3
    assert "checkpoint not written, earlier ones are untouched (rank 2" in messages[0][0]
    assert not list((tmp_path / "run").glob("*.tmp-*"))
    train(tmp_path, "run", 3, args=PLAIN)  # from step 2
    train(tmp_path, "alone", 3, args=PLAIN)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)


def runs_on_a_base(folder):
    """Configs of a run that reads on, and of one that trains an adapter."""
    lora = run_args(folder, folder / "base", folder / "chats.jsonl")
    corpus = replace(lora.data, sources=(str(folder / "corpus"),), seq_len=32)
    return {"reads": replace(lora, finetune=None, data=corpus), "adapter": lora}


def on_a_base(folder):
    for until in (2, 4):
        for name, args in runs_on_a_base(folder).items():
            train(folder, name, until, meshes_of(), args)


@pytest.mark.slow
def test_runs_on_a_base_write_its_format_and_continue(tmp_path):
    base_folder(tmp_path / "base", format="hf")
    chats(tmp_path / "chats.jsonl")
    write_corpus(tmp_path / "corpus")
    launch(on_a_base, tmp_path, 2)
    for name, args in runs_on_a_base(tmp_path).items():
        train(tmp_path, f"{name} alone", 4, args=args)
        own, alone = (tmp_path / kind / "step_000004" for kind in (name, f"{name} alone"))
        assert losses(own.parent) == pytest.approx(losses(alone.parent), rel=1e-6)
        assert {one.name for one in own.iterdir()} - {"trainer"} == {
            one.name for one in alone.iterdir()
        } - {"trainer.safetensors"}
        weights = dict(load(alone).named_parameters())
        for key, one in load(own).named_parameters():
            torch.testing.assert_close(one, weights[key], rtol=1e-4, atol=1e-5)

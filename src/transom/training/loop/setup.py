"""From a config to a trainer that is ready to step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from transom.base.errors import expect, notice
from transom.base.runtime import (
    bound_kernel_caches,
    dtype_name,
    pick_device,
    pick_dtype,
    seed_everything,
)
from transom.distributed.mesh import Meshes
from transom.distributed.ranks import Ranks
from transom.planning.counts import parameters
from transom.planning.tables import counted
from transom.training.config import TrainArgs
from transom.training.effects import check_effects
from transom.training.loop.continuation import (
    as_begun,
    changes_of,
    check_alike,
    check_as_begun,
    check_same_machine,
    write_run,
)
from transom.training.loop.dtype_choice import DtypeChoice
from transom.training.loop.float8 import use_float8
from transom.training.loop.random_states import seed_apart
from transom.training.loop.run_folder import RunFolder
from transom.training.loop.run_parts import continued_parts, new_parts
from transom.training.loop.trainer import Trainer
from transom.training.report.tensorboard import writer_class


def open_run(
    args: TrainArgs,
    *,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    profile_steps: int = 0,
    meshes: Meshes | None = None,
) -> Trainer:
    """Open the run that a config describes.

    No other process may write to the run folder until the run has ended.

    Args:
        args: The config.
        overwrite: Replace an earlier run in the same folder.
        resume: Continue from the latest step; from the beginning if no step was saved.
        quiet: Print no progress.
        profile_steps: Number of steps that are profiled.
        meshes: The ranks that train together, see `distributed.launch.joined`. None is one rank.

    Returns:
        A trainer, in the state of the latest step or at the beginning.

    Raises:
        RequestError: If the config, its data or the folder doesn't allow the run. An earlier run
            in the folder is then unchanged.
    """
    device = pick_device(args.device)
    bound_kernel_caches()
    dtype = pick_dtype(args.dtype, device)
    rank, world_size = (0, 1) if meshes is None else (meshes.rank, meshes.args.world_size)
    if args.tensorboard and rank == 0:
        writer_class()
    if args.activation_offload and device.type == "cpu":
        notice("activation_offload: no effect on the CPU, where activations are in host memory")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":  # Adam's second moments decay into denormals, which are 100x slower
        torch.set_flush_denormal(True)
    seed_everything(args.seed)
    _check_apart(args)
    args.check_ranks(args.parallel.resolved(1) if meshes is None else meshes.args)
    run, ranks = RunFolder(args.out), Ranks(rank, world_size, device, meshes, quiet)
    check_alike(ranks, args)

    def check_folder() -> None:
        run.lock()
        run.check(overwrite=overwrite, resume=resume)

    try:
        ranks.on_first(check_folder)
        goes_on = ranks.first(resume and rank == 0 and run.has_steps)
        if not goes_on:
            check_effects(args)
        if resume and not goes_on:
            ranks.say(f"{run.path}: no step was saved yet, so the run starts from its beginning")
        changes = changes_of(run.path, args) if goes_on else None
        trainer = _open_trainer(args, run, ranks, dtype, profile_steps, resume=goes_on)
        # Last, so that a wrong request does not delete the run that it would overwrite.
        ranks.on_first(lambda: run.prepare(overwrite=overwrite, resume=resume))
        if goes_on:
            trainer.resume()
        else:
            seed_apart(ranks, args.seed)
        ranks.on_first(lambda: write_run(run, args, trainer, changes))
    except BaseException:
        run.release()
        raise
    return trainer


def _open_trainer(
    args: TrainArgs,
    run: RunFolder,
    ranks: Ranks,
    dtype: torch.dtype,
    profile_steps: int,
    *,
    resume: bool,
) -> Trainer:
    """Return a trainer after all checks, and write nothing. With `resume` the run has steps."""
    name: str = args.dtype
    if resume:
        args = as_begun(run.path, args)
        dtype = check_same_machine(run.path, ranks.device, dtype)
        name = dtype_name(dtype)
    choice = DtypeChoice.of(name, dtype, ranks)
    if args.base is None:
        parts = new_parts(args, run, choice, resume=resume)
    elif args.finetune is None:
        parts = continued_parts(args, choice)
    else:  # half of the code base, which pretraining does without
        from transom.training.finetune.weights import finetune_parts

        parts = finetune_parts(args, choice)
    if ranks.meshes is not None:
        args.check_ranks(ranks.meshes.args, parts.model.args)
    if args.float8:
        count = use_float8(parts.model, ranks.device, choice.dtype)
        ranks.say(f"float8: {count} linears train with products of 8-bit floats")
    args = _with_scores(parts.args or args, parts.data.rows_per_step)
    if resume:
        check_as_begun(run.path, args, parts.data.hashes, parts.tokenizer)
    trainer = Trainer(args, parts, run, ranks, choice.dtype, profile_steps)
    if args.dry_run:
        trainer.dry_run()
    return trainer


def _check_apart(args: TrainArgs) -> None:
    """Refuse to write a run over or around a folder that it reads, which would be emptied."""
    out = Path(args.out).resolve()
    teacher = args.finetune.teacher if args.finetune else None
    for field, name in (("base", args.base), ("finetune.teacher", teacher)):
        folder = None if name is None or not Path(name).exists() else Path(name).resolve()
        apart = folder is None or (folder != out and out not in folder.parents)
        expect(apart, "out", args.out, f"a folder that neither is nor contains {field}, {name}")


def _with_scores(args: TrainArgs, rows_per_step: int) -> TrainArgs:
    """Return the config with its batch size, and with `eval_every` from `finetune.scores`."""
    args = replace(args, data=replace(args.data, batch_size=rows_per_step))
    if args.finetune is None or not args.finetune.scores or args.eval_every:
        return args
    return replace(args, eval_every=max(1, args.steps // args.finetune.scores))


def describe_run(trainer: Trainer) -> str:
    """Return one line about what is about to be trained, where and in which precision."""
    args, count = trainer.args, parameters(trainer.model.args)
    size = args.data.rows_per_step
    work = f"{args.steps * size * args.data.seq_len:,} tokens in {args.steps:,} steps"
    if args.finetune is not None:  # whose rows are of any length
        work = f"{args.steps:,} steps of {size} rows"
    where = f"{dtype_name(trainer.dtype)} on {trainer.device}"
    if trainer.ranks.meshes is not None:
        degrees = trainer.ranks.meshes.args.describe()
        threads = f" with {counted(torch.get_num_threads(), 'thread')} each"
        where += f", {trainer.ranks.world_size} ranks ({degrees}){threads}"
    return f"{count / 1e6:.2f} M parameters, {work}, {where}"

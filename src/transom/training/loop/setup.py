"""From a config to a trainer that is ready to step: tokenizer, corpora, batches, model, run
folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from transom.base.errors import notice, require
from transom.base.runtime import (
    bound_kernel_caches,
    dtype_name,
    pick_device,
    pick_dtype,
    seed_everything,
)
from transom.models.llm import LLM
from transom.planning.counts import parameters
from transom.training.config import TrainArgs
from transom.training.effects import check_effects
from transom.training.loop.continuation import (
    as_begun,
    changes_of,
    check_as_begun,
    check_same_data,
    check_same_machine,
    write_changes,
    write_run,
)
from transom.training.loop.dry_run import draw_apart
from transom.training.loop.dtype_choice import DtypeChoice
from transom.training.loop.ranks import Ranks
from transom.training.loop.run_folder import RunFolder
from transom.training.loop.run_parts import Share, Subject, continued_subject, new_subject
from transom.training.loop.trainer import Trainer
from transom.training.report.tensorboard import writer_class


def open_run(
    args: TrainArgs,
    *,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    profile_steps: int = 0,
    rank: int = 0,
    world_size: int = 1,
    mesh: DeviceMesh | None = None,
) -> Trainer:
    """Return a trainer with a prepared run folder, which no other process may write until the run
    has ended.

    With `resume` the trainer is in the state of the latest step, or at the beginning if no step was
    saved.
    """
    device = pick_device(args.device)
    bound_kernel_caches()
    dtype = pick_dtype(args.dtype, device)
    if args.tensorboard and rank == 0:
        writer_class()
    if args.activation_offload and device.type == "cpu":
        notice(
            "activation_offload: the activations are in host memory already; nothing to do on "
            "the CPU"
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":
        torch.set_flush_denormal(
            True
        )  # Adam's second moments decay into denormals, which are 100x slower
    seed_everything(args.seed)
    check_apart(args)
    shares = args.accumulate * world_size
    expected = f"expected a multiple of accumulate x ranks = {shares}"
    size = args.data.batch_size
    require(size is None or size % shares == 0, "data.batch_size", size, expected)
    run, ranks = RunFolder(args.out), Ranks(world_size, mesh, device, rank)
    try:
        if (
            rank == 0
        ):  # the other ranks do not check, since rank 0 may have begun to fill the folder
            run.lock()
            run.check(overwrite=overwrite, resume=resume)
        goes_on = bool(ranks.first(int(resume and rank == 0 and run.has_steps)))
        if not goes_on:
            check_effects(args)
        if resume and not goes_on and not quiet and rank == 0:
            notice(f"{run.path}: no step was saved yet, so the run starts from its beginning")
        placement = Placement(device, dtype, rank, world_size, mesh, quiet, profile_steps)
        changes = changes_of(run.path, args) if goes_on else []
        trainer = open_trainer(args, run, placement, ranks, goes_on)
        if (
            rank == 0
        ):  # last, so that a wrong request does not delete the run that it would overwrite
            run.prepare(overwrite=overwrite, resume=resume)
        if goes_on:
            trainer.resume()
            if rank == 0:
                write_changes(run, changes, args, trainer)
        else:
            draw_apart(ranks, args.seed)
            if rank == 0:
                write_run(run, args, trainer)
    except BaseException:
        run.release()
        raise
    return trainer


class Placement(NamedTuple):
    """Where a trainer computes, in which precision, as which of several ranks, and how much it
    shows.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    mesh: DeviceMesh | None
    quiet: bool
    profile_steps: int


def open_trainer(
    args: TrainArgs, run: RunFolder, placement: Placement, ranks: Ranks, resume: bool
) -> Trainer:
    """Return a trainer after all checks, without writing anything; `resume` is for a run that has
    steps.
    """
    if resume:
        args = as_begun(run.path, args)
        placement = placement._replace(
            dtype=check_same_machine(run.path, placement.device, placement.dtype)
        )
    share = Share(placement.rank, placement.world_size, placement.quiet or placement.rank > 0)
    name = dtype_name(placement.dtype) if resume else args.dtype
    choice = DtypeChoice.of(name, placement.dtype, ranks)
    subject = open_subject(args, run, choice, share, resume=resume)
    placement = placement._replace(dtype=choice.dtype)
    args = spread(subject.args or args, subject.data.rows_per_step)
    if resume:
        check_same_data(run.path, subject.data.hashes, subject.tokenizer)
        check_as_begun(run.path, args)
    trainer = Trainer(
        args=args,
        model=subject.model,
        tokenizer=subject.tokenizer,
        data=subject.data,
        objective=subject.objective,
        step_model=subject.step_model,
        run=run,
        **placement._asdict(),
    )
    if args.dry_run:
        trainer.dry_run()
    return trainer


def open_subject(
    args: TrainArgs, run: RunFolder, choice: DtypeChoice, share: Share, *, resume: bool
) -> Subject:
    """What the config asks for: a new model, one that reads on, or one that is fine-tuned."""
    if args.base is None:
        return new_subject(args, run, choice, share, resume=resume)
    if args.finetune is None:
        return continued_subject(args, choice, share)
    from transom.training.finetune.weights import (
        finetune_parts,  # half of the code base, which pretraining does without
    )

    return finetune_parts(args, args.finetune, choice, share)


def check_apart(args: TrainArgs) -> None:
    """Refuse to write a run over, or around, a folder that it starts or learns from: it would be
    emptied.
    """
    out = Path(args.out).resolve()
    for field, name in (
        ("base", args.base),
        ("finetune.teacher", args.finetune.teacher if args.finetune else None),
    ):
        folder = None if name is None or not Path(name).exists() else Path(name).resolve()
        apart = folder is None or (folder != out and out not in folder.parents)
        require(
            apart,
            "out",
            args.out,
            f"expected a folder that neither is nor holds {field}, {name}",
        )


def spread(args: TrainArgs, rows_per_step: int) -> TrainArgs:
    """Return the config with its batch size, and with `eval_every` from `finetune.scores`."""
    args = replace(args, data=replace(args.data, batch_size=rows_per_step))
    if args.finetune is None or not args.finetune.scores or args.eval_every:
        return args
    return replace(args, eval_every=max(1, args.steps // args.finetune.scores))


def describe_run(args: TrainArgs, model: LLM, dtype: torch.dtype, device: torch.device) -> str:
    """One line: what is about to be trained, where and in which precision."""
    count = parameters(model.args)
    size = args.data.rows_per_step
    work = f"{args.steps * size * args.data.seq_len:,} tokens in {args.steps:,} steps"
    if args.finetune is not None:  # whose rows are of any length
        work = f"{args.steps:,} steps of {size} rows"
    return f"{count / 1e6:.2f} M parameters, {work}, {dtype_name(dtype)} on {device}"

"""From a config to a trainer that is ready to step: tokenizer, corpora, batches, model, run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch.distributed.device_mesh import DeviceMesh

from transom import __version__
from transom.errors import RequestError, notice, require
from transom.fields import write
from transom.model import LLM
from transom.paths import read_json
from transom.planning.counts import parameters
from transom.runtime import DTYPES, machine, pick_device, pick_dtype, seed_everything
from transom.tokenizer import Tokenizer
from transom.training.config import TrainArgs, read_config
from transom.training.run_folder import RunFolder
from transom.training.subject import Share, Subject, continued_subject, new_subject
from transom.training.tensorboard import writer_class
from transom.training.trainer import Trainer

# What may differ between a run and its continuation: none of it changes the arithmetic of a step.
FREE_ON_RESUME = {
    "out",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep_last",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
    "tensorboard",
    "dry_run",
    "activation_checkpoint",
    "activation_offload",
}


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
    """Return a trainer on a prepared run folder, which no other process may write until the run has ended.

    With `resume` it is in the state of the latest step, or at the beginning where no step was saved yet.
    """
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.tensorboard and rank == 0:
        writer_class()
    if args.activation_offload and device.type == "cpu":
        notice("activation_offload: the activations are in host memory already; nothing to do on the CPU")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # Adam's second moments decay into denormals, which are 100x slower
    seed_everything(args.seed)
    check_apart(args)
    shares = args.accumulate * world_size
    accepted = f"accepted is a multiple of accumulate x ranks = {shares}"
    size = args.data.batch_size
    require(size is None or size % shares == 0, "data.batch_size", size, accepted)
    run = RunFolder(args.out)
    try:
        if rank == 0:  # the others may look when rank 0 has begun to fill the folder
            run.claim()
            run.check(overwrite=overwrite, resume=resume)
        goes_on = resume and run.has_steps
        if resume and not goes_on and not quiet and rank == 0:
            notice(f"{run.path}: no step was saved yet, so the run starts from its beginning")
        placement = Placement(device, dtype, rank, world_size, mesh, quiet, profile_steps)
        trainer = open_trainer(args, run, placement, goes_on)
        if rank == 0 and not goes_on:
            # Only now: a request that turns out wrong must not cost the run it would overwrite.
            run.prepare(overwrite=overwrite, resume=resume)
            write_run(run, trainer)
        elif goes_on:
            if rank == 0:
                run.prepare(overwrite=overwrite, resume=resume)
            trainer.resume()
    except BaseException:
        run.release()
        raise
    return trainer


class Placement(NamedTuple):
    """Where a trainer computes, in which precision, as which of several ranks, and how much it shows."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    mesh: DeviceMesh | None
    quiet: bool
    profile_steps: int


def open_trainer(args: TrainArgs, run: RunFolder, placement: Placement, resume: bool) -> Trainer:
    """Return a trainer that has passed every check, before anything is written; `resume`: for a run with steps."""
    if resume:
        args = check_same_run(run.path, args)
        placement = placement._replace(dtype=check_same_machine(run.path, placement.device, placement.dtype))
    share = Share(placement.rank, placement.world_size, placement.quiet)
    subject = open_subject(args, run, placement.device, placement.dtype, share, resume=resume)
    args = spread(subject.args or args, subject.data.rows_per_step)
    if resume:
        check_same_batch(run.path, args)
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
    if resume:
        check_same_data(run.path, subject.data.hashes, subject.tokenizer)
    if args.dry_run:
        trainer.dry_run()
    return trainer


def open_subject(
    args: TrainArgs, run: RunFolder, device: torch.device, dtype: torch.dtype, share: Share, *, resume: bool
) -> Subject:
    """What the config asks for: a new model, one that reads on, or one that is fine-tuned."""
    if args.base is None:
        return new_subject(args, run, device, share, resume=resume)
    if args.tune is None:
        return continued_subject(args, device, share)
    from transom.training.tune import tuned_subject  # half of the code base, which pretraining does without

    return tuned_subject(args, args.tune, device, dtype, share)


def check_apart(args: TrainArgs) -> None:
    """Refuse to write a run over, or around, a folder that it starts or learns from: it would be emptied."""
    out = Path(args.out).resolve()
    for field, name in (("base", args.base), ("tune.teacher", args.tune.teacher if args.tune else None)):
        folder = None if name is None or not Path(name).exists() else Path(name).resolve()
        apart = folder is None or (folder != out and out not in folder.parents)
        require(apart, "out", args.out, f"accepted is a folder that neither is nor holds {field}, {name}")


def check_same_batch(run: Path, args: TrainArgs) -> None:
    """A resumed run takes as many rows a step as before, fitted to its data or not."""
    before = read_config(run / "config.yaml").data.batch_size
    accepted = f"accepted is {before}, as the run {run} has it"
    require(args.data.batch_size == before, "data.batch_size", args.data.batch_size, accepted)


def spread(args: TrainArgs, rows_per_step: int) -> TrainArgs:
    """Return the config with its batch size, and with as many held-out scores as fine-tuning asks for."""
    args = replace(args, data=replace(args.data, batch_size=rows_per_step))
    if args.tune is None or not args.tune.scores or args.eval_every:
        return args
    return replace(args, eval_every=max(1, args.steps // args.tune.scores))


def write_run(run: RunFolder, trainer: Trainer) -> None:
    """config.yaml and run.json: all that is needed to know what this run was."""
    args, config = trainer.args, trainer.args.to_dict()
    run.write_file("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip())
    facts: dict[str, Any] = {
        "transom": __version__,
        "machine": machine(),
        "device": trainer.device.type,
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "parameters": parameters(trainer.model.args),
        "steps": args.steps,
        "seed": args.seed,
        "data": dict(trainer.data.hashes),
        "tokenizer": trainer.tokenizer.hash,
        "model": trainer.model.args.to_dict(),
        "config": config,
    }
    run.write_file("run.json", json.dumps(facts, indent=2))


def check_same_run(run: Path, args: TrainArgs) -> TrainArgs:
    """Return the config with what the run chose for what the config leaves open.

    A config that would compute something else than the run has computed is a `RequestError`.
    """
    if not (run / "config.yaml").exists():
        raise RequestError(f"{run}: no config.yaml; accepted with --resume is a folder that a run wrote")
    stored = read_config(run / "config.yaml")
    args = as_begun(args, stored)
    for field in fields(TrainArgs):
        ours, theirs = getattr(args, field.name), getattr(stored, field.name)
        if field.name == "data":  # where shards are kept is no part of the data
            theirs = replace(theirs, cache_dir=ours.cache_dir)
            if args.tune is not None:  # it may have been fitted to a small set, as it will be again
                theirs = replace(theirs, batch_size=ours.batch_size)
        if field.name == "steps" and args.tune is not None and args.tune.epochs is not None:
            continue  # follows from the epochs and the data, which are compared
        if field.name not in FREE_ON_RESUME and ours != theirs:
            name, before, now = first_difference(field.name, write(theirs), write(ours))
            raise RequestError(f"{run}: belongs to another run: its {name} is {before!r}, the config says {now!r}")
    return args


def as_begun(args: TrainArgs, stored: TrainArgs) -> TrainArgs:
    """Return the config with the batch size and packing that a run chose when it began."""
    if args.data.batch_size is None:
        args = replace(args, data=replace(args.data, batch_size=stored.data.batch_size))
    if args.tune is not None and args.tune.packing is None and stored.tune is not None:
        args = replace(args, tune=replace(args.tune, packing=stored.tune.packing))
    return args


def first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first field below `name` in which plain data differ, and both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        return first_difference(f"{name}.{key}", before.get(key), now.get(key))
    return name, before, now


def check_same_machine(run: Path, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The run's own dtype, which a new measurement must not change; says what makes resuming inexact."""
    facts, now = read_json(run / "run.json"), machine()
    for what, before, after in (
        ("device", facts["device"], device.type),
        *((name, facts["machine"][name], now[name]) for name in ("torch", "threads", "processor")),
    ):
        if before != after:
            notice(f"{run}: {what} was {before}, is {after}: losses may differ in their last bits")
    return DTYPES.get(facts["dtype"], dtype)


def check_same_data(run: Path, data: Mapping[str, str], tokenizer: Tokenizer) -> None:
    """Refuse to resume on text that has changed: the data position would point elsewhere."""
    facts = read_json(run / "run.json")
    if facts["data"] != dict(data):
        changed = [name for name in data if facts["data"].get(name) != data[name]]
        raise RequestError(f"{run}: {', '.join(changed)} has changed since the run began; start a new run")
    if facts["tokenizer"] != tokenizer.hash:
        raise RequestError(f"{run}: the tokenizer of its latest step is not the one it began with")


def describe_run(args: TrainArgs, model: LLM, dtype: torch.dtype, device: torch.device) -> str:
    """One line: what is about to be trained, where and in which precision."""
    names = {kind: name for name, kind in DTYPES.items()}
    count = parameters(model.args)
    size = args.data.rows_per_step
    work = f"{args.steps * size * args.data.seq_len:,} tokens in {args.steps:,} steps"
    if args.tune is not None:  # whose rows are of any length
        work = f"{args.steps:,} steps of {size} rows"
    return f"{count / 1e6:.2f} M parameters, {work}, {names[dtype]} on {device}"

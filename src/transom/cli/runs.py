"""What the verbs that train share: their options, the run itself, and the help of config fields."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import WorkError, expect, notice
from transom.base.fields import field_types, write
from transom.base.interrupts import STOPS
from transom.base.locks import FolderLock
from transom.base.processes import RESTARTS, rank, restarts, world_size
from transom.cli.main import user_path
from transom.cli.options import add_json, option
from transom.config.model_args import ModelArgs
from transom.training.config import TrainArgs

if TYPE_CHECKING:
    from transom.distributed.mesh import Meshes
    from transom.evaluation.score import Score
    from transom.training.loop.trainer import Trainer

RESUME = "--resume continues it"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run."""
    again = parser.add_mutually_exclusive_group()
    option(again, "--overwrite", "replace an earlier run in the same folder")
    option(again, "--resume", "continue the run exactly from its latest step")
    what = "measure the time of each part of the first N steps"
    option(parser, "--profile N", what, int, default=0)
    option(parser, "--quiet", "print no progress on standard error")
    what = "start N processes on this machine, which share the run as `parallel` says"
    option(parser, "--nproc N", what, int, default=1)
    what = "if a process fails, start all of them again from the latest checkpoint, N times at most"
    option(parser, "--max-restarts N", what, int, default=0)
    add_json(parser)


def add_words(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the words that `split_words` reads."""
    option(parser, "CONFIG.yaml key=value", what, user_path, dest="words", nargs="*")


def run_training(args: TrainArgs, options: argparse.Namespace) -> tuple[Trainer, Score, int]:
    """Open a run, train it and write its report.

    Returns:
        The trainer, the held-out score, and the exit code: 0, or 128 + N if signal N other than
        SIGINT has ended an unfinished run, which is saved.

    Raises:
        SystemExit: In the process that has started others, and on all ranks but the first one, with
            the exit code.
    """
    expect(options.profile >= 0, "--profile", options.profile, "0 or more steps")
    expect(options.nproc > 0, "--nproc", options.nproc, "1 or more processes")
    expect(options.max_restarts >= 0, "--max-restarts", options.max_restarts, "0 or more")
    if (options.nproc > 1 or options.max_restarts) and RESTARTS not in os.environ:
        raise SystemExit(_launch(args, options))
    with contextlib.ExitStack() as stack:
        if world_size() == 1:
            stack.enter_context(FolderLock(args.out))  # until the report is written
        from transom.distributed.launch import joined

        meshes = stack.enter_context(joined(args.parallel, args.device))
        if meshes is not None and rank() == 0:
            stack.enter_context(FolderLock(args.out))
        trainer, final, code = _train(args, options, meshes)
    if rank():
        raise SystemExit(code)
    return trainer, final, code


def _launch(args: TrainArgs, options: argparse.Namespace) -> int:
    """Start the processes of --nproc with the same command, and return their exit code."""
    expect(world_size() == 1, "--nproc", options.nproc, "1 in a process that torchrun has started")
    from transom.checkpoints.files.location import find_model, read_pointer
    from transom.checkpoints.read_args import read_args
    from transom.distributed.launch import launch
    from transom.training.loop.run_folder import RunFolder

    model = None if args.base is None else read_args(find_model(args.base).model)
    args.check_ranks(args.parallel.resolved(options.nproc), model)
    with FolderLock(args.out):  # an earlier run is refused now rather than by the first rank
        RunFolder(args.out).check(overwrite=options.overwrite, resume=options.resume)
    try:
        return launch(options.command, options.nproc, max_restarts=options.max_restarts)
    except WorkError as error:
        step = read_pointer(Path(args.out), "latest")
        left = "no step was saved" if step is None else f"{RESUME} from {step.name}"
        raise WorkError(f"{error}; {left}") from None


def _train(
    args: TrainArgs, options: argparse.Namespace, meshes: Meshes | None
) -> tuple[Trainer, Score, int]:
    """Train on this rank; see `run_training`."""
    from transom.distributed.failures import End, record
    from transom.training.loop.continuation import begun_by_this_launch
    from transom.training.loop.setup import describe_run, open_run
    from transom.training.report.report import write_report

    again = restarts() > 0 and begun_by_this_launch(Path(args.out))
    try:
        trainer = open_run(
            args,
            overwrite=options.overwrite and not again,
            resume=options.resume or again,
            quiet=options.quiet,
            profile_steps=options.profile,
            meshes=meshes,
        )
        trainer.line.say(describe_run(trainer))
        if trainer.finished:
            notice(f"{args.out}: the run has ended; nothing is left to train")
    except STOPS:
        left = "the same command starts it again" if options.overwrite else RESUME
        notice(f"{args.out}: ended before the first step; {left}")
        raise
    final = trainer.fit()
    step, stopped = trainer.progress.step, trainer.stop.signal
    early = stopped is not None and not trainer.finished
    code = 128 + stopped if early and stopped not in (None, signal.SIGINT) else 0
    if early and meshes is not None:
        record(End("stop", f"saved at step {step}", code, printed=True))
    if rank():
        return trainer, final, code
    try:
        report = write_report(trainer.run.path)
    except STOPS:
        left = "only its report is missing" if trainer.finished else RESUME
        notice(f"{args.out}: saved at step {step}; {left}")
        raise
    if early:
        trainer.line.say(f"saved at step {step}; {RESUME}")
        return trainer, final, code
    print(f"run     {trainer.run.path}\nreport  {report}")
    if final.count:
        print(f"held out: {final.summary}")
    return trainer, final, 0


def is_override(word: str) -> bool:
    """Return whether a word is `key=value` and not the path of an existing file."""
    return "=" in word and not Path(word).exists()


def split_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the config file, if the first word is one, and the overrides."""
    if words and not is_override(words[0]):
        return Path(words[0]), words[1:]
    return None, words


def names_of(words: Iterable[str]) -> list[str]:
    """Return the fields of words such as `steps=3`."""
    return [word.partition("=")[0] for word in words]


def field_lines(cls: type, prefix: str = "") -> list[str]:
    """Return one line of help per field of a config; fields of parts have dotted names."""
    lines: list[str] = []
    types = field_types(cls)
    for field in dataclasses.fields(cls):
        kind, name = types[field.name], prefix + field.name
        part = _dataclass_in(kind)
        line = f"  {name}: {field.metadata.get('help', '')}"
        if part is not kind:
            unit = field.metadata.get("unit", "")
            details = (unit, f"default {_default(field)}")
            line += f" ({', '.join(filter(None, details))})"
        lines.append(line)
        if part is not None:
            lines += field_lines(part, f"{name}.")
        if name == "model":
            lines += field_lines(ModelArgs, "model.")
    return lines


def _dataclass_in(kind: Any) -> type | None:
    """Return the dataclass of a field type, also inside unions and tuples."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind
    parts = (_dataclass_in(inner) for inner in typing.get_args(kind))
    return next((part for part in parts if part is not None), None)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return json.dumps(write(field.default))
    if field.default_factory is dataclasses.MISSING:
        return "required"
    return repr(field.default_factory())

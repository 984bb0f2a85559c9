"""What the verbs that train share: their options, the run itself, and the help of config fields."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import notice, require
from transom.base.fields import field_types, write
from transom.base.interrupts import STOPS
from transom.base.locks import FolderLock
from transom.cli.options import add_json
from transom.config.model_args import ModelArgs
from transom.training.config import TrainArgs

if TYPE_CHECKING:
    from transom.evaluation.score import Score
    from transom.training.loop.trainer import Trainer

RESUME = "--resume continues it"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run."""
    again = parser.add_mutually_exclusive_group()
    what = "replace an earlier run in the same folder"
    again.add_argument("--overwrite", action="store_true", help=what)
    what = "continue the run exactly from its latest step"
    again.add_argument("--resume", action="store_true", help=what)
    what = "measure the time of each part of the first N steps"
    parser.add_argument("--profile", type=int, default=0, metavar="N", help=what)
    parser.add_argument("--quiet", action="store_true", help="print no progress on standard error")
    add_json(parser)


def run_training(args: TrainArgs, options: argparse.Namespace) -> tuple[Trainer, Score, int]:
    """Open a run, train it and write its report.

    Returns:
        The trainer, the held-out score, and the exit code: 0, or 128 + N if signal N other than
        SIGINT has ended an unfinished run, which is saved.
    """
    require(options.profile >= 0, "--profile", options.profile, "expected 0 or more steps")
    with FolderLock(args.out):  # until the report is written
        from transom.training.loop.setup import describe_run, open_run
        from transom.training.report.report import write_report

        try:
            trainer = open_run(
                args,
                overwrite=options.overwrite,
                resume=options.resume,
                quiet=options.quiet,
                profile_steps=options.profile,
            )
            trainer.line.say(describe_run(trainer))
            if trainer.finished:
                notice(f"{args.out}: the run has ended; nothing is left to train")
        except STOPS:
            again = "the same command starts it again" if options.overwrite else RESUME
            notice(f"{args.out}: ended before the first step; {again}")
            raise
        final = trainer.fit()
        step, stopped = trainer.progress.step, trainer.stop.signal
        try:
            report = write_report(trainer.run.path)
        except STOPS:
            left = "only its report is missing" if trainer.finished else RESUME
            notice(f"{args.out}: saved at step {step}; {left}")
            raise
    if stopped is not None and not trainer.finished:
        trainer.line.say(f"saved at step {step}; {RESUME}")
        return trainer, final, 0 if stopped == signal.SIGINT else 128 + stopped
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

"""`transom train`: a model from a config file, on the user's own text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import notice, require
from transom.base.fields import field_types, write
from transom.base.interrupts import STOPS
from transom.base.locks import FolderLock
from transom.cli.main import emit_json, user_path
from transom.config.model_args import ModelArgs
from transom.training.config import TrainArgs, read_config
from transom.training.effects import check_effects

if TYPE_CHECKING:
    from transom.evaluation.score import Score
    from transom.training.loop.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb, and list the fields of the config after them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = (
        "transom train [CONFIG.yaml | RUN] [key=value ...] [--overwrite | --resume] [--profile "
        "N] [--json]"
    )
    parser.add_argument(
        "words",
        nargs="*",
        type=user_path,
        metavar="CONFIG.yaml key=value",
        help="config file, then overrides",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the same folder"
    )
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue the run exactly where its latest step left it",
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="time the parts of the first N steps"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.epilog = (
        "fields of CONFIG.yaml, each also as key=value (unit, default):\n\n"
        + "\n".join(field_lines(TrainArgs))
    )


def run(options: argparse.Namespace) -> int:
    """Train; exit code 0, or 143 after a SIGTERM and 129 after a SIGHUP that saved an unfinished
    run.
    """
    config, overrides = _split(options.words)
    args = read_config(config, overrides)
    check_effects(args, names_of(overrides), by_value=not options.resume)
    args.data.source_list  # noqa: B018 - a run without sources is refused before torch is imported
    trainer, final, code = run_training(args, options)
    if options.json and trainer.finished:
        emit_json(
            {
                "run": str(trainer.run.path),
                "steps": trainer.progress.step,
                "train_tokens": trainer.progress.tokens,
                "train_seconds": round(trainer.progress.seconds, 3),
                "val_bits_per_byte": final.bits_per_byte if final.bytes else None,
                "val_perplexity": final.perplexity if final.bytes else None,
            }
        )
    return code


def run_training(args: TrainArgs, options: argparse.Namespace) -> tuple[Trainer, Score, int]:
    """Open the run, train it, write its report; return (trainer, held-out score, exit code)."""
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
        except STOPS:
            again = (
                "the same command starts it again"
                if options.overwrite
                else "--resume goes on from here"
            )
            notice(f"{args.out}: ended before a step was taken; {again}")
            raise
        final = trainer.fit()
        try:
            report = write_report(trainer.run.path)
        except STOPS:
            left = (
                "only its report is missing" if trainer.finished else "--resume goes on from here"
            )
            notice(f"{args.out}: saved at step {trainer.progress.step}; {left}")
            raise
    if trainer.stop.signal is not None and not trainer.finished:
        trainer.line.say(f"saved at step {trainer.progress.step}; continue with --resume")
        code = 0 if trainer.stop.signal == signal.SIGINT else 128 + trainer.stop.signal
        return trainer, final, code
    print(f"run     {trainer.run.path}\nreport  {report}")
    if final.count:
        print(f"held out: {final}")
    return trainer, final, 0


def is_override(word: str) -> bool:
    """Whether a word is `key=value` and not the path of a file, which may have an equals sign as
    well.
    """
    return "=" in word and not Path(word).exists()


def names_of(words: Iterable[str]) -> list[str]:
    """Return the fields that words such as `steps=3` name."""
    return [word.partition("=")[0] for word in words]


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    """The config file (a run folder stands for its config.yaml), and the overrides."""
    if not words or is_override(words[0]):
        return None, words
    path = Path(words[0])
    if path.is_dir():  # a run that was moved is continued where it is now
        return path / "config.yaml", [f"out={path}", *words[1:]]
    return path, words[1:]


def field_lines(cls: type, prefix: str = "") -> list[str]:
    """One line per config field: name, help, unit, default; nested parts by dotted names."""
    lines: list[str] = []
    types_of = field_types(cls)
    for field in dataclasses.fields(cls):
        kind, name = types_of[field.name], prefix + field.name
        nested = _dataclass_in(kind)
        help_text, unit = field.metadata.get("help", ""), field.metadata.get("unit", "")
        if nested is not None and dataclasses.is_dataclass(kind):
            lines += [f"  {name}: {help_text}", *field_lines(nested, name + ".")]
            continue
        detail = ", ".join(part for part in (unit, f"default {_default(field)}") if part)
        lines.append(f"  {name}: {help_text} ({detail})")
        if nested is not None:
            lines += field_lines(nested, name + ".")
        if name == "model":
            lines += field_lines(ModelArgs, "model.")
    return lines


def _dataclass_in(kind: Any) -> type | None:
    """The dataclass of a field type, looked for inside unions and tuples."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) in (typing.Union, tuple):
        return next(
            (found for inner in typing.get_args(kind) if (found := _dataclass_in(inner))), None
        )
    return None


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return json.dumps(write(field.default))
    return (
        "required"
        if field.default_factory is dataclasses.MISSING
        else repr(field.default_factory())
    )

"""`transom train`: train a model on text, as a config file describes it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transom.cli.options import option
from transom.cli.runs import (
    add_run_options,
    add_words,
    field_lines,
    names_of,
    run_training,
    split_words,
)
from transom.training.config import TrainArgs, read_config
from transom.training.effects import check_effects


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb, and the fields of the config below them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = (
        "transom train [CONFIG.yaml | RUN] [key=value ...] [--overwrite | --resume] "
        "[--nproc N] [--profile N] [--json]"
    )
    add_words(parser, "config file or run folder, then fields")
    add_run_options(parser)
    what = "print what one of N ranks needs and sends in a step, without data and other ranks"
    option(parser, "--rehearse N", what, int)
    fields = "\n".join(field_lines(TrainArgs))
    parser.epilog = f"fields of CONFIG.yaml, each also as key=value (unit, default):\n\n{fields}"


def run(options: argparse.Namespace) -> dict[str, Any] | int:
    """Train, and return the exit code of `run_training`."""
    config, overrides = _split(options.words)
    args = read_config(config, overrides)
    if options.rehearse is not None:
        return _rehearse(args, options)
    check_effects(args, names_of(overrides), by_value=not options.resume)
    args.data.source_list  # noqa: B018 - refuses a run without sources before torch is imported
    trainer, final, code = run_training(args, options)
    if not trainer.finished:
        return code
    progress = trainer.progress
    return {
        "run": str(trainer.run.path),
        "steps": progress.step,
        "train_tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 3),
        "val_bits_per_byte": final.bits_per_byte if final.bytes else None,
        "val_perplexity": final.perplexity if final.bytes else None,
    }


def _rehearse(args: TrainArgs, options: argparse.Namespace) -> dict[str, Any]:
    from transom.training.loop.rehearsal import lines, rehearse

    found = rehearse(args, options.rehearse)
    print("\n".join(lines(found)))
    sent = [
        {"group": group, "operation": name, "calls": calls, "bytes": size}
        for (group, name), (calls, size) in found.collectives.items()
    ]
    return {"ranks": options.rehearse, "memory": found.memory, "sent": sent}


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the config file and the overrides. A run folder stands for its config.yaml."""
    path, overrides = split_words(words)
    if path is not None and path.is_dir():  # a run that was moved is continued where it is now
        return path / "config.yaml", [f"out={path}", *overrides]
    return path, overrides

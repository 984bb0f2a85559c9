"""`transom finetune`: train an existing model on conversations, answers or pairs of answers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from transom.base.yaml_files import read_yaml
from transom.cli.main import user_path
from transom.cli.options import option
from transom.cli.runs import (
    add_run_options,
    add_words,
    field_lines,
    names_of,
    run_training,
    split_words,
)
from transom.training.config import TrainArgs
from transom.training.effects import check_effects
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.config import EMBEDDED, finetune_args, resumed_args

Flag = tuple[str, str, Callable[[str], Any], str]  # name, field, type, help

# Flags that users of other tools know, and the fields they set.
FLAGS: tuple[Flag, ...] = (
    ("--method", "finetune.method", str, "lora or full (all weights)"),
    ("--objective", "finetune.objective", str, "sft, dpo, ipo, orpo, kto, distill or grpo"),
    ("--rank", "finetune.lora.rank", int, "rank of the adapter"),
    ("--quantize", "finetune.quantize.kind", str, "nf4, int4 or int8: quantize the frozen base"),
    ("--teacher", "finetune.teacher", str, "model to distill from (as MODEL)"),
    ("--epochs", "finetune.epochs", float, "passes over the examples"),
    ("--iters", "steps", int, "optimizer steps, instead of epochs"),
    ("--batch-size", "data.batch_size", int, "rows per step"),
    ("--learning-rate", "optimizer.lr", float, "peak learning rate"),
    ("--max-seq-length", "data.seq_len", int, "longest row in tokens"),
    ("--out", "out", str, "folder of the run (default: MODEL-finetune)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb, and the fields of the config below them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = (
        "transom finetune MODEL [CONFIG.yaml] --data FILE [key=value ...] [--overwrite | --resume] "
        "[--nproc N] [--json]"
    )
    base = "model or run folder, GGUF file, hub id, or smollm2, to start from"
    option(parser, "MODEL", base, user_path)
    add_words(parser, "config file, then fields")
    data = (
        ".jsonl, .json or .parquet file, folder with train and valid files, or "
        f"{EMBEDDED}: questions about this machine's Python library; may be repeated"
    )
    option(parser, "--data FILE", data, user_path, action="append", default=[])
    for flag, field, kind, meaning in FLAGS:
        option(parser, f"{flag} X", f"{meaning} ({field})", kind)
    add_run_options(parser)
    fields = "\n".join(field_lines(FinetuneArgs, "finetune."))
    parser.epilog = f"fields, each as key=value (unit, default):\n\n{fields}"


def run(options: argparse.Namespace) -> dict[str, Any] | int:
    """Fine-tune the model and print the next commands."""
    args = config_of(options)
    named = [*fields_of_flags(options), *names_of(split_words(options.words)[1])]
    check_effects(args, named, by_value=not options.resume)
    trainer, _, code = run_training(args, options)
    if not trainer.finished:
        return code
    print(next_commands(args))
    p, weights = trainer.progress, trainer.model.parameters()
    return {
        "run": str(trainer.run.path),
        "base": args.base,
        "steps": p.step,
        "train_tokens": p.tokens,
        "train_seconds": round(p.seconds, 3),
        "held_out_loss": p.best,
        "trained_parameters": sum(one.numel() for one in weights if one.requires_grad),
    }


def config_of(options: argparse.Namespace) -> TrainArgs:
    """Return the config of a command: that of the run to resume, or of a new run."""
    path, words = split_words(options.words)
    overrides = [f"{field}={value}" for field, value in fields_of_flags(options).items()] + words
    config = read_yaml(path) if path else {}
    given = (options.model, options.data, overrides, config)
    resumed = resumed_args(*given) if options.resume else None
    return finetune_args(*given) if resumed is None else resumed


def fields_of_flags(options: argparse.Namespace, flags: Sequence[Flag] = FLAGS) -> dict[str, Any]:
    """Return the fields that the given flags set, and their values."""
    values = {field: getattr(options, flag[2:].replace("-", "_")) for flag, field, *_ in flags}
    return {field: value for field, value in values.items() if value is not None}


def next_commands(args: TrainArgs) -> str:
    """Return the commands to try next, quoted for a shell."""
    assert args.finetune is not None, "config_of gives it"
    out = shlex.quote(args.out)
    merge = f"  transom merge {out}\n" if args.finetune.method == "lora" else ""
    return f"\nnext:\n  transom chat {out}\n{merge}  transom eval {out} --data my_texts"

"""`transom finetune`: a model that is there, taught by conversations, answers or pairs of them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from transom.base.errors import require
from transom.base.yaml_files import read_yaml
from transom.checkpoints.files.folders import Found
from transom.cli.main import emit_json, user_path
from transom.cli.train import field_lines, is_override, names_of, run_training
from transom.training.config import TrainArgs, read_config
from transom.training.effects import check_effects
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.config import EMBEDDED, default_out, finetune_args

# Flags that users of other tools know, and the fields they stand for.
FLAGS = (
    ("--method", "finetune.method", str, "lora or full"),
    ("--objective", "finetune.objective", str, "sft, dpo, ipo, orpo, kto, distill or grpo"),
    ("--rank", "finetune.lora.rank", int, "rank of the adapter"),
    ("--quantize", "finetune.quantize.kind", str, "nf4 or int4: the frozen base in 4 bits"),
    ("--teacher", "finetune.teacher", str, "model to distill from"),
    ("--epochs", "finetune.epochs", float, "passes over the examples"),
    ("--iters", "steps", int, "optimizer steps, in place of epochs"),
    ("--batch-size", "data.batch_size", int, "rows per step"),
    ("--learning-rate", "optimizer.lr", float, "peak learning rate"),
    ("--max-seq-length", "data.seq_len", int, "longest row"),
    ("--out", "out", str, "folder of the run (default: MODEL-finetune)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb; the fields of the config are listed behind them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = (
        "transom finetune MODEL [CONFIG.yaml] --data FILE [key=value ...] [--overwrite | "
        "--resume] [--json]"
    )
    parser.add_argument(
        "model",
        type=user_path,
        metavar="MODEL",
        help="model or run folder, or hub id, to start from",
    )
    parser.add_argument(
        "words",
        nargs="*",
        type=user_path,
        metavar="CONFIG.yaml key=value",
        help="config file, then overrides",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=user_path,
        metavar="FILE",
        help=f".jsonl, .json or .parquet file, folder with train and valid files, or {EMBEDDED}: "
        f"questions about this machine's Python library; may be given again",
    )
    for flag, field, kind, help_text in FLAGS:
        parser.add_argument(flag, type=kind, metavar="X", help=f"{help_text} ({field})")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the same folder"
    )
    again.add_argument(
        "--resume", action="store_true", help="continue where the run's latest step left it"
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="time the parts of the first N steps"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.epilog = "fields, each as key=value (unit, default):\n\n" + "\n".join(
        field_lines(FinetuneArgs, "finetune.")
    )


def run(options: argparse.Namespace) -> int:
    """Fine-tune; name the next commands."""
    args = config_of(options)
    named = [*_fields_of_flags(options), *names_of(_split(options.words)[1])]
    check_effects(args, named, by_value=not options.resume)
    trainer, _, code = run_training(args, options)
    if not trainer.finished:
        return code
    print(next_commands(args))
    if options.json:
        p = trainer.progress
        emit_json(
            {
                "run": str(trainer.run.path),
                "base": args.base,
                "steps": p.step,
                "train_tokens": p.tokens,
                "train_seconds": round(p.seconds, 3),
                "held_out_loss": p.best,
                "trained_parameters": sum(
                    w.numel() for w in trainer.model.parameters() if w.requires_grad
                ),
            }
        )
    return code


def config_of(options: argparse.Namespace, opened: Found | None = None) -> TrainArgs:
    """Return the config of the given words and the defaults of the method, or of the run to resume.

    `opened` is the model if the caller has found it, which may be a tokenizer without a model.
    """
    path, overrides = _split(options.words)
    flags = [f"{field}={value}" for field, value in _fields_of_flags(options).items()]
    overrides = [*flags, *overrides]
    given = dict(word.partition("=")[::2] for word in overrides)
    run = run_to_resume(options.model, given.get("out")) if options.resume else None
    if run is not None:
        return resumed_config(run, options, path, overrides)
    return finetune_args(
        options.model, options.data, overrides, read_yaml(path) if path else {}, opened
    )


def run_to_resume(model: str, out: str | None) -> Path | None:
    """Return the run to resume: `out`, the default run of MODEL, or MODEL itself; None if no run
    has begun.
    """
    run = Path(default_out(model) if out is None else user_path(out))
    if (run / "config.yaml").exists():
        return run
    own = Path(model) / "config.yaml"
    return (
        Path(model)
        if out is None and own.exists() and read_config(own).finetune is not None
        else None
    )


def resumed_config(
    run: Path, options: argparse.Namespace, path: Path | None, overrides: list[str]
) -> TrainArgs:
    """Return the config of a run with the fields of the command; the trainer refuses those that
    must not change.
    """
    model, stored = Path(options.model), read_config(run / "config.yaml")
    require(
        stored.finetune is not None,
        "MODEL",
        str(run),
        "valid only with --resume is a fine-tuning run, or its base",
    )
    if run != model:
        bases = [Path(stored.base or "").resolve(), *Path(stored.base or "").resolve().parents]
        same = options.model == stored.base or model.resolve() in bases
        require(
            same,
            "MODEL",
            options.model,
            f"valid only with --resume of {run} is its base, {stored.base}",
        )
    sources = [source.path for source in stored.data.source_list]
    same = not options.data or list(options.data) == sources
    require(
        same,
        "--data",
        options.data,
        f"valid only with --resume is none, or what the run has: {sources}",
    )
    config = over(read_yaml(run / "config.yaml"), read_yaml(path) if path else {})
    return read_config(None, [f"out={run}", *overrides], base=config)


def over(below: Any, above: Any) -> Any:
    """Return `below` with its fields replaced by those of `above`, also in nested mappings."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: over(below.get(key), value) for key, value in above.items()}}


def _fields_of_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the given flags stand for, and their values."""
    values = {field: getattr(options, flag[2:].replace("-", "_")) for flag, field, *_ in FLAGS}
    return {field: value for field, value in values.items() if value is not None}


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    if words and not is_override(words[0]):
        return Path(words[0]), words[1:]
    return None, words


def next_commands(args: TrainArgs) -> str:
    """Return the commands to try now, ready for a shell."""
    assert args.finetune is not None, "config_of gives it"
    out = shlex.quote(args.out)
    merge = f"  transom merge {out}\n" if args.finetune.method == "lora" else ""
    return f"\nnext:\n  transom chat {out}\n{merge}  transom eval {out} --data my_texts"

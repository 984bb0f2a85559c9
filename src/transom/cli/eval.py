"""`transom eval`: score one model, or compare two, on local files or on tasks of the harness.

The keys of a data file decide whether it is text, questions with choices, or prompts with answers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, expect, optional
from transom.base.files import json_text, write_text
from transom.cli.main import user_path
from transom.cli.options import (
    MODEL,
    add_fields,
    add_json,
    add_offloading,
    add_opening,
    check_model,
    offloading,
    option,
    read_fields,
    require_unset,
)
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.task_data import open_data
from transom.planning.tables import counted, heading, show, table

WORDS = {
    "bits_per_byte": "bits per byte",
    "acc_norm": "acc, per character",
    "acc_bytes": "acc, per byte",
    "exact_match": "exact match",
}
FOR_DATA = ("window", "stride", "max_new_tokens", "stop", "extract", "ignore_case")
FOR_TASKS = ("include_path", "num_fewshot", "apply_chat_template")
OPENING = ("revision", "device", "dtype", "chat_template", "keep_quantized")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    option(parser, "MODEL", MODEL, user_path, nargs="?")
    what = "compare two models on the same data, instead of MODEL"
    parser.add_argument("--compare", nargs=2, type=user_path, metavar=("A", "B"), help=what)
    what = "text (files, folders, globs), or .jsonl of questions with choices or answers"
    option(parser, "--data DATA", what, nargs="+", action="extend", default=[])
    option(parser, "--tasks NAMES", "tasks of lm-evaluation-harness, separated by commas")
    option(parser, "--include-path DIR", "with --tasks: a folder of more tasks", user_path)
    option(parser, "--num-fewshot N", "with --tasks: examples before each question", int)
    what = "with --tasks: write prompts with the chat template"
    option(parser, "--apply-chat-template", what)
    add_fields(parser, EvalArgs, (*FOR_DATA, "batch_tokens", "limit"))
    what = "a built-in template, one of the folder, or a file"
    option(parser, "--chat-template NAME", what, user_path)
    add_opening(parser)
    add_offloading(parser)
    option(parser, "--out FILE", "write the results as JSON", user_path)
    option(
        parser, "--rows FILE", "write the result of each document or row as JSON lines", user_path
    )
    option(parser, "--overwrite", "replace existing files of --out and --rows")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print a table of scores with their intervals, and write the files that were asked for."""
    check_arguments(options)
    start, args = time.perf_counter(), read_fields(options, EvalArgs)
    opening = {name: getattr(options, name) for name in OPENING}
    opening["offload"] = offloading(options, tokens=args.batch_tokens)
    run_one = run_data if options.tasks is None else run_harness
    document = run_one(options, args, opening)
    document["seconds"] = round(time.perf_counter() - start, 3)
    if options.out is not None:
        write_text(Path(options.out), json_text(document, indent=2))
    return document


def check_arguments(options: argparse.Namespace) -> None:
    """Refuse wrong arguments before torch is imported."""
    if (options.model is None) == (options.compare is None):
        raise RequestError("MODEL, --compare: got both or none; expected one of them")
    tasks = options.tasks is not None
    if bool(options.data) == tasks:
        raise RequestError("--data, --tasks: got both or none; expected one of them")
    require_unset(options, tasks, "with --tasks", *FOR_TASKS)
    require_unset(options, not tasks, "with --data", "compare", "rows", *FOR_DATA)
    require_unset(options, options.compare is None, "with one model", "revision")
    expect(all(options.stop or ()), "--stop", "", "text of one character or more")
    for name in options.compare or [options.model]:
        check_model(name)
    for flag, name in (("--out", options.out), ("--rows", options.rows)):
        if name is not None:
            exists = Path(name).parent.is_dir()
            expect(exists, flag, name, "a file in a folder that exists")
            fits = options.overwrite or not Path(name).exists()
            expect(fits, flag, name, "--overwrite, since the file exists")


# -- local data ------------------------------------------------------------------------------------


def run_data(
    options: argparse.Namespace, args: EvalArgs, opening: Mapping[str, Any]
) -> dict[str, Any]:
    """Score one or two models on files; print and return the results."""
    args = replace(args, progress=sys.stderr.isatty())
    data = open_data(options.data, args.limit)
    from transom.evaluation.suite import evaluate_models

    document, rows = evaluate_models(options.compare or [options.model], data, args, **opening)
    if options.rows is not None:
        lines = [json_text(row, ensure_ascii=False) for row in rows]
        write_text(Path(options.rows), "\n".join(lines))
    if options.compare is None:
        print_report(document)
    else:
        print_comparison(document)
    return {**document, "limit": args.limit}


def print_report(document: Mapping[str, Any]) -> None:
    """Print one row per score of one model."""
    model = document["model"]
    heading(f"{model['model']}: {model['dtype']} on {model['device']}")
    rows = []
    for one in document["data"]:
        counts = ("documents", "rows", "tokens", "bytes")
        amount = ", ".join(counted(one[name], name[:-1]) for name in counts if name in one)
        for name, score in one["scores"].items():
            value = f"{score['value']:.4f}"
            rows.append((one["path"], WORDS.get(name, name), value, interval_words(score), amount))
    show(table(("data", "score"), ("value", "95% interval", "measured on"), rows))


def print_comparison(document: Mapping[str, Any]) -> None:
    """Print one row per score of two models, and whether their difference is significant."""
    heading("Side by side")
    print(f"A  {document['a']['model']}\nB  {document['b']['model']}\n")
    rows = []
    for one in document["data"]:
        for name, score in one["a"]["scores"].items():
            values = [
                f"{value:.4f}" for value in (score["value"], one["b"]["scores"][name]["value"])
            ]
            words = difference_words(one["difference"].get(name))
            rows.append((one["path"], WORDS.get(name, name), words[2], *values, *words[:2]))
    show(table(("data", "score", "verdict"), ("A", "B", "B - A", "95% interval"), rows))


def interval_words(score: Mapping[str, Any]) -> str:
    """Return an interval as `0.71 to 0.83`; a dash for a single document or row."""
    return "-" if score["low"] is None else f"{score['low']:.4f} to {score['high']:.4f}"


def difference_words(difference: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Return a difference, its interval and the verdict in words."""
    if difference is None:
        return "-", "-", "different vocabularies"
    if difference["better"] is not None:
        verdict = f"{difference['better'].upper()} is better"
    elif difference["low"] is None:
        verdict = "one unit is not enough"
    else:
        verdict = "no significant difference"
    return f"{difference['value']:+.4f}", interval_words(difference), verdict


# -- lm-evaluation-harness -------------------------------------------------------------------------


def run_harness(
    options: argparse.Namespace, args: EvalArgs, opening: Mapping[str, Any]
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness, print its table and return its results."""
    optional("lm_eval", "--tasks needs lm-evaluation-harness: pip install 'transom[lm_eval]'")
    from transom.evaluation.harness import TransomLM, run_tasks

    model = TransomLM(options.model, batch_tokens=args.batch_tokens, **opening)
    results, shown = run_tasks(
        model,
        [name.strip() for name in options.tasks.split(",") if name.strip()],
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=args.limit,
        apply_chat_template=options.apply_chat_template,
    )
    print(shown, flush=True)
    print(f"model {model.eval_model.location}", file=sys.stderr)
    return {"model": model.eval_model.facts(), **results}

"""`transom eval`: what a model scores on local files or tasks of lm-evaluation-harness; two models
side by side.

A data file says by its keys what it is: text (bits per byte, perplexity), questions with choices,
or prompts with answers.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import RequestError, WorkError, require
from transom.base.files import json_text
from transom.checkpoints.files.hub import is_hub_id
from transom.checkpoints.files.location import model_folder
from transom.cli.main import emit_json, user_path
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.task_data import DataSet, open_data
from transom.planning.tables import heading, show, table

if TYPE_CHECKING:
    from transom.evaluation.eval_model import EvalModel
    from transom.evaluation.suite import Measured

WORDS = {
    "bits_per_byte": "bits per byte",
    "acc_norm": "acc, per character",
    "acc_bytes": "acc, per byte",
    "exact_match": "exact match",
}
MAX_TOKENS = 128
FOR_DATA = ("window", "stride", "max_tokens", "stop", "extract", "ignore_case", "rows")
FOR_TASKS = ("include_path", "num_fewshot", "apply_chat_template")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    what = "a model or adapter folder of any format, a run folder for its best step, or a hub id"
    parser.add_argument("model", nargs="?", type=user_path, metavar="MODEL", help=what)
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=user_path,
        metavar=("A", "B"),
        help="two models on the same data, in place of one",
    )
    parser.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="DATA",
        help="files, folders or globs of text; or .jsonl of questions with choices, or of prompts "
"with answers",
    )  # fmt: skip
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-evaluation-harness, separated by commas, in place of --data",
    )
    parser.add_argument(
        "--include-path", type=user_path, metavar="DIR", help="with --tasks: a folder of more tasks"
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="with --tasks: examples in front"
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="with --tasks: prompts through the chat template",
    )
    for flag, kind, name, help in (
        ("--limit", int, "N", "the first N documents or rows of each"),
        (
            "--window",
            int,
            "N",
            "text: tokens of context at most (default: max_seq_len, 4096 at most)",
        ),
        ("--stride", int, "N", "text: tokens that windows advance by (default: half a window)"),
        (
            "--extract",
            str,
            "REGEX",
            "answers: compare its last match (its group, where it has one) only",
        ),
        (
            "--chat-template",
            user_path,
            "NAME",
            "for messages: a built-in template, one of the folder's, or a file",
        ),
    ):
        parser.add_argument(flag, type=kind, metavar=name, help=help)
    parser.add_argument(
        "-m", "--max-tokens", "--max-new-tokens", dest="max_tokens", type=int, metavar="N",
        help=f"answers: new tokens at most (default: {MAX_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--ignore-case", action="store_true", help="answers: capital letters count as small ones"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="answers: end before TEXT; may be given again",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens per call of the model (default: 4096)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the files' own)"
    )
    parser.add_argument("--out", type=user_path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--rows",
        type=user_path,
        metavar="FILE",
        help="write the result of every document or row, one JSON object per line",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of --out and --rows"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )


def run(options: argparse.Namespace) -> int:
    """Print a table of scores with their intervals, and write what was asked for."""
    check_arguments(options)
    start = time.perf_counter()
    if options.tasks is not None:
        document = run_harness(options)
    else:
        args = EvalArgs(
            window=options.window,
            stride=options.stride,
            max_new_tokens=MAX_TOKENS if options.max_tokens is None else options.max_tokens,
            extract=options.extract,
            ignore_case=options.ignore_case,
            stop=tuple(options.stop),
            batch_tokens=options.batch_tokens,
            limit=options.limit,
            progress=sys.stderr.isatty(),
        )
        document = run_data(options, args, open_data(options.data, options.limit))
    document["seconds"] = round(time.perf_counter() - start, 3)
    if options.out is not None:
        write_lines(options.out, [json_text(document, indent=2)])
    if options.json:
        emit_json(document)
    return 0


def check_arguments(options: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is imported."""
    if (options.model is None) == (options.compare is None):
        raise RequestError("eval: expected one model, or --compare with two")
    if bool(options.data) == (options.tasks is not None):
        raise RequestError(
            "eval: expected --data with files, or --tasks with names of lm-evaluation-harness"
        )
    tasks = options.tasks is not None
    for flag in FOR_DATA if tasks else FOR_TASKS:
        word, value = flag.replace("_", "-"), getattr(options, flag)
        given = value is not None and value is not False and value != []
        require(not given, f"--{word}", value, f"valid only with --{'data' if tasks else 'tasks'}")
    require(
        not tasks or options.compare is None, "--compare", options.compare, "valid only with --data"
    )
    require(all(options.stop), "--stop", "", "expected text of one character or more")
    several = options.compare is not None
    require(
        not several or options.revision is None,
        "--revision",
        options.revision,
        "valid only with one model",
    )
    for name in options.compare or [options.model]:
        if not Path(name).exists() and not is_hub_id(name):
            model_folder(name)  # its sentence; a hub id is looked up when all else is right
    for flag, name in (("--out", options.out), ("--rows", options.rows)):
        if name is not None:
            require(
                Path(name).parent.is_dir(),
                flag,
                name,
                "expected a file in a folder that is there",
            )
            fits = not Path(name).exists() or options.overwrite
            require(fits, flag, name, "this file is there; valid only with --overwrite")


def open_subject(options: argparse.Namespace, name: str) -> EvalModel:
    """One of the models asked for."""
    from transom.evaluation.eval_model import EvalModel

    return EvalModel.open(
        name,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        chat_template=options.chat_template,
    )


# -- local data
# -------------------------------------------------------------------------------------------


def run_data(
    options: argparse.Namespace, args: EvalArgs, data: Sequence[DataSet]
) -> dict[str, Any]:
    """Score one or two models, one after the other in memory; print and return the results."""
    from transom.evaluation.suite import comparison, evaluate, report

    names = options.compare or [options.model]
    facts: list[dict[str, Any]] = []
    measured: list[list[Measured]] = []
    for name in names:
        subject = open_subject(options, name)
        measured.append(evaluate(subject, data, args))
        facts.append(subject.facts())
        del subject
        gc.collect()  # before the next model is loaded
    if options.rows is not None:
        write_lines(options.rows, list(row_lines(names, measured)))
    if options.compare is None:
        document = report(facts[0], measured[0])
        print_report(document)
    else:
        document = comparison((facts[0], facts[1]), measured[0], measured[1])
        print_comparison(document)
    return {**document, "limit": options.limit}


def row_lines(names: Sequence[str], measured: Sequence[Sequence[Measured]]) -> Iterable[str]:
    """What came out of every document or row, one JSON object each."""
    for name, results in zip(names, measured, strict=True):
        for one in results:
            for row in one.rows:
                yield json_text({"model": name, "data": one.path, **row}, ensure_ascii=False)


def print_report(document: Mapping[str, Any]) -> None:
    """One row per score."""
    heading(
        f"{document['model']['model']}: {document['model']['dtype']} on "
        f"{document['model']['device']}"
    )
    rows = [
        (
            one["path"],
            WORDS.get(name, name),
            f"{score['value']:.4f}",
            interval_words(score),
            amount_words(one),
        )
        for one in document["data"]
        for name, score in one["scores"].items()
    ]
    show(table(("data", "score"), ("value", "95% interval", "of"), rows))


def print_comparison(document: Mapping[str, Any]) -> None:
    """Both models in one row per score, and whether their difference is more than chance would
    give.
    """
    heading("Side by side")
    print(f"A  {document['a']['model']}\nB  {document['b']['model']}\n")
    rows = []
    for one in document["data"]:
        for name, score in one["a"]["scores"].items():
            other, difference = one["b"]["scores"][name], one["difference"].get(name)
            values = (f"{score['value']:.4f}", f"{other['value']:.4f}")
            found = (
                ("-", "-", "other vocabulary")
                if difference is None
                else difference_words(difference)
            )
            rows.append((one["path"], WORDS.get(name, name), found[2], *values, *found[:2]))
    show(table(("data", "score", "verdict"), ("A", "B", "B - A", "95% interval"), rows))


def interval_words(score: Mapping[str, Any]) -> str:
    """`0.71 to 0.83`; a dash for a single document or row."""
    return "-" if score["low"] is None else f"{score['low']:.4f} to {score['high']:.4f}"


def difference_words(difference: Mapping[str, Any]) -> tuple[str, str, str]:
    """(difference, interval, verdict)."""
    better = difference["better"]
    verdict = (
        "one unit says nothing"
        if difference["low"] is None
        else "no difference beyond its interval"
    )
    if better is not None:
        verdict = f"{better.upper()} is better"
    return f"{difference['value']:+.4f}", interval_words(difference), verdict


def amount_words(result: Mapping[str, Any]) -> str:
    """What a score was counted over."""
    counts = ("documents", "rows", "tokens", "bytes")
    return ", ".join(f"{result[name]:,} {name}" for name in counts if name in result)


def write_lines(name: str, lines: Sequence[str]) -> None:
    """A text file, whole; a full disk is a `WorkError`."""
    try:
        Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise WorkError(f"{name}: could not be written ({error})") from None


# -- lm-evaluation-harness
# --------------------------------------------------------------------------------


def run_harness(options: argparse.Namespace) -> dict[str, Any]:
    """Run tasks of the library, where it is installed; print its table and return its results."""
    try:
        import lm_eval  # noqa: F401 - only to see whether it is there
    except ImportError:
        raise RequestError(
            "--tasks needs lm-evaluation-harness: pip install 'transom[lm_eval]'"
        ) from None
    from transom.evaluation.harness import TransomLM, run_tasks

    subject = open_subject(options, options.model)
    results, shown = run_tasks(
        TransomLM(subject, batch_tokens=options.batch_tokens),
        [name.strip() for name in options.tasks.split(",") if name.strip()],
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
    )
    print(shown, flush=True)
    print(f"model {subject.location}", file=sys.stderr)
    return {"model": subject.facts(), **results}

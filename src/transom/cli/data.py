"""`transom data`: checks and shows a data set for fine-tuning with a model's tokenizer and chat
template.

`check` counts the rows that `transom finetune` would train on with the same words and flags, and
names every row that cannot be used. `show` prints an example token by token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transom.base.errors import RequestError, notice, require
from transom.base.yaml_files import read_yaml
from transom.checkpoints.files.layout import is_model
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.read_args import lacks_vocabulary, read_args
from transom.cli.finetune import FLAGS, config_of
from transom.cli.main import emit_json, user_path
from transom.cli.train import is_override
from transom.planning.tables import heading, pairs, show

if TYPE_CHECKING:
    from transom.chat.template import ChatTemplate
    from transom.data.chat.conversations import ChatExample
    from transom.data.chat.finetune_sets import Problem
    from transom.data.chat.rows import EncodedChats
    from transom.tokenizers.tokenizer import Tokenizer
    from transom.training.config import TrainArgs
    from transom.training.finetune.args import FinetuneArgs

SEQ_LEN = 4096  # tokens of the longest example where no model states a length
# Flags of this verb, and the fields they stand for.
FIELDS = {
    "chat_template": "finetune.template",
    "train_on": "finetune.train_on",
    "truncate": "finetune.truncate",
    "seed": "seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "what", choices=("check", "show"), help="count and find faults, or print one example"
    )
    files = (
        ".jsonl, .json or .parquet file, a folder with train, valid and test files, a name of "
        "`datasets`"
    )
    parser.add_argument(
        "data",
        type=user_path,
        metavar="DATA",
        help=f"{files}, or stdlib-docs: questions on Python's own library",
    )
    model = "the folder or hub id whose tokenizer and chat template are used"
    parser.add_argument("--model", required=True, type=user_path, metavar="FOLDER", help=model)
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--split", default="train", help="train (default), valid or test")
    parser.add_argument(
        "words", nargs="*", type=user_path, metavar="CONFIG.yaml key=value", help="as for finetune"
    )
    parser.add_argument(
        "--seq-len", "--max-seq-length", dest="max_seq_length", type=int, metavar="N",
        help="longest example, tokens (data.seq_len; default: as for finetune)",
    )  # fmt: skip
    which = (
        "a built-in template, one of the folder's by name, or a file (finetune.template; default: "
        "the folder's)"
    )
    parser.add_argument("--chat-template", type=user_path, metavar="NAME", help=which)
    carries = "turns that carry loss (finetune.train_on; default: assistant)"
    parser.add_argument("--train-on", choices=("assistant", "all"), help=carries)
    longer = "what becomes of longer examples (finetune.truncate; default: cut)"
    parser.add_argument("--truncate", choices=("cut", "drop"), help=longer)
    for flag, field, kind, help_text in FLAGS:
        if flag not in ("--out", "--max-seq-length"):
            parser.add_argument(
                flag, type=kind, metavar="X", help=f"as for finetune: {help_text} ({field})"
            )
    parser.add_argument(
        "--index", type=int, metavar="N", help="show: which example, from 0 (default: 0)"
    )
    parser.add_argument(
        "--packed", action="store_true", help="show: a row of several examples, as they are trained"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="show --packed: seed of the packing (default: 0)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )


def run(options: argparse.Namespace) -> int:
    """Check or show; 1 where rows are malformed or nothing would be trained on."""
    for flag, fits in (("index", "show"), ("packed", "show"), ("seed", "show --packed")):
        value = getattr(options, flag)
        given = value is not None and value is not False
        fine = options.what == "show" and (flag != "seed" or options.packed)
        require(fine or not given, f"--{flag}", value, f"valid only with {fits}")
    index = options.index or 0
    require(index >= 0, "--index", options.index, "expected 0 or more")
    subject = open_subject(options)
    if options.what == "check":
        return check(subject, options)
    from transom.cli.data_show import show_example

    return show_example(subject, index, options)


class Subject(NamedTuple):
    """The data and its faults, the tokenizer and template, and the config that `transom finetune`
    would have.
    """

    examples: list[ChatExample]
    problems: list[Problem]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    args: TrainArgs
    finetune: FinetuneArgs
    found: ModelLocation


def open_subject(options: argparse.Namespace) -> Subject:
    """Read data, tokenizer and template; `check` collects malformed rows, `show` refuses the
    first.
    """
    from transom.chat.template import ChatTemplate
    from transom.checkpoints.open_model import open_tokenizer
    from transom.data.chat.finetune_sets import read_examples
    from transom.data.chat.rows import template_for

    found = find_model(options.model, options.revision, settings_only=True)
    if lacks_vocabulary(found.model):
        found = find_model(options.model, options.revision)
    tokenizer = open_tokenizer(found)
    problems: list[Problem] = []
    examples = read_examples(
        options.data, options.split, problems if options.what == "check" else None
    )
    args = finetune_config(options, found, examples)
    assert args.finetune is not None, "config_of requires it"
    if args.finetune.new_tokens:
        tokenizer = tokenizer.with_special(args.finetune.new_tokens)
    template = template_for(
        examples, tokenizer, ChatTemplate.find(found.folders, tokenizer, args.finetune.template)
    )
    return Subject(examples, problems, tokenizer, template, args, args.finetune, found)


def finetune_config(
    options: argparse.Namespace, found: ModelLocation, examples: Sequence[ChatExample]
) -> TrainArgs:
    """Return the config that `transom finetune` has with the same words and flags.

    If no objective is given, it is the first one that learns from rows of this kind. If that is not
    the default of finetune, a notice names it.
    """
    from transom.training.finetune.args import objectives_of, require_kinds

    words = list(options.words)
    for flag, field in FIELDS.items():
        if (value := getattr(options, flag)) is not None:
            words.append(f"{field}={value}")
    asked = argparse.Namespace(
        **{**vars(options), "data": [options.data], "resume": False, "out": None}
    )
    length = longest_example(found, options.max_seq_length)
    asked.max_seq_length = options.max_seq_length if is_model(found.model) else length
    asked.words = words
    args = config_of(asked, found)
    assert args.finetune is not None, "config_of requires it"
    expected = f"expected at most {length}, the model's max_seq_len"
    require(
        not is_model(found.model) or args.data.seq_len <= length,
        "data.seq_len",
        args.data.seq_len,
        expected,
    )
    fitting = objectives_of(examples[0].kind) if examples else [args.finetune.objective]
    if args.finetune.objective in fitting or states_objective(options):
        require_kinds(examples, args.finetune.objective)
        return args
    notice(
        f"rows of kind {examples[0].kind}: checked for `transom finetune --objective {fitting[0]}`"
    )
    asked.objective = fitting[0]
    require_kinds(examples, fitting[0])
    return config_of(asked, found)


def states_objective(options: argparse.Namespace) -> bool:
    """Return whether a flag, a word or the config file names the objective."""
    stated = options.objective is not None or any(
        word.startswith("finetune.objective=") for word in options.words
    )
    if stated or not options.words or is_override(options.words[0]):
        return stated
    return "objective" in (read_yaml(Path(options.words[0])).get("finetune") or {})


def longest_example(found: ModelLocation, asked: int | None) -> int:
    """Return the model's `max_seq_len`; for a tokenizer without a model the given length, or
    `SEQ_LEN`.
    """
    if is_model(found.model):
        most = read_args(found.model).max_seq_len
        fits = asked is None or 2 <= asked <= most
        require(fits, "--seq-len", asked, f"expected 2 to {most}, the model's max_seq_len")
        return most
    if asked is None:
        notice(
            f"{found}: a tokenizer without a model; examples may have {SEQ_LEN} tokens, or "
            f"--seq-len N"
        )
    require(asked is None or asked >= 2, "--seq-len", asked, "expected 2 or more")
    return SEQ_LEN if asked is None else asked


def encode(subject: Subject, examples: Sequence[ChatExample]) -> EncodedChats:
    """Return the rows of examples as `transom finetune` trains on them; add faults to those of the
    subject.
    """
    from transom.checkpoints.files.generation_config import stop_tokens_of
    from transom.data.chat.rows import encode_examples

    return encode_examples(
        examples,
        subject.tokenizer,
        subject.template,
        seq_len=subject.args.data.seq_len
        + 1,  # as in training: the last token of a row is a target only
        train_on=subject.finetune.train_on,
        truncate=subject.finetune.truncate,
        stop_tokens=stop_tokens_of(subject.found, subject.tokenizer),
        problems=subject.problems,
    )


# -- check
# -------------------------------------------------------------------------------------------


def check(subject: Subject, options: argparse.Namespace) -> int:
    """Print counts and faults; 1 where there are faults, or nothing to train on."""
    args = subject.args
    facts: dict[str, Any] = {
        "data": str(options.data),
        "split": options.split,
        "model": str(subject.found),
        "template": None if subject.template is None else subject.template.origin,
        "seq_len": args.data.seq_len,
        "objective": subject.finetune.objective,
        "kinds": sorted({example.kind for example in subject.examples}),
    }
    train, measured = held_apart(subject, options)
    asks = facts["kinds"] == ["answer"]
    facts |= prompt_facts(subject, train, measured) if asks else row_facts(subject, train, measured)
    nothing = not facts["rows"]
    facts["trains"] = not nothing
    facts["malformed"] = [
        {"where": where, "problem": sentence} for where, sentence in subject.problems
    ]
    if options.json:
        emit_json(facts)
    else:
        print_check(facts)
    if nothing:
        notice(f"{options.data}: nothing to train on")
    return 1 if nothing or subject.problems else 0


def held_apart(
    subject: Subject, options: argparse.Namespace
) -> tuple[list[ChatExample], list[ChatExample]]:
    """Return (examples to train on, examples to measure with) of the split `train`, as `transom
    finetune` has them.

    For another split, all examples are the first part.
    """
    from transom.data.chat.finetune_sets import has_own_valid, read_examples, split_examples
    from transom.training.finetune.args import require_kinds

    if options.split != "train":
        return subject.examples, []
    if not has_own_valid(options.data):
        return split_examples(subject.examples, subject.args.data.held_out)
    measured = read_examples(options.data, "valid", subject.problems)
    require_kinds(measured, subject.finetune.objective)
    return subject.examples, measured


def row_facts(
    subject: Subject, train: Sequence[ChatExample], measured: Sequence[ChatExample]
) -> dict[str, Any]:
    """Return counts of the rows to train on, how many examples are held out, and how rows make
    steps.
    """
    encoded = encode(subject, train)
    encode(subject, measured)  # for the faults of its rows
    rows = [row for item in encoded.items for row in item]
    bos = subject.tokenizer.bos_id
    facts = {
        **asdict(encoded.counts),
        "held_out": len(measured),
        "malformed_rows": len(subject.problems),
        "longest": max((len(row.ids) for row in rows), default=0),
        "with_bos": sum(bos is not None and int(row.ids[0]) == bos for row in rows),
    }
    lengths = [max(len(row.ids) for row in item) - 1 for item in encoded.items]
    return facts | step_facts(subject, lengths)


def step_facts(subject: Subject, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the steps that `transom finetune` makes of rows of these lengths, on one device."""
    from transom.training.defaults import finetune_rows, require_comparable

    if not lengths:
        return {}
    args, finetune = subject.args, subject.finetune
    choice = finetune_rows(lengths, args, finetune, 1)
    require_comparable(choice, finetune.objective, 1)
    facts: dict[str, Any] = {
        "packing": choice.packing,
        "rows_per_step": choice.batch_size,
        "steps": choice.steps,
    }
    if choice.packing:
        fill = sum(lengths) / (choice.rows * args.data.seq_len)
        facts |= {"packed_rows": choice.rows, "fill": round(fill, 4)}
    return facts


def prompt_facts(
    subject: Subject, train: Sequence[ChatExample], measured: Sequence[ChatExample]
) -> dict[str, Any]:
    """Return counts of prompts without answers, whose references the reward can judge."""
    from transom.data.chat.finetune_sets import Problem
    from transom.data.chat.rows import prompt_ids
    from transom.training.rl.rewards import open_reward

    reward = open_reward(subject.finetune.reward)
    room = subject.args.data.seq_len - subject.finetune.answer_tokens
    lengths: list[int] = []
    for at, example in enumerate((*train, *measured)):
        try:
            ids = prompt_ids(example, subject.tokenizer, subject.template)
            reward.check([(example.id, example.reference)])
        except RequestError as error:
            subject.problems.append(Problem(example.id, str(error).removeprefix(f"{example.id}: ")))
            continue
        if at < len(train):
            lengths.append(len(ids))
    kept = [length for length in lengths if length <= room]
    return {
        "examples": len(train),
        "held_out": len(measured),
        "malformed_rows": len(subject.problems),
        "rows": len(kept),
        "tokens": sum(kept),
        "longest": max(kept, default=0),
        "too_long": len(lengths) - len(kept),
        **step_facts(subject, kept),
    }


WORDS = {
    "examples": "examples",
    "malformed_rows": "malformed rows",
    "rows": "rows to train on",
    "tokens": "tokens in them",
    "trained_tokens": "tokens with loss",
    "longest": "longest row, tokens",
    "with_bos": "rows that begin with BOS",
    "truncated": "rows cut at their end",
    "dropped": "examples left out as too long",
    "fully_masked": "examples left out as fully masked",
    "beyond": "examples left out, answers beyond",
    "without_end": "answers without an end of turn",
    "split_rows": "further rows of split conversations",
    "unlike_prompt": "answers not behind their own prompt",
    "apart": "answers encoded apart from their prompt",
    "alike": "pairs left out, answers of the same tokens",
    "dropped_reasoning": "reasoning dropped from earlier turns",
    "left_out": "texts that the template leaves out",
    "rendered_anew": "conversations rendered for every answer",
    "too_long": "prompts without room for an answer",
    "held_out": "examples held out",
    "packed_rows": "packed into rows",
    "fill": "fill of packed rows",
    "rows_per_step": "rows per step",
    "steps": "optimizer steps",
}


def print_check(facts: dict[str, Any]) -> None:
    """One table, then the faults with their lines."""
    heading(f"{facts['data']} ({facts['split']}), for {facts['model']}")
    written = facts["template"] or "plain text"
    lines = [("kinds of rows", ", ".join(facts["kinds"])), ("written by", written)]
    lines += [
        ("objective", facts["objective"]),
        ("longest allowed", f"{facts['seq_len']:,} tokens"),
    ]
    show(
        pairs(
            [
                *lines,
                *((words, amount(facts[name])) for name, words in WORDS.items() if name in facts),
            ]
        )
    )
    if facts["malformed"]:
        heading("Malformed rows")
        for fault in facts["malformed"]:
            print(f"{fault['where']}: {fault['problem']}")


def amount(value: int | float) -> str:
    """A count, or a share in percent."""
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"

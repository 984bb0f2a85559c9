"""`transom generate`: continue one prompt on screen, or several as a batch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import RequestError, notice, require
from transom.checkpoints.files.hub import is_hub_id
from transom.checkpoints.files.location import model_folder
from transom.cli.main import emit_json, user_path

if TYPE_CHECKING:
    from transom.checkpoints.open_model import OpenedModel
    from transom.config.model_args import ModelArgs
    from transom.inference.sampling import SamplingArgs
    from transom.inference.text import TextStream
    from transom.models.llm import LLM
    from transom.tokenizers.tokenizer import Tokenizer

MAX_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_folder_arguments(parser)
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue, - for standard input as it is; given several times, one batch",
    )
    add_model_arguments(parser)
    special = (
        "read control tokens that a prompt spells, as <|im_start|>; without it they are plain text"
    )
    parser.add_argument("--special", action="store_true", help=special)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model: what every verb that runs one takes."""
    what = "a model or adapter folder of any format, a run folder for its best step, or a hub id"
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help=what)
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate` and `chat` share: sampling, where to stop, device."""
    left = f"new tokens at most (default: {MAX_TOKENS}, or what the model's context leaves)"
    parser.add_argument("-m", "--max-tokens", type=int, metavar="N", help=left)
    parser.add_argument(
        "--temp", "--temperature", dest="temperature", type=float, default=0.0, metavar="X",
        help="0 takes the most likely token, higher is more varied (default: 0)",
    )  # fmt: skip
    for flag, kind, default, help in (
        ("--top-k", int, None, "draw from the N most likely tokens only"),
        ("--top-p", float, 1.0, "draw from the fewest tokens whose probabilities reach X"),
        ("--min-p", float, 0.0, "drop tokens less likely than X times the most likely one"),
        ("--repetition-penalty", float, 1.0, "above 1 holds back tokens of prompt and answer"),
        ("--frequency-penalty", float, 0.0, "taken off for each time a token was generated"),
        ("--presence-penalty", float, 0.0, "taken off once a token was generated"),
        ("--seed", int, 0, "of the draws; each prompt has draws of its own"),
        ("--prefill-step-size", int, 512, "prompt tokens per call of the model"),
    ):
        shown = "" if default is None else f" (default: {default:g})"
        name = "N" if kind is int else "X"
        parser.add_argument(flag, type=kind, default=default, metavar=name, help=help + shown)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text, or where stop_strings of the folder say; may be repeated",
    )
    shown = "show control tokens in the text, also the one that ends it"
    parser.add_argument("--show-special", action="store_true", help=shown)
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after the model's own stop tokens"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the files' own)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the completions, the rates on standard error, and with --json one document."""
    check_arguments(options)
    prompts = read_prompts(options.prompt)
    sampling = sampling_of(options)
    from transom.chat.reasoning import marker_ids
    from transom.checkpoints.open_model import open_model
    from transom.inference.text import encode_prompts, stream_text

    opened = open_model(
        options.folder, device=options.device, dtype=options.dtype, revision=options.revision
    )
    model, tokenizer = opened.model, opened.tokenizer
    ids = encode_prompts(tokenizer, prompts, special=options.special)
    if not options.special:
        say_spelled(tokenizer, prompts)
    texts = stream_text(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens(options.max_tokens, model.args, max(map(len, ids))),
        sampling=sampling,
        stop=stop_of(options, opened),
        stop_tokens=() if options.ignore_eos else opened.stop_tokens,
        prefill_step_size=options.prefill_step_size,
        kept="all"
        if options.show_special
        else marker_ids(tokenizer),  # or reasoning and answer were one
    )
    shown, prompt_seconds, seconds = show(texts, prompts)
    facts = rates(texts, sum(map(len, ids)), prompt_seconds, seconds, model)
    report(facts)
    if options.json:
        rows = zip(prompts, shown, texts.completions, strict=True)
        completions = [
            {
                "prompt": prompt,
                "text": text,
                "tokens": row.tokens,
                "finish_reason": row.finish_reason,
            }
            for prompt, text, row in rows
        ]
        emit_json({"model": options.folder, "completions": completions, **facts})
    return 0


def check_arguments(options: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is imported."""
    most = options.max_tokens
    require(most is None or most >= 1, "--max-tokens", most, "expected 1 or more")
    step = options.prefill_step_size
    require(step >= 1, "--prefill-step-size", step, "expected 1 or more")
    require(all(options.stop), "--stop", "", "expected text of one character or more")
    if not Path(options.folder).exists() and not is_hub_id(options.folder):
        model_folder(options.folder)  # its sentence; a hub id is looked up when all else is right


def read_prompts(words: Sequence[str]) -> list[str]:
    """The prompts as given, `-` replaced by all of standard input."""
    if words.count("-") > 1:
        raise RequestError("--prompt -: standard input can be read once")
    return [_standard_input() if word == "-" else word for word in words]


def say_spelled(tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Print a notice for each control token that a prompt spells, which is read as plain text."""
    for number, prompt in enumerate(prompts, start=1):
        for spelling in tokenizer.spelled_in(prompt):
            notice(
                f"prompt {number}: {spelling} is read as plain text; --special reads it as a "
                f"control token"
            )


def _standard_input() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompt -: standard input is not UTF-8 ({error})") from None
    if not text:
        raise RequestError("--prompt -: standard input is empty")
    return text


def sampling_of(options: argparse.Namespace) -> SamplingArgs:
    """The sampling flags, checked."""
    from transom.inference.sampling import SamplingArgs

    return SamplingArgs(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        seed=options.seed,
    )


def stop_of(options: argparse.Namespace, opened: OpenedModel) -> list[str]:
    """Return the texts of --stop and, without --ignore-eos, the stop strings of the folder."""
    return [*options.stop, *(() if options.ignore_eos else opened.stop_strings)]


def max_new_tokens(requested: int | None, args: ModelArgs, prompt_tokens: int) -> int:
    """What was asked for, else the default or what the context leaves; the loop refuses what cannot
    be.
    """
    from transom.inference.loop import keeps_every_token

    if requested is not None:
        return requested
    room = args.max_seq_len - prompt_tokens
    if not keeps_every_token(args) or room >= MAX_TOKENS or room < 1:
        return MAX_TOKENS
    notice(f"the model's context of {args.max_seq_len} tokens leaves room for {room} new ones")
    return room


def show(texts: TextStream, prompts: Sequence[str]) -> tuple[list[str], float, float]:
    """Print one completion as it comes, several when all are done.

    Returns the texts as shown, the seconds of the first token, and those of the rest.
    """
    alone, shown = len(prompts) == 1, [""] * len(prompts)
    start = first = time.perf_counter()
    for step, pieces in enumerate(texts):
        if step == 0:
            first = time.perf_counter()
        shown = [text + piece for text, piece in zip(shown, pieces, strict=True)]
        if alone and pieces[0]:
            print(pieces[0], end="", flush=True)
    end = time.perf_counter()
    if alone:
        print(flush=True)
    else:
        for number, (prompt, text) in enumerate(zip(prompts, shown, strict=True), start=1):
            print(f"==> {number} of {len(prompts)}: {prompt!r} <==\n{text}\n", flush=True)
    return shown, first - start, end - first


def rates(
    texts: TextStream, prompt_tokens: int, prompt_seconds: float, seconds: float, model: LLM
) -> dict[str, Any]:
    """Counts and speeds; a row's first token comes out of its prompt and is not part of the
    generation speed.
    """
    from transom.base.runtime import memory_bytes

    counts = [len(row.tokens) for row in texts.completions]
    return {
        "prompt_tokens": prompt_tokens,
        "generation_tokens": sum(counts),
        "prompt_tokens_per_second": prompt_tokens / prompt_seconds,
        "generation_tokens_per_second": (sum(counts) - len(counts)) / max(seconds, 1e-9),
        "peak_memory_bytes": memory_bytes(model.device),
    }


def report(facts: dict[str, Any]) -> None:
    """The three closing lines on standard error."""
    for name in ("prompt", "generation"):
        count, speed = facts[f"{name}_tokens"], facts[f"{name}_tokens_per_second"]
        print(f"{name.capitalize()}: {count} tokens, {speed:.3f} tokens-per-sec", file=sys.stderr)
    print(f"Peak memory: {facts['peak_memory_bytes'] / 1e9:.3f} GB", file=sys.stderr, flush=True)

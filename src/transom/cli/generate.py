"""`transom generate`: continue one prompt on screen, or several as a batch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transom.base.errors import expect, explained, notice
from transom.cli.main import user_path
from transom.cli.options import (
    add_fields,
    add_json,
    add_model,
    add_offloading,
    check_model,
    opening,
    option,
    read_fields,
)
from transom.inference.decode_args import DecodeArgs
from transom.inference.sampling import SamplingArgs
from transom.planning.tables import counted

if TYPE_CHECKING:
    from transom.checkpoints.load import LoadPlan
    from transom.checkpoints.open_model import OpenedText
    from transom.inference.text import TextStream
    from transom.tokenizers.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_model(parser)
    what = "text to continue; - reads standard input; may be repeated, for a batch"
    option(parser, "-p --prompt TEXT", what, action="append", required=True)
    add_generation(parser)
    what = "read control tokens such as <|im_start|> in prompts, which are plain text otherwise"
    option(parser, "--special", what)
    option(parser, "--profile", "print how long each part of a token takes")
    add_json(parser)


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the options that `generate` and `chat` share."""
    add_offloading(parser)
    what = "maximum number of new tokens (default: 128, or what the model's context leaves)"
    option(parser, "-m --max-tokens N", what, int)
    add_fields(parser, SamplingArgs)
    add_fields(parser, DecodeArgs)
    what = "a smaller model of the same vocabulary, which proposes tokens: the same text, sooner"
    option(parser, "--draft-model FOLDER", what, user_path)
    what = "end before this text, as before the stop_strings of the folder; may be repeated"
    option(parser, "--stop TEXT", what, action="append", default=[])
    option(parser, "--show-special", "print control tokens, also the one that ends the text")
    option(parser, "--ignore-eos", "continue after the model's own stop tokens")


def check_generation(options: argparse.Namespace) -> None:
    """Raise a `RequestError` for wrong options before torch is imported."""
    most = options.max_tokens
    expect(most is None or most >= 1, "--max-tokens", most, "an integer of 1 or more")
    expect(all(options.stop), "--stop", "", "text of 1 character or more")
    check_model(options.folder)
    if options.draft_model is not None:
        check_model(options.draft_model)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print the completions, the rates on standard error, and with --json one document."""
    check_generation(options)
    prompts = read_prompts(options.prompt)
    sampling, decode = read_fields(options, SamplingArgs), read_fields(options, DecodeArgs)
    from transom.chat.reasoning import marker_ids
    from transom.checkpoints.open_model import open_model
    from transom.inference.draft import open_draft
    from transom.inference.room import check_memory, room_for_new_tokens
    from transom.inference.step_times import measured_steps, table
    from transom.inference.text import encode_prompts, stream_text

    ids: list[list[int]] = []
    most = 0

    def check_request(text: OpenedText, load: LoadPlan) -> int:
        nonlocal most
        ids.extend(encode_prompts(text.tokenizer, prompts, special=options.special))
        expect(all(ids), "--prompt", "", "text of 1 token or more")
        longest = max(map(len, ids))
        most = room_for_new_tokens(load.args, longest, options.max_tokens, decode.max_model_len)
        given = load.args, len(ids), longest + most, load.dtype, load.device, decode
        return check_memory(*given, load=load, least=longest + 1)

    opened = open_model(**opening(options), before_weights=check_request)
    model, tokenizer = opened.model, opened.tokenizer
    if not options.special:
        tell_spelled(tokenizer, prompts)
    texts = stream_text(
        model,
        tokenizer,
        ids,
        max_new_tokens=most,
        sampling=sampling,
        stop=[*options.stop, *(() if options.ignore_eos else opened.stop_strings)],
        stop_tokens=() if options.ignore_eos else opened.stop_tokens,
        decode=decode,
        draft=open_draft(
            options.draft_model,
            opened,
            decode,
            device=options.device,
            tokens=max(map(len, ids)) + most,
        ),
        # The markers of reasoning are shown: without them, it would look like the answer.
        kept="all" if options.show_special else marker_ids(tokenizer),
    )
    with measured_steps() as seconds:
        shown = show(texts, prompts)
    rates = texts.rates(model)
    if options.profile:
        tokens = rates["generation_tokens"] - len(prompts)
        print(*table(seconds, texts.generation_seconds, tokens), sep="\n", file=sys.stderr)
    report(rates)
    rows = zip(prompts, shown, texts.completions, strict=True)
    completions = [
        {"prompt": prompt, "text": text, "tokens": x.tokens, "finish_reason": x.finish_reason}
        for prompt, text, x in rows
    ]
    return {"model": options.folder, "completions": completions, **rates}


def read_prompts(words: Sequence[str]) -> list[str]:
    """Return the prompts. A prompt `-` is replaced by the text of standard input."""
    expect(words.count("-") <= 1, "--prompt", "-", "it once: standard input ends")
    return [_standard_input() if word == "-" else word for word in words]


def _standard_input() -> str:
    expected = "--prompt: got '-'; expected UTF-8 on standard input"
    with explained(expected, UnicodeDecodeError):
        text = sys.stdin.read()
    expect(bool(text), "--prompt", "-", "text, but standard input is empty")
    return text


def tell_spelled(tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Print a notice for each control token that a prompt spells, which is read as plain text."""
    for number, prompt in enumerate(prompts, start=1):
        for spelling in tokenizer.spelled_in(prompt):
            notice(
                f"prompt {number}: {spelling} is read as plain text; --special reads it as a "
                f"control token"
            )


def show(texts: TextStream, prompts: Sequence[str]) -> list[str]:
    """Print one completion while it is generated, or several afterwards, and return the texts."""
    alone, shown = len(prompts) == 1, [""] * len(prompts)
    for pieces in texts:
        shown = [text + piece for text, piece in zip(shown, pieces, strict=True)]
        if alone and pieces[0]:
            print(pieces[0], end="", flush=True)
    if alone:
        print(flush=True)
        return shown
    for number, (prompt, text) in enumerate(zip(prompts, shown, strict=True), start=1):
        print(f"==> {number} of {len(prompts)}: {prompt!r} <==\n{text}\n", flush=True)
    return shown


def report(rates: dict[str, Any]) -> None:
    """Print the closing lines on standard error."""
    for name in ("prompt", "generation"):
        count, speed = rates[f"{name}_tokens"], rates[f"{name}_tokens_per_second"]
        tokens = counted(count, "token")
        print(f"{name.capitalize()}: {tokens}, {speed:,.3f} tokens-per-sec", file=sys.stderr)
    if "drafted_tokens" in rates:
        accepted, drafted = rates["accepted_tokens"], counted(rates["drafted_tokens"], "token")
        print(f"Drafts: {drafted}, {accepted} accepted", file=sys.stderr)
    print(f"Peak memory: {rates['peak_memory_bytes'] / 1e9:.3f} GB", file=sys.stderr, flush=True)

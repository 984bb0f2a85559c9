"""`transom chat`: turn by turn through the model's chat template, or as one growing text."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transom.base.errors import RequestError, expect, notice
from transom.cli.generate import add_generation, check_generation
from transom.cli.main import user_path
from transom.cli.options import add_model, opening, option, read_fields
from transom.inference.decode_args import DecodeArgs
from transom.inference.sampling import SamplingArgs

if TYPE_CHECKING:
    from transom.chat.reasoning import Kind
    from transom.inference.session import Answer, Session

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # "// comment" and "/usr/bin" are text
HELP = """\
Every line is a turn. A \\ at its end continues the turn on the next line, and so do lines between
two lines of \"""\"""\""". Ctrl-C stops an answer.
  /reset         start a new conversation; the text of /system stays
  /system TEXT   start a new conversation with TEXT as its system message, or with none
  /adapter NAME  answer with this adapter from now on; none stands for no adapter
  /save FILE     write the conversation so far into a new file
  /help          print this text
  /exit          leave, as Ctrl-D does"""
DIM = ("\x1b[2m", "\x1b[22m")  # on and off
BLOCK = '"""'  # a line of its own that begins and ends a turn of many lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_model(parser)
    add_generation(parser)
    what = "an adapter folder, or a run of one, that /adapter can choose; may be repeated"
    option(parser, "--adapter NAME=FOLDER", what, action="append", default=[])
    option(parser, "--system --system-prompt TEXT", "text of the system message", default="")
    what = "beginning of every answer, which the model continues"
    option(parser, "--prefill TEXT", what, default="")
    what = "a built-in template (llama3, chatml, ...), one of the folder's by name, or a file"
    option(parser, "--chat-template NAME", f"{what} (default: the folder's)", user_path)
    what = 'JSON object of variables for the template, such as {"enable_thinking": false}'
    option(parser, "--chat-template-config JSON", what)
    option(parser, "--ignore-chat-template", "continue one growing text, without a template")


def run(options: argparse.Namespace) -> None:
    """Answer turn by turn until the input ends."""
    check_generation(options)
    values = template_values(options)
    expected = "no white space at its end, where it would change how tokens are cut"
    expect(options.prefill == options.prefill.rstrip(), "--prefill", options.prefill, expected)
    sampling, decode = read_fields(options, SamplingArgs), read_fields(options, DecodeArgs)
    adapters = named_adapters(options.adapter)
    from transom.checkpoints.open_model import open_model
    from transom.inference.draft import open_draft
    from transom.inference.room import MAX_TOKENS, check_session_memory
    from transom.inference.session import AnswerArgs, open_session

    opened = open_model(
        **opening(options),
        chat_template=options.chat_template,
        before_weights=lambda text, load: check_session_memory(load, decode),
    )
    answers = AnswerArgs(
        sampling=sampling,
        max_tokens=options.max_tokens or MAX_TOKENS,
        stop=options.stop,
        decode=decode,
        draft=open_draft(options.draft_model, opened, decode, device=options.device),
        show_special=options.show_special,
    )
    session = open_session(
        opened,
        answers,
        system=options.system,
        prefill=options.prefill,
        use_template=not options.ignore_chat_template,
        template_values=values,
        adapters=adapters,
        ignore_eos=options.ignore_eos,
    )
    notice("/help lists commands")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives `input` line editing
    while (turn := read_turn()) is not None:
        try:
            if turn.strip() and not take(session, turn):
                break
        except RequestError as error:  # the conversation is unchanged
            notice(str(error), again=True)
    session.finish()


def template_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the object of --chat-template-config."""
    given = options.chat_template_config
    both = options.ignore_chat_template and bool(options.chat_template or given)
    expect(not both, "--ignore-chat-template", True, "no --chat-template beside it")
    try:
        values = json.loads(given or "{}")
    except ValueError:
        values = None
    expected = 'JSON such as {"name": value}'
    expect(isinstance(values, dict), "--chat-template-config", given, expected)
    return dict(values)


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Return the folders of --adapter NAME=FOLDER by name, in order."""
    adapters: dict[str, str] = {}
    for one in given:
        name, _, folder = one.partition("=")
        expect(bool(name and folder), "--adapter", one, "NAME=FOLDER")
        fits = name != "none" and name not in adapters
        expect(fits, "--adapter", one, "a name of its own, and not none")
        adapters[name] = user_path(folder)
    return adapters


def read_turn() -> str | None:
    """Return the next line and those that continue it; None when the input has ended."""
    lines: list[str] = []
    block = False
    terminal = sys.stdin.isatty()
    while True:
        shown = "... " if lines or block else ">>> "
        try:
            line = input(shown if terminal else "")
        except EOFError:
            if terminal:
                print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()  # as in a shell, what was typed is dropped
            lines, block = [], False
            continue
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input: got bytes; expected UTF-8 ({error})") from None
        if line.strip() == BLOCK and (block or not lines):
            if block:
                return "\n".join(lines)
            block = True
            continue
        lines.append(line if block else line.removesuffix("\\"))
        if not block and not line.endswith("\\"):
            return "\n".join(lines)


def take(session: Session, turn: str) -> bool:
    """Run a command, or answer a turn; return False to leave."""
    command = COMMAND.fullmatch(turn)
    name, rest = (command[1], command[2] or "") if command else ("", turn)
    match name:
        case "":
            answer = session.ask(rest)
            session.keep(answer, interrupted=show(answer))
        case "reset":
            session.reset()
        case "system":
            session.reset(rest)
        case "adapter":
            session.use_adapter(rest.strip())
        case "save":
            session.save(rest.strip())
        case "help":
            print(HELP, flush=True)
        case "exit":
            return False
        case _:
            known = "/reset, /system, /adapter, /save, /help or /exit"
            raise RequestError(f"command: got '/{name}'; expected {known}")
    return True


def show(answer: Answer) -> bool:
    """Print an answer while it is generated; return whether Ctrl-C interrupted it."""
    screen = Screen(dim=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    interrupted = False
    try:
        for kind, text in answer:
            screen.write(kind, text)
    except KeyboardInterrupt:
        interrupted = True
    screen.end()
    return interrupted


class Screen:
    """Prints one answer; reasoning has a heading, and is dim on a terminal."""

    def __init__(self, dim: bool) -> None:
        self.on, self.off = DIM if dim else ("", "")
        self.kind: Kind = "answer"

    def write(self, kind: Kind, text: str) -> None:
        """Print a piece, and a heading if the piece before was of another kind."""
        if kind != self.kind:
            heading = f"{self.on}[reasoning]" if kind == "reasoning" else f"{self.off}\n[answer]"
            print(heading)
            self.kind = kind
        print(text, end="", flush=True)

    def end(self) -> None:
        """End the line."""
        print(self.off if self.kind == "reasoning" else "", flush=True)

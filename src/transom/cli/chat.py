"""`transom chat`: turn by turn through the model's chat template, or as one growing text where it
has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import RequestError, notice, require
from transom.cli.adapters import add_adapter_argument, load_beside, named_adapters, switch
from transom.cli.generate import (
    MAX_TOKENS,
    add_folder_arguments,
    add_model_arguments,
    check_arguments,
    sampling_of,
    stop_of,
)
from transom.cli.main import user_path

if TYPE_CHECKING:
    from transom.chat.reasoning import Kind
    from transom.inference.session import Answer, Framing, Session
    from transom.models.llm import LLM

MAX_CONTEXT = (
    8192  # tokens that a chat makes room for unless told: some models' own maximum fills a GPU
)
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # "// comment" and "/usr/bin" are text
HELP = """\
Every line is a turn; a \\ at its end takes the next line along, and so do lines between two lines
of \"""\"""\""".
Ctrl-C stops an answer.
  /reset         begin anew; the text of /system stays
  /system TEXT   begin anew with TEXT in front, without TEXT with nothing
  /adapter NAME  answer with this adapter from now on, with none for none
  /save FILE     write the conversation so far into a new file
  /help          this page
  /exit          leave, as Ctrl-D does"""
DIM = ("\x1b[2m", "\x1b[22m")  # on and off
BLOCK = '"""'  # alone on a line it begins and ends a turn of many lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_folder_arguments(parser)
    add_model_arguments(parser)
    add_adapter_argument(parser)
    room = f"tokens of text to make room for (default: the model's maximum, {MAX_CONTEXT} at most)"
    parser.add_argument("--max-model-len", type=int, metavar="N", help=room)
    parser.add_argument(
        "--system",
        "--system-prompt",
        dest="system",
        default="",
        metavar="TEXT",
        help="what stands in front",
    )
    which = (
        "a built-in template (llama3, chatml, ...), one of the folder's by name, or a file "
        "(default: the folder's)"
    )
    parser.add_argument("--chat-template", type=user_path, metavar="NAME", help=which)
    parser.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help='values for the template, as {"enable_thinking": false}',
    )
    parser.add_argument(
        "--prefill",
        default="",
        metavar="TEXT",
        help="words that every answer begins with, which the model continues",
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="one growing text, without a template"
    )


def run(options: argparse.Namespace) -> int:
    """Answer turn by turn until the input ends."""
    check_arguments(options)
    values = template_values(options)
    expected = (
        "expected text without white space at its end, where tokens would end in other places"
    )
    require(options.prefill == options.prefill.rstrip(), "--prefill", options.prefill, expected)
    sampling = sampling_of(options)
    adapters = named_adapters(options.adapter)
    from transom.chat.fingerprint import warn_if_other
    from transom.chat.reasoning import find_markers
    from transom.checkpoints.open_model import open_model
    from transom.inference.loop import check_language_model
    from transom.inference.session import AnswerArgs, GrowingText, Messages, Session

    opened = open_model(
        options.folder,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        chat_template=options.chat_template,
    )
    model, tokenizer = opened.model, opened.tokenizer
    check_language_model(model.args)
    beside = load_beside(model, opened.location, adapters)
    framing: Framing
    markers = None
    template = None if options.ignore_chat_template else opened.template
    if template is None:
        require(
            not options.prefill, "--prefill", options.prefill, "valid only with a chat template"
        )
        framing = GrowingText(tokenizer)
        why = (
            "the chat template is ignored"
            if options.ignore_chat_template
            else "this model has no chat template"
        )
        notice(f"{why}: each turn continues one growing text, on a new line; /help lists commands")
    else:
        template.conversation(
            [{"role": "user", "content": ""}], variables=values
        )  # refuses values now, not per turn
        framing = Messages(template, values, options.prefill)
        markers = find_markers(template, **values)
        notice(f"turns are written by {template.origin}; /help lists commands")
    for folder in beside:
        warn_if_other((folder,), tokenizer, template)
    stop_tokens: tuple[int, ...] = ()
    if not options.ignore_eos:
        stop_tokens = opened.stop_tokens if template is None else opened.turn_stop_tokens
    framing.reset(options.system)
    args = AnswerArgs(
        sampling=sampling,
        max_tokens=MAX_TOKENS if options.max_tokens is None else options.max_tokens,
        stop_tokens=stop_tokens,
        stop=stop_of(options, opened),
        prefill_step_size=options.prefill_step_size,
        show_special=options.show_special,
    )
    room = room_of(model, options.max_model_len)
    session = Session(
        model, tokenizer, framing, args, room, markers, when_full="/reset begins anew"
    )
    chat = Chat(session, options.system)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives `input` line editing
    while (turn := read_turn()) is not None:
        try:
            if turn.strip() and not chat.take(turn):
                break
        except (
            RequestError
        ) as error:  # the conversation is as before, and the next turn may do better
            notice(str(error), again=True)
    return 0


def template_values(options: argparse.Namespace) -> dict[str, Any]:
    """The object of --chat-template-config."""
    given = options.chat_template_config
    both = options.ignore_chat_template and (options.chat_template or given)
    require(
        not both,
        "--ignore-chat-template",
        True,
        "valid only without --chat-template and its values",
    )
    try:
        values = json.loads(given or "{}")
    except ValueError:
        values = None
    require(
        isinstance(values, dict),
        "--chat-template-config",
        given,
        'expected JSON as {"name": value}',
    )
    return dict(values)


def read_turn() -> str | None:
    """The next line and those it continues on; None when the input has ended."""
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
            print()  # as in a shell: what was typed is dropped
            lines, block = [], False
            continue
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 ({error})") from None
        if line.strip() == BLOCK and (block or not lines):
            if block:
                return "\n".join(lines)
            block = True
        elif block:
            lines.append(line)
        else:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)


class Chat:
    """Turns and commands of a person, and what they see of the answers."""

    def __init__(self, session: Session, system: str) -> None:
        self.session, self.system = session, system
        self.saved: set[Path] = set()

    def take(self, turn: str) -> bool:
        """Obey a command or answer a turn; False means leave."""
        command = COMMAND.fullmatch(turn)
        name, rest = (command[1], command[2] or "") if command else ("", turn)
        match name:
            case "":
                answer = self.session.ask(rest)
                self.session.keep(answer, interrupted=show(answer))
            case "reset":
                self.reset(self.system)
            case "system":
                self.reset(rest)
            case "adapter":
                switch(self.session.model, rest.strip())
                self.session.forget()
            case "save":
                self.save(rest.strip())
            case "help":
                print(HELP, flush=True)
            case "exit":
                return False
            case _:
                known = "/reset, /system, /adapter, /save, /help, /exit"
                raise RequestError(f"/{name}: no such command; known are {known}")
        return True

    def reset(self, system: str) -> None:
        """Begin anew with `system` in front; the cache keeps what the next prompt begins with
        too.
        """
        self.session.framing.reset(system)
        self.system = system

    def save(self, name: str) -> None:
        """Write the conversation so far, but not over a file that this chat did not write."""
        require(bool(name), "/save", name, "expected the name of a file")
        path, content = Path(name).expanduser(), self.session.framing.saved()
        require(
            path in self.saved or not path.exists(),
            "/save",
            name,
            "the file exists; expected a new name",
        )
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"/save {name}: {error.strerror}") from None
        self.saved.add(path)
        notice(f"{name}: {len(content)} characters written", again=True)


def room_of(model: LLM, requested: int | None) -> int:
    """Tokens that the chat's text may grow to; no limit for a model whose every layer forgets."""
    from transom.inference.loop import keeps_every_token

    limit = model.args.max_seq_len if keeps_every_token(model.args) else sys.maxsize
    if requested is None:
        return limit if limit == sys.maxsize else min(limit, MAX_CONTEXT)
    expected = f"expected 2 to {limit}, the model's max_seq_len"
    require(2 <= requested <= limit, "--max-model-len", requested, expected)
    return requested


def show(answer: Answer) -> bool:
    """Print an answer as it comes, its reasoning under a heading; return whether Ctrl-C cut it
    short.
    """
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
    """Standard output for one answer: reasoning has a heading, and is dim on a terminal."""

    def __init__(self, dim: bool) -> None:
        self.on, self.off = DIM if dim else ("", "")
        self.kind: Kind = "answer"

    def write(self, kind: Kind, text: str) -> None:
        """Print a piece, and a heading where it is of another kind than the one before."""
        if kind != self.kind:
            if kind == "reasoning":
                print(f"{self.on}[reasoning]\n", end="")
            else:
                print(f"{self.off}\n[answer]\n", end="")
            self.kind = kind
        print(text, end="", flush=True)

    def end(self) -> None:
        """End the line."""
        print(self.off if self.kind == "reasoning" else "", flush=True)

"""`transom chat`: turn by turn through the model's chat template, or as one growing text where it has none."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transom.cli.adapters import add_adapter_argument, load_beside, named_adapters, switch
from transom.cli.generate import (
    MAX_TOKENS,
    add_folder_arguments,
    add_model_arguments,
    check_arguments,
    open_model,
    sampling_of,
)
from transom.errors import RequestError, notice, require

if TYPE_CHECKING:
    from transom.chat.template import ChatTemplate
    from transom.checkpoints.folders import Found
    from transom.generation.sampling import SamplingArgs
    from transom.generation.text import Completion, TextStream
    from transom.model import LLM
    from transom.tokenizer import Tokenizer

MAX_CONTEXT = 8192  # tokens that a chat makes room for unless told: some models' own maximum fills a GPU
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # "// comment" and "/usr/bin" are text
HELP = """\
Every line is a turn; a \\ at its end takes the next line along, and so do lines between two lines of \"""\"""\""".
Ctrl-C stops an answer.
  /reset         begin anew; the text of /system stays
  /system TEXT   begin anew with TEXT in front, without TEXT with nothing
  /adapter NAME  answer with this adapter from now on, with none for none
  /save FILE     write the conversation so far into a new file
  /help          this page
  /exit          leave, as Ctrl-D does"""
BLOCK = '"""'  # alone on a line it begins and ends a turn of many lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_folder_arguments(parser)
    add_model_arguments(parser)
    add_adapter_argument(parser)
    room = f"tokens of text to make room for (default: the model's maximum, {MAX_CONTEXT} at most)"
    parser.add_argument("--max-model-len", type=int, metavar="N", help=room)
    parser.add_argument(
        "--system", "--system-prompt", dest="system", default="", metavar="TEXT", help="what stands in front"
    )
    which = (
        "a built-in template (llama3, chatml, ...), one of the folder's by name, or a file (default: the folder's)"
    )
    parser.add_argument("--chat-template", metavar="NAME", help=which)
    parser.add_argument(
        "--chat-template-config", metavar="JSON", help='values for the template, as {"enable_thinking": false}'
    )
    parser.add_argument("--ignore-chat-template", action="store_true", help="one growing text, without a template")


def run(options: argparse.Namespace) -> int:
    """Answer turn by turn until the input ends."""
    check_arguments(options)
    values = template_values(options)
    sampling = sampling_of(options)
    adapters = named_adapters(options.adapter)
    found, model, tokenizer, stop_tokens = open_model(options)
    beside = load_beside(model, found, adapters)
    from transom.chat.fingerprint import warn_if_other
    from transom.generation.stopping import stop_tokens_of

    framing: Framing
    template = None if options.ignore_chat_template else find_template(found, tokenizer, options.chat_template)
    if template is None:
        framing = GrowingText(tokenizer)
        why = "the chat template is ignored" if options.ignore_chat_template else "this model has no chat template"
        notice(f"{why}: each turn continues one growing text, on a new line; /help lists commands")
    else:
        framing = Messages(template, values)
        if not options.ignore_eos:
            stop_tokens = stop_tokens_of(found, tokenizer, template)
        notice(f"turns are written by {template.origin}; /help lists commands")
    for folders in (found.folders, *((folder,) for folder in beside)):
        warn_if_other(folders, tokenizer, template)
    framing.reset(options.system)
    chat = Chat(model, tokenizer, framing, stop_tokens, sampling, options)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives `input` line editing
    while (turn := read_turn()) is not None:
        try:
            if turn.strip() and not chat.take(turn):
                break
        except RequestError as error:  # the conversation is as before, and the next turn may do better
            notice(str(error), again=True)
    return 0


def template_values(options: argparse.Namespace) -> dict[str, Any]:
    """The object of --chat-template-config."""
    given = options.chat_template_config
    both = options.ignore_chat_template and (options.chat_template or given)
    require(not both, "--ignore-chat-template", True, "accepted without --chat-template and its values")
    try:
        values = json.loads(given or "{}")
    except ValueError:
        values = None
    require(isinstance(values, dict), "--chat-template-config", given, 'accepted is JSON as {"name": value}')
    return dict(values)


def find_template(found: Found, tokenizer: Tokenizer, name: str | None) -> ChatTemplate | None:
    """The template asked for, the adapter's or the model's own, or the one its vocabulary is made for."""
    from transom.chat.template import ChatTemplate, stored_templates

    adapters = (folder for folder in found.folders[:-1] if stored_templates(folder)[1])
    return ChatTemplate.find(next(adapters, found.model), tokenizer, name)


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


class Framing(Protocol):
    """How turns become the tokens that a model continues."""

    def reset(self, system: str) -> None:
        """Begin anew with `system` in front."""

    def prompt(self, turn: str) -> list[int]:
        """Ids to continue, all of the conversation and `turn`; nothing is kept yet."""

    def keep(self, turn: str, ids: list[int], completion: Completion, said: list[int]) -> None:
        """Take up a turn, its prompt `ids`, and the answer, whose ids but for stop tokens are `said`."""

    def saved(self) -> str:
        """The conversation as the text of a file."""


class GrowingText:
    """One text: every turn on a new line, every answer behind it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset("")

    def reset(self, system: str) -> None:
        """Begin anew with `system` on the first line."""
        self.system, self.text = system, ""
        self.ids: list[int] = []

    def added(self, turn: str) -> str:
        """What `turn` adds to the text."""
        if not self.ids:
            return f"{self.system}\n{turn}" if self.system else turn
        return turn if self.text.endswith("\n") else f"\n{turn}"

    def prompt(self, turn: str) -> list[int]:
        """The ids so far and those of the new line."""
        added = self.added(turn)
        return self.ids + self.tokenizer.encode(added) if self.ids else self.tokenizer.encode_prompt(added)

    def keep(self, turn: str, ids: list[int], completion: Completion, said: list[int]) -> None:
        """A stop token ends the answer, not the text: the next turn continues it."""
        self.text += self.added(turn) + completion.text + completion.stop_string
        self.ids = ids + said

    def saved(self) -> str:
        """The text."""
        return self.text


class Messages:
    """Messages, written by a chat template as a whole every time."""

    def __init__(self, template: ChatTemplate, values: dict[str, Any]) -> None:
        self.template, self.values = template, values
        self.messages: list[dict[str, str]] = []

    def reset(self, system: str) -> None:
        """Begin anew with `system` as the first message, and say so where the template leaves it out."""
        messages = [{"role": "system", "content": system}] if system else []
        if system:
            written = self.template.render([*messages, {"role": "user", "content": ""}], **self.values)
            if system.strip() not in written:
                notice(f"{self.template.origin} leaves the system message out", again=True)
        self.messages = messages

    def prompt(self, turn: str) -> list[int]:
        """Ids of all messages, and of the head of an answer."""
        return self.template.encode([*self.messages, {"role": "user", "content": turn}], **self.values)

    def keep(self, turn: str, ids: list[int], completion: Completion, said: list[int]) -> None:
        """Add both messages; what is cut short stays as it is."""
        self.messages.append({"role": "user", "content": turn})
        self.messages.append({"role": "assistant", "content": completion.text})

    def saved(self) -> str:
        """One line of a chat data set."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"


class Chat:
    """A conversation, and a cache that holds the beginning of it: only what is new is run."""

    def __init__(
        self,
        model: LLM,
        tokenizer: Tokenizer,
        framing: Framing,
        stop_tokens: tuple[int, ...],
        sampling: SamplingArgs,
        options: argparse.Namespace,
    ) -> None:
        self.model, self.tokenizer, self.framing, self.stop_tokens = model, tokenizer, framing, stop_tokens
        self.sampling, self.options, self.system = sampling, options, options.system
        self.room = room_of(model, options.max_model_len)
        self.cache = model.make_cache(1, self.room)
        self.held: list[int] = []  # the ids that the cache holds
        self.turns = 0
        self.saved: set[Path] = set()

    def take(self, turn: str) -> bool:
        """Obey a command or answer a turn; False means leave."""
        command = COMMAND.fullmatch(turn)
        name, rest = (command[1], command[2] or "") if command else ("", turn)
        match name:
            case "":
                self.answer(rest)
            case "reset":
                self.reset(self.system)
            case "system":
                self.reset(rest)
            case "adapter":
                switch(self.model, rest.strip())
                self.cache.reset()  # keys and values of the adapter before
                self.held = []
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

    def answer(self, turn: str) -> None:
        """Add `turn` and print how the model goes on; a `RequestError` leaves all as it was."""
        ids = self.framing.prompt(turn)
        left = self.room - len(ids)
        if left < 1:
            raise RequestError(f"{len(ids)} tokens with this turn: {self.full}")
        self.hold_only(ids)
        texts = self.continued(ids, min(self.wanted, left))
        interrupted = show(texts)
        completion = texts.completions[0]
        self.turns += 1
        self.framing.keep(turn, ids, completion, [id for id in completion.tokens if id not in self.stop_tokens])
        if interrupted:
            self.settle(len(ids), completion)
        elif completion.finish_reason == "length" and left <= self.wanted:
            notice(self.full, again=True)
        self.held = (ids + completion.tokens)[: int(self.cache.lengths_B[0])]

    def hold_only(self, ids: list[int]) -> None:
        """Make the cache hold a beginning of `ids`, and leave at least one to run.

        A template may write an answer otherwise than it was said: its end of turn, its reasoning, its spaces.
        """
        pairs = zip(self.held, ids[:-1], strict=False)
        same = next((at for at, (held, id) in enumerate(pairs) if held != id), min(len(self.held), len(ids) - 1))
        beyond = len(self.held) - same
        if beyond and not self.cache.rollback(beyond, beyond):
            self.cache.reset()  # a ring has overwritten what it needs
            same = 0
        self.held = self.held[:same]

    def continued(self, ids: list[int], max_new_tokens: int) -> TextStream:
        """The model's continuation of `ids`, not started yet."""
        from transom.generation.text import stream_text
        from transom.runtime import mixed_seed

        return stream_text(
            self.model,
            self.tokenizer,
            [ids],
            max_new_tokens=max_new_tokens,
            sampling=self.sampling,
            seeds=[mixed_seed(self.sampling.seed, self.turns)],  # every turn has draws of its own
            stop=self.options.stop,
            stop_tokens=self.stop_tokens,
            prefill_step_size=self.options.prefill_step_size,
            cache=self.cache,
        )

    def settle(self, prompt_tokens: int, completion: Completion) -> None:
        """After an interrupt, bring the cache back to a beginning of the conversation."""
        from transom.generation.loop import settle

        in_flight = 1 if completion.tokens else self.options.prefill_step_size
        settle(self.cache, at_most=prompt_tokens + len(completion.tokens), in_flight=in_flight)

    @property
    def wanted(self) -> int:
        """New tokens per answer, where there is room."""
        requested: int | None = self.options.max_tokens
        return MAX_TOKENS if requested is None else requested

    @property
    def full(self) -> str:
        """The sentence for a context without room."""
        return f"the context of {self.room} tokens is full; /reset begins anew"

    def reset(self, system: str) -> None:
        """Begin anew with `system` in front; the cache keeps what the next prompt begins with too."""
        self.framing.reset(system)
        self.system = system

    def save(self, name: str) -> None:
        """Write the conversation so far, but not over a file that this chat did not write."""
        require(bool(name), "/save", name, "accepted is the name of a file")
        path, content = Path(name), self.framing.saved()
        require(path in self.saved or not path.exists(), "/save", name, "the file exists; accepted is a new name")
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"/save {name}: {error.strerror}") from None
        self.saved.add(path)
        notice(f"{name}: {len(content)} characters written", again=True)


def room_of(model: LLM, requested: int | None) -> int:
    """Tokens that the chat's text may grow to; no limit for a model whose every layer forgets."""
    from transom.generation.loop import keeps_every_token

    limit = model.args.max_seq_len if keeps_every_token(model.args) else sys.maxsize
    if requested is None:
        return limit if limit == sys.maxsize else min(limit, MAX_CONTEXT)
    accepted = f"accepted is 2 to {limit}, the model's max_seq_len"
    require(2 <= requested <= limit, "--max-model-len", requested, accepted)
    return requested


def show(texts: TextStream) -> bool:
    """Print an answer as it comes; whether Ctrl-C cut it short."""
    interrupted = False
    try:
        for pieces in texts:
            print(pieces[0], end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    return interrupted

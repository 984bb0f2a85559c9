"""`transom chat`: one growing text, turn by turn, on a terminal or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from transom.cli.generate import MAX_TOKENS, add_model_arguments, check_arguments, open_model, sampling_of
from transom.errors import RequestError, notice, require

if TYPE_CHECKING:
    from transom.generation.sampling import SamplingArgs
    from transom.generation.text import Completion, TextStream
    from transom.model import LLM
    from transom.tokenizer import Tokenizer

MAX_CONTEXT = 8192  # tokens that a chat makes room for unless told: some models' own maximum fills a GPU
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)  # "// comment" and "/usr/bin" are text
HELP = """\
Every line continues the text; a \\ at its end takes the next line along. Ctrl-C stops an answer.
  /reset         begin anew; the text of /system stays
  /system TEXT   begin anew with TEXT in front, without TEXT with nothing
  /save FILE     write the text so far into a new file
  /help          this page
  /exit          leave, as Ctrl-D does"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("folder", metavar="FOLDER", help="a model folder, or a run folder for its best step")
    add_model_arguments(parser)
    room = f"tokens of text to make room for (default: the model's maximum, {MAX_CONTEXT} at most)"
    parser.add_argument("--max-model-len", type=int, metavar="N", help=room)


def run(options: argparse.Namespace) -> int:
    """Answer turn by turn until the input ends."""
    check_arguments(options)
    sampling = sampling_of(options)
    folder, model, tokenizer, stop_tokens = open_model(options)
    chat = Chat(model, tokenizer, stop_tokens, sampling, options)
    notice(f"{template_notice(folder)}: each turn continues one growing text, on a new line; /help lists commands")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives `input` line editing
    while (turn := read_turn()) is not None:
        try:
            if turn.strip() and not chat.take(turn):
                break
        except RequestError as error:  # the text is as before, and the next turn may do better
            notice(str(error))
    return 0


def template_notice(folder: Path) -> str:
    """Why turns are not framed as messages."""
    from transom.checkpoints.folders import read_json

    config = folder / "tokenizer_config.json"
    stored = config.exists() and "chat_template" in read_json(config)
    if stored or (folder / "chat_template.jinja").exists():
        return "the model's chat template is not applied"
    return "this model has no chat template"


def read_turn() -> str | None:
    """The next line and those it continues on; None when the input has ended."""
    lines: list[str] = []
    terminal = sys.stdin.isatty()
    while True:
        shown = "... " if lines else ">>> "
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
            lines = []
            continue
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 ({error})") from None
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


class Chat:
    """One text as token ids, and a cache that holds the beginning of it: only what is new is run."""

    def __init__(
        self,
        model: LLM,
        tokenizer: Tokenizer,
        stop_tokens: tuple[int, ...],
        sampling: SamplingArgs,
        options: argparse.Namespace,
    ) -> None:
        self.model, self.tokenizer, self.stop_tokens = model, tokenizer, stop_tokens
        self.sampling, self.options = sampling, options
        self.room = room_of(model, options.max_model_len)
        self.cache = model.make_cache(1, self.room)
        self.system = self.text = ""
        self.ids: list[int] = []
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
            case "save":
                self.save(rest.strip())
            case "help":
                print(HELP, flush=True)
            case "exit":
                return False
            case _:
                raise RequestError(f"/{name}: no such command; known are /reset, /system, /save, /help, /exit")
        return True

    def answer(self, turn: str) -> None:
        """Add `turn` to the text and print how the model goes on; a `RequestError` leaves all as it was."""
        text, ids = self.extended(turn)
        left = self.room - len(ids)
        if left < 1:
            raise RequestError(f"{len(ids)} tokens with this turn: {self.full}")
        texts = self.continued(ids, min(self.wanted, left))
        interrupted = show(texts)
        completion = texts.completions[0]
        # A stop token ends the answer, not the text: the next turn continues it.
        self.ids = ids + [id for id in completion.tokens if id not in self.stop_tokens]
        self.text = text + completion.text + completion.stop_string
        self.turns += 1
        if interrupted:
            self.settle(completion)
        elif completion.finish_reason == "length" and left <= self.wanted:
            notice(self.full)

    def extended(self, turn: str) -> tuple[str, list[int]]:
        """The text with `turn` on a new line behind it, and its ids."""
        if not self.ids:
            text = f"{self.system}\n{turn}" if self.system else turn
            return text, self.tokenizer.encode(text, add_bos=self.tokenizer.bos_id is not None)
        new = turn if self.text.endswith("\n") else f"\n{turn}"
        return self.text + new, self.ids + self.tokenizer.encode(new)

    def continued(self, ids: list[int], max_new_tokens: int) -> TextStream:
        """The model's continuation of `ids`, not started yet."""
        from transom.generation.text import stream_text

        return stream_text(
            self.model,
            self.tokenizer,
            [ids],
            max_new_tokens=max_new_tokens,
            sampling=self.sampling,
            seeds=[self.sampling.seed + self.turns],  # or every turn would be drawn with the same numbers
            stop=self.options.stop,
            stop_tokens=self.stop_tokens,
            prefill_step_size=self.options.prefill_step_size,
            cache=self.cache,
        )

    def settle(self, completion: Completion) -> None:
        """After an interrupt, bring the cache back to a beginning of the text."""
        from transom.generation.loop import settle

        in_flight = 1 if completion.tokens else self.options.prefill_step_size
        settle(self.cache, at_most=len(self.ids), in_flight=in_flight)

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
        """Begin anew with `system` in front."""
        self.system, self.text, self.ids = system, "", []
        self.cache.reset()

    def save(self, name: str) -> None:
        """Write the text so far, but not over a file that this chat did not write."""
        require(bool(name), "/save", name, "accepted is the name of a file")
        path = Path(name)
        require(path in self.saved or not path.exists(), "/save", name, "the file exists; accepted is a new name")
        try:
            path.write_text(self.text, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"/save {name}: {error.strerror}") from None
        self.saved.add(path)
        notice(f"{name}: {len(self.text)} characters written")


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

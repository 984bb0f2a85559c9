"""`transom <verb>`: imports the module of a verb, and prints errors as one line.

`run` of a verb returns the document that `--json` prints as the last line of standard output, or
an exit code (None is 0): 0 done, 1 the work failed, 2 the request was wrong, 128 + N ended by
signal N.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transom.base.errors import RequestError, WorkError, nearest, reset_notices
from transom.base.files import json_text
from transom.base.interrupts import (
    STOP_SIGNALS,
    STOPS,
    exit_code,
    handling,
    leave_background_calls,
    raise_stop,
)
from transom.base.processes import prints
from transom.base.version import __version__

# Python itself turns SIGINT into an exception.
ENDING = tuple(number for number in STOP_SIGNALS if number != signal.SIGINT)

# Each verb is a module transom.cli.VERB with add_arguments(parser) and run(options) -> exit code.
VERBS = {
    "demo": "train a small model on the source of this machine's Python library",
    "train": "train a model on your own text, from a config file or key=value fields",
    "finetune": "fine-tune a model: LoRA, all weights, DPO, GRPO and others",
    "data": "check and count fine-tuning data, or show an example token by token",
    "generate": "continue a prompt",
    "chat": "talk with a model, turn by turn",
    "embed": "compute a vector or a label for each text",
    "eval": "score one model, or compare two, on local files or tasks of lm-evaluation-harness",
    "bench": "measure the speed of a model, and its share of what the machine can do",
    "inspect": "show the layers, memory and FLOPs of a model, or compare two",
    "quantize": "write a model in four or eight bits per weight, and measure what that costs",
    "merge": "merge adapters into their base, and measure what changes",
    "convert": "write a model folder in another format",
    "verify": "compare every fast path with a slow reference on this machine",
}


# The messages of argparse, and what they become: FIELD: got VALUE; expected WHAT.
MESSAGES = (
    (r"argument (.+?): invalid int value: (.*)", r"\1: got \2; expected an integer"),
    (r"argument (.+?): invalid float value: (.*)", r"\1: got \2; expected a number"),
    (r"argument (.+?): invalid choice: (.*?) \(choose from (.*)\)", r"\1: got \2; expected \3"),
    (r"argument (.+?): not allowed with argument (.*)", r"\1: got it beside \2; expected only one"),
    (r"argument (.+?): (expected .*)", r"\1: got nothing; \2"),
    (r"the following arguments are required: (.*)", r"\1: got nothing; expected a value"),
    (r"unrecognized arguments: (.*)", r"arguments: got \1; expected only known ones"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a `RequestError` for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        for pattern, form in MESSAGES:
            message = re.sub(f"^{pattern}$", form, message)
        raise RequestError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # In a process of its own: garbage collections take a fifth of the time of `import torch`.
    gc.set_threshold(50_000 if argv is None else gc.get_threshold()[0])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings have frames of the C++ stack
    prepare_streams()
    reset_notices()
    with handling(raise_stop, ENDING):
        return _exit_code(words)


def _exit_code(words: list[str]) -> int:
    try:
        return _run(words)
    except (RequestError, WorkError) as error:
        if prints():
            print(f"transom: {error}", file=sys.stderr)
        code = 2 if isinstance(error, RequestError) else 1
        leave_background_calls(code)
        return code
    except STOPS as stop:
        if prints():
            print(f"transom: interrupted{f' by {stop}' if str(stop) else ''}", file=sys.stderr)
        leave_background_calls(exit_code(stop))
        return exit_code(stop)
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of our output has ended
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise  # a bug keeps its traceback
        what = "" if isinstance(error, OSError) else "out of memory: "
        print(f"transom: {what}{' '.join(str(error).split())}".rstrip(" :"), file=sys.stderr)
        return 1


def user_path(text: str) -> str:
    """Return a path with `~` expanded, which shells don't do in `--out=~/x`; an argparse type."""
    return os.path.expanduser(text)  # noqa: PTH111 - or a hub id, which must keep its spelling


def prepare_streams() -> None:
    """Replace closed standard streams by the null device, and escape characters that don't print.

    A closed stream is None in Python: reading it is an AttributeError, and `print` to a closed
    standard error writes to standard output. A character that the encoding of standard output lacks
    (cp1252 of pipes on Windows) is printed as an escape, as Python does on standard error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _out_of_memory(error: RuntimeError) -> bool:
    if "torch" not in sys.modules:
        return False
    from transom.base.runtime import is_out_of_memory

    return is_out_of_memory(error)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"transom {__version__}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        expected = f"expected one of {', '.join(VERBS)}{nearest(verb, VERBS)}"
        raise RequestError(f"verb: got {verb!r}; {expected}")
    command = importlib.import_module(f"transom.cli.{verb}")
    parser = Parser(prog=f"transom {verb}", description=VERBS[verb], allow_abbrev=False)
    command.add_arguments(parser)
    options = parser.parse_intermixed_args(words[1:])
    options.command = words  # for verbs that start themselves in several processes
    made = command.run(options)
    if not isinstance(made, dict):
        return int(made or 0)
    if options.json:
        emit_json(made)
    return 0


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, what in VERBS.items())
    last = "`transom <verb> --help` lists the options of a verb."
    return f"usage: transom <verb> [options]\n\n{verbs}\n\n{last}"


def emit_json(document: dict[str, Any]) -> None:
    """Print a JSON document, the last line of standard output with --json."""
    print(json_text(document), flush=True)


if __name__ == "__main__":
    sys.exit(main())

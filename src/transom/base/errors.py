"""The two errors that a user sees as one line, and notices on standard error."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from transom.base.processes import prints, rank


class RequestError(ValueError):
    """The request is wrong. Commands print the message and exit with 2."""


class WorkError(RuntimeError):
    """The request is right, but the work failed. Commands print the message and exit with 1."""


def require(condition: bool, field: str, value: object, reason: str) -> None:
    """Raise `RequestError` unless a condition holds.

    The message has the form `FIELD: got VALUE; REASON`; see `expect` for the usual reason.

    Args:
        condition: Whether the value is accepted.
        field: The name of the field, argument or file.
        value: The value, of which the `repr` is printed.
        reason: Why the value is not accepted, and what would be.
    """
    if not condition:
        raise RequestError(f"{field}: got {short_repr(value)}; {reason}")


def expect(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raise `RequestError` unless a condition holds: `FIELD: got VALUE; expected ACCEPTED`."""
    require(condition, field, value, f"expected {accepted}")


_EXPLAINED = (RequestError, WorkError, MemoryError)


class explained:
    """A context that turns errors of some kinds into one with a message, and theirs in brackets.

    Errors that have a sentence of their own already pass, and so does a lack of memory.

    Args:
        message: The message.
        *kinds: The kinds of errors.
        by: The kind of the error that is raised for them.
    """

    def __init__(
        self, message: str, *kinds: type[Exception], by: type[Exception] = RequestError
    ) -> None:
        self.message, self.kinds, self.by = message, kinds, by

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self.kinds) and not isinstance(error, _EXPLAINED):
            reason = str(getattr(error, "strerror", None) or error)  # the message names the file
            raise self.by(f"{self.message} ({' '.join(reason.split())[:300]})") from None


def optional(module: str, needs: str) -> Any:
    """Return a module that not every installation has; raise `RequestError` with `needs` if not."""
    with explained(needs, ImportError):
        return importlib.import_module(module)


class Problem(NamedTuple):
    """A part of a request that can't be used: its place, and the reason in one sentence."""

    where: str
    sentence: str


@contextmanager
def located(where: str, problems: list[Problem] | None = None) -> Iterator[None]:
    """Add a `RequestError` of the block to `problems`. Without a list, raise it with its place."""
    try:
        yield
    except RequestError as error:
        if problems is None:
            raise RequestError(f"{where}: {error}") from None
        problems.append(Problem(where, str(error)))


def short_repr(value: object, most: int = 200) -> str:
    """Return `repr(value)`, without its middle if it is longer than `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 43]}...{text[-40:]}"


def one_line(error: BaseException) -> str:
    """Return the class of an error, and the first 160 characters of its message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


_printed: set[str] = set()
_collectors: list[list[str]] = []


def notice(message: str, *, again: bool = False) -> None:
    """Print one line to standard error about what was chosen, skipped or repaired.

    The same text is printed once per process, unless `again` is True, which is for replies to what
    a user has just typed. Of several ranks on a machine only the first one prints.
    """
    for collector in _collectors:
        collector.append(message)
    if (again or message not in _printed) and prints():
        number = f"rank {rank()}: " if rank() else ""
        print(f"transom: {number}{message}", file=sys.stderr, flush=True)
    if not again:
        _printed.add(message)


@contextmanager
def collected_notices() -> Iterator[list[str]]:
    """Yield a list that receives the notices of the block, also those that were printed before."""
    messages: list[str] = []
    _collectors.append(messages)
    try:
        yield messages
    finally:
        _collectors.pop()


def reset_notices() -> None:
    """Forget which notices were printed. Call it when a command, a request or a test begins."""
    _printed.clear()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of the known words, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

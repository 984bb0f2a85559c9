"""The two ways a request can end badly, and the sentence that says so."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class RequestError(ValueError):
    """What was asked for cannot be done: one sentence, exit code 2, nothing written."""


class WorkError(RuntimeError):
    """The request was right, but the work itself failed: one sentence, exit code 1."""


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise a `RequestError` of the form `FIELD: got VALUE; expected WHAT` unless `condition`
    holds.
    """
    if not condition:
        raise RequestError(f"{field}: got {short_repr(value)}; {expected}")


def short_repr(value: object, most: int = 200) -> str:
    """Return `repr(value)`, without its middle where it is longer than `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 43]}...{text[-40:]}"


_printed: set[str] = set()


def notice(message: str, *, again: bool = False) -> None:
    """Print one line to standard error about what was chosen, skipped or repaired.

    The same text is printed once per process, however many parts of a command find the same thing.
    `again` prints it every time: for replies to what a user has just typed.
    """
    if again or message not in _printed:
        print(f"transom: {message}", file=sys.stderr, flush=True)
    if not again:
        _printed.add(message)


def reset_notices() -> None:
    """Forget which notices were printed: when a command, a server's request or a test begins."""
    _printed.clear()


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

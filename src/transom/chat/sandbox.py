"""Chat templates rendered in a child process.

A template is a program of a stranger. Jinja's sandbox keeps it from Python's internals, and the
kernel bounds the time and memory of the process that runs it (`renderer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from transom.base.errors import RequestError, expect
from transom.base.worker import Worker

MAX_SECONDS = 10.0  # of one request; published templates take milliseconds
MAX_SOURCE = 1_000_000  # characters of a template; published ones have up to 20,000
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@cache
def _worker() -> Worker:
    return Worker("transom.chat.renderer")


class SandboxedTemplate:
    """A template of one name: its source and what its code reads.

    Attributes:
        names: The variables that the template reads.
        generation: Whether `{% generation %}` blocks mark the words of the assistant.
    """

    def __init__(self, source: str, origin: str) -> None:
        self.source, self.origin = source, origin
        expect(
            len(source) <= MAX_SOURCE,
            f"{origin}: characters",
            len(source),
            f"at most {MAX_SOURCE}",
        )
        self.names = frozenset(self._ask({})["names"])
        self.generation = GENERATION.search(source) is not None

    def render(
        self, variables: Mapping[str, Any], now: datetime, marks: tuple[str, str] = ("", "")
    ) -> str:
        """Return the text for some variables.

        Args:
            variables: Plain data by name.
            now: The time that `strftime_now` returns.
            marks: Texts to write around the body of each `{% generation %}` block.
        """
        request = {"variables": variables, "now": now.isoformat(), "marks": marks}
        return str(self._ask(request)["text"])

    def render_beginnings(
        self, variables: Mapping[str, Any], now: datetime, beginnings: Sequence[tuple[int, bool]]
    ) -> Iterator[str | None]:
        """Yield the texts of several beginnings of the messages, with few requests.

        Args:
            variables: Plain data by name, with all messages.
            now: The time that `strftime_now` returns.
            beginnings: For each text, the number of messages and whether a prompt for an answer
                follows them.

        Yields:
            Each text: "" for no messages, and None if the template refuses them, since some want a
            question in every conversation.
        """
        request = {"variables": variables, "now": now.isoformat(), "marks": ("", "")}
        while beginnings:
            texts = self._ask({**request, "beginnings": beginnings})["texts"]
            yield from texts
            beginnings = beginnings[len(texts) :]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        reply = _worker().ask({"source": self.source, **request}, MAX_SECONDS)
        if reply is None:
            reply = {"error": f"stopped, since it did not end within {MAX_SECONDS:g} seconds"}
        if "error" in reply:
            raise RequestError(f"{self.origin}: {reply['error']}")
        return dict(reply)

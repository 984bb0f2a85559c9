"""Chat templates rendered in a child process.

A template is a program of a stranger. Jinja's sandbox keeps it from Python's internals, and the
kernel bounds the time and memory of the process that runs it (`renderer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any

from transom.base.errors import RequestError, require
from transom.base.worker import Worker

MAX_SECONDS = 10.0  # of one rendering; published templates take milliseconds
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
        require(
            len(source) <= MAX_SOURCE,
            f"{origin}: characters",
            len(source),
            f"expected at most {MAX_SOURCE}",
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

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        reply = _worker().ask({"source": self.source, **request}, MAX_SECONDS)
        if reply is None:
            reply = {"error": f"stopped, since it did not end within {MAX_SECONDS:g} seconds"}
        if "error" in reply:
            raise RequestError(f"{self.origin}: {reply['error']}")
        return dict(reply)

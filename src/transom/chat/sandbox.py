"""Chat templates rendered in a child process, and the texts of conversations that end earlier.

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
from transom.chat.marking import strings, unused_characters

MAX_SECONDS = 10.0  # of one rendering; published templates take milliseconds
MAX_SOURCE = 1_000_000  # characters of a template; published ones have up to 20,000
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@cache
def _worker() -> Worker:
    return Worker("transom.chat.renderer")


class Compiled:
    """A template of one name: its source and what its code reads.

    Attributes:
        names: The variables that the template reads.
        generation: Whether `{% generation %}` blocks mark the words of the assistant.
        steps: The number of first messages that the template reads at any time, if it provably
        writes one message
            after another; otherwise None.
    """

    def __init__(self, source: str, origin: str) -> None:
        self.source, self.origin = source, origin
        require(
            len(source) <= MAX_SOURCE,
            f"{origin}: characters",
            len(source),
            f"expected at most {MAX_SOURCE}",
        )
        facts = self._ask({})
        self.names, self.steps = frozenset(facts["names"]), facts["steps"]
        self.generation = GENERATION.search(source) is not None

    def render(
        self,
        variables: Mapping[str, Any],
        marks: tuple[str, str] = ("", ""),
        now: datetime | None = None,
        step: str = "",
    ) -> str:
        """Return the text for some variables.

        Args:
            variables: Plain data by name.
            marks: Texts to write around the body of each `{% generation %}` block.
            now: The time that `strftime_now` returns; by default the current time.
            step: A text to write before each message and after the last one, if `steps` is not
            None.
        """
        when = (now or datetime.now()).isoformat()
        text: str = self._ask({"variables": variables, "marks": marks, "now": when, "step": step})[
            "text"
        ]
        return text

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        reply = _worker().ask({"source": self.source, **request}, MAX_SECONDS)
        if reply is None:
            reply = {"error": f"stopped, since it did not end within {MAX_SECONDS:g} seconds"}
        if "error" in reply:
            raise RequestError(f"{self.origin}: {reply['error']}")
        return dict(reply)


class Prefixes:
    """The rendered texts of the first messages of a conversation.

    Two renderings give all of them if the template writes in steps. Otherwise each one is rendered
    by itself.
    """

    def __init__(
        self, compiled: Compiled, variables: Mapping[str, Any], now: datetime | None
    ) -> None:
        self._compiled, self._variables, self._now = compiled, variables, now or datetime.now()
        self._messages = variables["messages"]
        self._pieces: list[str] = []  # the text before each message, and that of the last message
        self._ends = (
            "",
            "",
        )  # what follows the last message without and with a prompt for an answer
        if compiled.steps is not None and len(self._messages) > 1:
            self._render_steps()

    def _render_steps(self) -> None:
        (mark,) = unused_characters(1, [self._compiled.source, *strings(dict(self._variables))])
        try:
            plain, asked = (
                self._render(len(self._messages), ask, mark).split(mark) for ask in (False, True)
            )
        except (
            RequestError
        ):  # the template refuses this conversation, and may accept a beginning of it
            return
        if len(plain) == len(self._messages) + 2 and asked[:-1] == plain[:-1]:
            self._pieces, self._ends = plain[:-1], (plain[-1], asked[-1])

    @property
    def in_steps(self) -> bool:
        """Whether all texts come from two renderings."""
        return bool(self._pieces)

    def text(self, count: int) -> str:
        """Return the text of the first `count` messages."""
        return self._text(count, False)

    def prompt(self, count: int) -> str | None:
        """Return the prompt for an answer to the first `count` messages; None if the template
        writes none.
        """
        try:
            return self._text(count, True) if count else None
        except RequestError:  # some templates want a question in every conversation
            return None

    def _text(self, count: int, ask: bool) -> str:
        if self._pieces and count >= (self._compiled.steps or 0):
            return "".join(self._pieces[: count + 1]) + self._ends[ask]
        return self._render(count, ask)

    def _render(self, count: int, ask: bool, step: str = "") -> str:
        talk = {"messages": self._messages[:count], "add_generation_prompt": ask}
        return self._compiled.render({**self._variables, **talk}, now=self._now, step=step)

"""The texts of a conversation that ends earlier, and the prompts for its answers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from transom.base.errors import RequestError
from transom.chat.marking import Marks, strings
from transom.chat.sandbox import Compiled


class Beginnings:
    """The texts of the first messages of a conversation.

    Two renderings give all of them if the template writes in steps. Otherwise each one is rendered
    by itself.
    """

    def __init__(
        self, compiled: Compiled, variables: Mapping[str, Any], now: datetime | None
    ) -> None:
        self._compiled, self._variables = compiled, dict(variables)
        self._now = now or datetime.now()
        self._messages = self._variables["messages"]
        self._edges: list[
            int
        ] = []  # the character at which each step begins, and the end of the last one
        self._text = self._end = self._head = ""
        if compiled.steps is not None and len(self._messages) > 1:
            self._render_steps()

    def _render_steps(self) -> None:
        mark = Marks.unused_in([self._compiled.source, *strings(self._variables)]).tag
        try:
            asked, whole = (
                self._compiled.render(
                    {**self._variables, "add_generation_prompt": prompt}, now=self._now, step=mark
                ).split(mark)
                for prompt in (True, False)
            )
        except RequestError:  # it refuses this conversation and may accept a beginning of it
            return
        if len(whole) != len(self._messages) + 2 or asked[:-1] != whole[:-1]:
            return
        length = 0
        for piece in whole[:-1]:
            length += len(piece)
            self._edges.append(length)
        self._text, self._end, self._head = "".join(whole[:-1]), whole[-1], asked[-1]

    @property
    def in_steps(self) -> bool:
        """Whether the beginnings are parts of one text; otherwise each of them is rendered by
        itself.
        """
        return bool(self._edges)

    def whole(self, count: int) -> str:
        """Return the text of the first `count` messages."""
        if self._known(count):
            return self._text[: self._edges[count]] + self._end
        return self._render(count, False)

    def prompt(self, count: int) -> str | None:
        """Return the prompt for an answer to the first `count` messages; None if the template
        writes none.
        """
        if count and self._known(count):
            return self._text[: self._edges[count]] + self._head
        try:
            return self._render(count, True) if count else None
        except RequestError:  # some templates want a question in every conversation
            return None

    def _known(self, count: int) -> bool:
        steps = self._compiled.steps
        return bool(self._edges) and steps is not None and count >= steps.reads

    def _render(self, count: int, prompt: bool) -> str:
        talk = {
            **self._variables,
            "messages": self._messages[:count],
            "add_generation_prompt": prompt,
        }
        return self._compiled.render(talk, now=self._now)

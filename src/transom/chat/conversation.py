"""A conversation prepared for one template: its text, marks and first messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

from transom.base.errors import RequestError
from transom.chat.marking import Marked, Marker, strings, unused_characters
from transom.chat.messages import open_last, without_parts
from transom.chat.sandbox import SandboxedTemplate


class Conversation:
    """The values that a template renders, in the form that it reads.

    Args:
        template: The template.
        given: The values of the caller, `messages` among them.
        variables: The values that the template has for every conversation.
        special_tokens: The spellings of control tokens.
        now: The time that `strftime_now` returns; by default the current time.
    """

    def __init__(
        self,
        template: SandboxedTemplate,
        given: dict[str, Any],
        variables: Mapping[str, Any],
        special_tokens: Collection[str],
        now: datetime | None = None,
    ) -> None:
        self.template, self.given, self.messages = template, given, given["messages"]
        self._variables, self._special_tokens = variables, special_tokens
        self._now = now or datetime.now()

    def _changed(self, messages: list[dict[str, Any]]) -> Conversation:
        """Return the conversation with other messages."""
        given = {**self.given, "messages": messages}
        return Conversation(self.template, given, self._variables, self._special_tokens, self._now)

    def _render(self, changes: Mapping[str, Any], **options: Any) -> str:
        values = {**self._variables, **self.given, **changes}
        return self.template.render(values, self._now, **options)

    def _unused(self, count: int, text: str = "") -> list[str]:
        """Return characters that neither the template nor any of its values nor `text` contains."""
        values = strings([dict(self._variables), self.given])
        return unused_characters(count, [self.template.source, text, *values])

    @cached_property
    def text(self) -> str:
        """The rendered text."""
        return self._render({})

    @cached_property
    def marked(self) -> Marked:
        """The rendered text with protected spans, generation blocks and places of texts.

        Raises:
            RequestError: If a control token that a message spells decides what the template writes.
        """
        unused, texts = self._unused(6, self.text), None
        for with_texts in (True, False):
            marker = Marker(self._special_tokens, unused, with_texts)
            values = marker.mark(self.given)
            try:
                chat = marker.strip(self._render(values, marks=marker.generation))
            except RequestError:
                chat = Marked()
            if chat.text == self.text:
                return chat if texts is None else replace(chat, texts=texts)
            # Marks of texts change what the template writes, so texts are found by their words.
            texts = [
                replace(one, written=set(range(one.marks if one.is_in(self.text) else 0)))
                for one in marker.texts
            ]
        spelled = sorted(
            {word for one in strings(self.given) for word in marker.words.findall(one)}
        )
        raise RequestError(
            f"{self.template.origin}: what it writes depends on the control tokens {spelled} "
            "inside of a message, so they cannot be kept as text; expected messages without them"
        )

    def continued(self, field: str) -> tuple[Conversation, int]:
        """Leave the last message open, so that a model continues a field of it.

        This is what transformers does, so that both continue the same text.

        Returns:
            A conversation whose text begins with the text to continue, and the length of that text.
        """
        tag = self._unused(1)[0] + " "
        name = f"messages[{len(self.messages) - 1}]"
        last, words = open_last(self.messages[-1], field, self.template.source, tag, name)
        opened = self._changed([*self.messages[:-1], last])
        at = opened.text.rfind(tag.strip())
        if at < 0 or words.strip() not in opened.text:
            raise RequestError(
                f"{self.template.origin}: does not write the last message as it is, so it cannot "
                "be continued; expected a message that this template writes"
            )
        # White space that the template strips after the tag is not part of the text.
        return opened, at if opened.text.startswith(tag, at) else len(opened.text[:at].rstrip())

    def refuse_unwritten_parts(self) -> None:
        """Raise `RequestError` if the template leaves out a part that is no text."""
        for name, kind, messages in without_parts(self.messages):
            if self._render({"messages": messages}) == self.text:
                raise RequestError(
                    f"{name}: {self.template.origin} leaves out a part of type {kind!r}; "
                    "expected a template that writes it"
                )

    # -- the first messages --

    @cached_property
    def _steps(self) -> tuple[list[str], str, str] | None:
        """The text before and of each message, and what follows, without and with a prompt.

        Two renderings give the texts of all first messages of a template that writes in steps.
        """
        if self.template.steps is None or len(self.messages) < 2:
            return None
        (mark,) = self._unused(1)
        try:
            plain, asked = (
                self._render({"add_generation_prompt": ask}, step=mark).split(mark)
                for ask in (False, True)
            )
        except RequestError:
            return None  # the template refuses this conversation, and may accept its beginning
        if len(plain) != len(self.messages) + 2 or asked[:-1] != plain[:-1]:
            return None
        return plain[:-1], plain[-1], asked[-1]

    @property
    def in_steps(self) -> bool:
        """Whether two renderings give the texts of all first messages."""
        return self._steps is not None

    def first(self, count: int) -> Conversation:
        """Return the conversation of the first `count` messages."""
        first = self._changed(self.messages[:count])
        if self._steps is not None and count >= (self.template.steps or 0):
            pieces, end, _ = self._steps
            first.text = "".join(pieces[: count + 1]) + end
        return first

    def prompt(self, count: int) -> str | None:
        """Return the prompt for an answer to the first `count` messages, or None."""
        if self._steps is not None and count >= max(1, self.template.steps or 0):
            pieces, _, asked = self._steps
            return "".join(pieces[: count + 1]) + asked
        first = {"messages": self.messages[:count], "add_generation_prompt": True}
        try:
            return self._render(first) if count else None
        except RequestError:  # some templates want a question in every conversation
            return None

"""A conversation prepared for one template: its text, marked text and first messages."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from transom.base.errors import RequestError
from transom.chat.marking import Marked, Marker, unused_characters
from transom.chat.messages import open_last, without_parts
from transom.chat.sandbox import SandboxedTemplate


@dataclass(frozen=True)
class Conversation:
    """The values that a template renders, in the form that it reads.

    Attributes:
        template: The template.
        given: The values of the caller, `messages` among them.
        variables: The values that the template has for every conversation.
        control_words: The spellings of control tokens.
        now: The time that `strftime_now` returns.
        length: The characters of `text` that are meant, where the last message is continued; None
            for all.
        rendered: The rendered text, if it is known already.
    """

    template: SandboxedTemplate
    given: Mapping[str, Any]
    variables: Mapping[str, Any]
    control_words: Collection[str]
    now: datetime
    length: int | None = None
    rendered: str | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages."""
        return list(self.given["messages"])

    def _changed(self, messages: list[dict[str, Any]], rendered: str | None = None) -> Conversation:
        """Return the conversation with other messages."""
        return replace(self, given={**self.given, "messages": messages}, rendered=rendered)

    def _render(self, given: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
        return self.template.render({**self.variables, **given}, self.now, marks)

    def _unused(self, count: int, text: str = "") -> list[str]:
        """Return characters that neither the template nor any of its values nor `text` contains."""
        return unused_characters(count, self.template.source, self.variables, self.given, text)

    @cached_property
    def text(self) -> str:
        """The rendered text."""
        return self._render(self.given) if self.rendered is None else self.rendered

    @cached_property
    def marked(self) -> Marked:
        """The rendered text with protected spans, generation blocks and texts.

        Raises:
            RequestError: If a control token that a message spells decides what the template writes.
        """
        unused = self._unused(6, self.text)
        for with_texts in (True, False):  # marks of texts may change what the template writes
            marker = Marker(self.control_words, unused, with_texts)
            values = marker.mark(self.given)
            try:
                chat = marker.strip(self._render(values, marker.generation))
            except RequestError:
                continue
            if chat.text == self.text:
                return chat
        spelled = sorted({*marker.words.findall(json.dumps(self.given, ensure_ascii=False))})
        raise RequestError(
            f"{self.template.origin}: what it writes depends on the control tokens {spelled} "
            "inside of a message, so they cannot be kept as text; expected messages without them"
        )

    def continued(self, field: str) -> Conversation:
        """Leave the last message open, so that a model continues a field of it.

        This is what transformers does, so that both continue the same text.
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
        kept = at if opened.text.startswith(tag, at) else len(opened.text[:at].rstrip())
        return replace(opened, length=kept)

    def refuse_unwritten_parts(self) -> None:
        """Raise `RequestError` if the template leaves out a part that is no text."""
        for name, kind, messages in without_parts(self.messages):
            if self._changed(messages).text == self.text:
                raise RequestError(
                    f"{name}: {self.template.origin} leaves out a part of type {kind!r}; "
                    "expected a template that writes it"
                )

    def answers(self, numbers: Sequence[int]) -> Iterator[tuple[Conversation, str | None]]:
        """Yield for each answer the conversation up to and including it, and the text of the prompt
        for it: "" if no message precedes it, and None if the template refuses those before it.
        """
        texts = self.beginnings([end for at in numbers for end in ((at + 1, False), (at, True))])
        for at, whole, prompt in zip(numbers, texts, texts, strict=True):
            yield self._changed(self.messages[: at + 1], whole), prompt

    def beginnings(self, ends: Sequence[tuple[int, bool]]) -> Iterator[str | None]:
        """Yield the texts of several beginnings, as `SandboxedTemplate.render_beginnings`."""
        return self.template.render_beginnings({**self.variables, **self.given}, self.now, ends)

"""How the turns of a conversation become the tokens that a model continues."""

from __future__ import annotations

import json
from typing import Any

from transom.chat.template import ChatTemplate
from transom.inference.text import Completion
from transom.tokenizers.tokenizer import Tokenizer


class GrowingText:
    """One text, in which every turn is a new line, followed by its answer."""

    prefill = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset("")

    def reset(self, system: str) -> None:
        """Start a new text whose first line is `system`, if any."""
        self.system, self.text = system, ""
        self.ids: list[int] = []

    def _added(self, turn: str) -> str:
        """Return what `turn` adds to the text."""
        if not self.ids:
            return f"{self.system}\n{turn}" if self.system else turn
        return turn if self.text.endswith("\n") else f"\n{turn}"

    def prompt(self, turn: str) -> list[int]:
        """Return the token ids of the text with `turn` on a new line, without adding it."""
        added = self._added(turn)
        if not self.ids:
            return self.tokenizer.encode_prompt(added)
        return self.ids + self.tokenizer.encode(added)

    def add(self, turn: str, message: dict[str, str], answer: Completion, ids: list[int]) -> None:
        """Add a turn and its answer; a stop token ends the answer, not the text.

        Args:
            turn: The text of the turn.
            message: The answer as a chat message, with reasoning apart.
            answer: The answer as it was generated, without the prefill.
            ids: The token ids of the conversation with both, without a stop token.
        """
        self.text += self._added(turn) + answer.text + answer.stop_string
        self.ids = ids

    def saved(self) -> str:
        """Return the text."""
        return self.text


class Messages:
    """Messages that a chat template renders again for every turn.

    Args:
        template: The chat template.
        values: Variables of the template.
        prefill: The text that every answer begins with.
    """

    def __init__(
        self, template: ChatTemplate, values: dict[str, Any] | None = None, prefill: str = ""
    ) -> None:
        self.template, self.values, self.prefill = template, values or {}, prefill
        self.messages: list[dict[str, str]] = []

    def reset(self, system: str) -> None:
        """Start a new conversation whose first message is `system`, if any."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt(self, turn: str) -> list[int]:
        """Return the token ids of all messages and the generation prompt, or the prefill."""
        messages = [*self.messages, {"role": "user", "content": turn}]
        if not self.prefill:
            return self.template.encode(messages, **self.values)
        messages.append({"role": "assistant", "content": self.prefill})
        return self.template.encode(messages, continue_final_message=True, **self.values)

    def add(self, turn: str, message: dict[str, str], answer: Completion, ids: list[int]) -> None:
        """Add both messages; the template decides whether it renders the reasoning again."""
        self.messages += [{"role": "user", "content": turn}, message]

    def saved(self) -> str:
        """Return one line of a chat data set."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"


Framing = GrowingText | Messages

"""`ChatTemplate` turns messages into the text and the token ids that a model was trained on.

    template = ChatTemplate.load(folder, tokenizer)
    ids = template.encode([{"role": "user", "content": "Hello"}])

Only words of the template become control tokens: a message that spells one stays text
(`marking.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, expect, notice
from transom.base.files import read_text, shown_name
from transom.chat import built_in
from transom.chat.conversation import Conversation
from transom.chat.files import (
    DEFAULT,
    FILE,
    stored_templates,
    variables_of,
    write_templates,
)
from transom.chat.marking import Marked, common_prefix
from transom.chat.messages import REASONING, CallForm, fit_content, message_data, plain
from transom.chat.sandbox import SandboxedTemplate
from transom.tokenizers.tokenizer import Tokenizer

Message = Mapping[str, Any]
TOOL_USE = "tool_use"
QUESTION = {"role": "user", "content": "Hello"}
PROBE = "Qx7answer"  # the words of an answer, which no template writes by itself
ANSWER = {"role": "assistant", "content": PROBE}


class ChatTemplate:
    """The chat template of one tokenizer.

    If there are several templates by name, `tool_use` renders conversations with tools and
    `default` renders all others.

    Args:
        sources: Jinja text, or several by name.
        tokenizer: The tokenizer whose control tokens the template writes.
        origin: Where the template comes from, for messages.
        variables: Values that the template reads besides the messages; names of control tokens come
            from the tokenizer.
        stop: Control tokens that end an answer, besides the one that the template writes after it.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str],
        tokenizer: Tokenizer,
        *,
        origin: str = "the chat template",
        variables: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.sources = {DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        self.origin, self.tokenizer = origin, tokenizer
        expect(bool(self.sources), origin, [], "one template or more")
        self._compiled = {
            name: SandboxedTemplate(
                source, origin if len(self.sources) == 1 else f"{origin} ({name})"
            )
            for name, source in self.sources.items()
        }
        self._variables = dict(variables or {})
        for role in ("bos", "eos", "pad", "unk"):
            id = getattr(tokenizer, f"{role}_id")
            if id is not None:
                self._variables.setdefault(f"{role}_token", tokenizer.id_to_token(id))
        self._stop = tuple(stop)
        self._forms: dict[str, CallForm] = {}
        self.now: datetime | None = None

    @property
    def variables_read(self) -> dict[str, Any]:
        """The values besides the messages that the template names."""
        names = frozenset().union(*(one.names for one in self._compiled.values()))
        return {name: value for name, value in self._variables.items() if name in names}

    @property
    def reads_time(self) -> bool:
        """Whether the text depends on the time."""
        return any("strftime_now" in source for source in self.sources.values())

    def at(self, now: datetime) -> ChatTemplate:
        """Return this template with a fixed time for `strftime_now`."""
        fixed = copy(self)
        fixed.now = now
        return fixed

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads from a model folder."""
        write_templates(folder, self.sources)

    # -- messages to text and ids --

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        *,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: Objects with `role` and `content`, as in the OpenAI API.
            tools: Descriptions of functions that the model may call.
            add_generation_prompt: Whether to write the beginning of an answer; by default True,
                unless the last message is continued.
            documents: Documents for templates that read any.
            continue_final_message: Leave the last message open, so that the model continues its
                content, or the field of this name.
            **variables: Values that this template reads, such as `enable_thinking`.

        Raises:
            RequestError: If the template refuses the messages or does not read one of the values.
        """
        open_field, asks = continue_final_message, add_generation_prompt
        talk = self.conversation(messages, tools, asks, documents, variables, open_field)
        return talk.text[: talk.length]

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        *,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> list[int]:
        """Return the token ids of `render`, with BOS where the template writes it, and only once.

        Texts that the template leaves out are printed, except reasoning, which templates leave out
        on purpose.

        Raises:
            RequestError: As `render`, and for a part that is no text and that the template leaves
                out.
        """
        open_field, asks = continue_final_message, add_generation_prompt
        talk = self.conversation(messages, tools, asks, documents, variables, open_field)
        lost = [one for one in talk.marked.texts if one.lost and one.path[-1] not in REASONING]
        for kind in sorted({one.kind(talk.given) for one in lost}):
            notice(f"{self.origin} leaves out: {kind}")
        talk.refuse_unwritten_parts()
        ids = self.ids_of(talk.marked.part(0, talk.length))
        return ids[self.first_of(ids) :]

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool | str = False,
    ) -> Conversation:
        """Return the arguments of `render` in the form that the template reads.

        Raises:
            RequestError: If the template does not read one of the values.
        """
        once = not (add_generation_prompt and continue_final_message)
        expected = "only one of it and add_generation_prompt"
        expect(once, "continue_final_message", continue_final_message, expected)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        given: dict[str, Any] = {
            "messages": [
                message_data(message, f"messages[{at}]") for at, message in enumerate(messages)
            ],
            "tools": plain(tools, "tools"),
            "documents": plain(documents, "documents"),
            **plain(variables or {}, "variables"),
            "add_generation_prompt": add_generation_prompt,
        }
        expect(bool(given["messages"]), "messages", [], "one message or more")
        chosen = self._chosen(tools is not None)
        for name in (*(name for name in ("tools", "documents") if given[name]), *(variables or ())):
            if name not in chosen.names:
                known = ", ".join(sorted(chosen.names - set(self._variables)))
                raise RequestError(
                    f"{name}: {chosen.origin} does not read it; expected one of {known}"
                )
        for at, message in enumerate(given["messages"]):
            fit_content(message, chosen.source, f"messages[{at}]")
            if message.get("tool_calls"):
                self._call_form(chosen).fit(message)
        words, now = self.tokenizer.special_tokens, self.now or datetime.now()
        talk = Conversation(chosen, given, self._variables, words, now)
        if not continue_final_message:
            return talk
        field = "content" if continue_final_message is True else continue_final_message
        name = f"messages[{len(messages) - 1}].{field}"
        expect(messages[-1].get(field) is not None, name, None, "text to continue")
        return talk.continued(field)

    def _chosen(self, with_tools: bool) -> SandboxedTemplate:
        """Return the template for a conversation, as transformers chooses it."""
        name = TOOL_USE if with_tools and TOOL_USE in self._compiled else DEFAULT
        names = sorted(self._compiled)
        expected = f"the name of one of them, since none is called {DEFAULT}"
        expect(name in names, self.origin, names, expected)
        return self._compiled[name]

    def _call_form(self, chosen: SandboxedTemplate) -> CallForm:
        if chosen.source not in self._forms:
            others = {"tools": None, "documents": None, "add_generation_prompt": False}
            values, now = {**self._variables, **others}, self.now or datetime.now()
            self._forms[chosen.source] = CallForm.of(
                lambda messages: chosen.render({**values, "messages": messages}, now)
            )
        return self._forms[chosen.source]

    # -- what training and evaluation read --

    def ids_of(self, chat: Marked) -> list[int]:
        """Return the token ids of a rendered chat; control words of messages stay text."""
        return self.tokenizer.encode(chat.text, allowed_special="all", protected=chat.protected)

    def first_of(self, ids: list[int]) -> int:
        """Return the index of the only BOS to keep, since some templates write several."""
        bos, first = self.tokenizer.bos_id, 0
        while bos is not None and ids[first : first + 2] == [bos, bos]:
            first += 1
        if first:
            notice(f"{self.origin}: writes {first + 1} BOS tokens in a row; one is kept")
        return first

    def answer_start(self, text: str, prompt: str) -> int | None:
        """Return the first character of the last message of a text, or None if it is not found.

        Args:
            text: The text of a conversation that ends with an answer.
            prompt: The text of the prompt for this answer, which may end with words that the text
                lacks, such as `<think>`; "" for the first message, which nothing asks for.
        """
        head = self.answer_head
        found = prompt.rfind(head) if prompt else text.find(head)
        end = found + len(head)
        return end if head and found >= 0 and text.startswith(prompt[:end]) else None

    def probe(self, *messages: Message, prompt: bool = False, **variables: Any) -> str | None:
        """Return the text of some messages, or None if the template refuses them."""
        try:
            return self.render(messages, add_generation_prompt=prompt, **variables)
        except RequestError:
            return None

    @cached_property
    def answer_head(self) -> str:
        """The text before the words of an answer, as far as the prompt for one has it too."""
        alone, asked = self.probe(QUESTION), self.probe(QUESTION, prompt=True)
        text = self.probe(QUESTION, ANSWER)
        if alone is None or asked is None or text is None:
            return ""
        start = common_prefix(alone, text)
        stop = min(common_prefix(asked, text), max(text.find(PROBE), 0))
        for begin, end in Marked(text).template_words(self.tokenizer.special_tokens):
            # No half of a control token.
            start, stop = (begin if begin < one < end else one for one in (start, stop))
        return text[start:stop]

    @cached_property
    def end_of_turn(self) -> str | None:
        """The token that this template writes after an answer, or None."""
        _, found, after = (self.probe(QUESTION, ANSWER) or "").rpartition(PROBE)
        control = "|".join(map(re.escape, self.tokenizer.special_tokens)) or "(?!)"
        # Some vocabularies do not call it a control token, but have it as one token all the same.
        match = re.match(rf"\s*({control})", after) or re.match(r"\s*(<[^<>\s]+>)", after)
        word = match[1] if found and match else ""
        return word if word and self.tokenizer.token_to_id(word) is not None else None

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, besides those that the folder's generation_config.json names."""
        words = [*([] if self.end_of_turn is None else [self.end_of_turn]), *self._stop]
        ids = [self.tokenizer.token_to_id(word) for word in words]
        return tuple(dict.fromkeys(id for id in ids if id is not None))

    # -- files --

    @classmethod
    def load(
        cls, folder: str | Path, tokenizer: Tokenizer, template: str | None = None
    ) -> ChatTemplate:
        """Return the chat template of a model folder, or a built-in one for its vocabulary.

        Args:
            folder: A model folder.
            tokenizer: The tokenizer of the folder.
            template: The name of a built-in template or of one of the folder's, or a file.

        Raises:
            RequestError: If there is no template.
        """
        if (found := cls.find(Path(folder), tokenizer, template)) is None:
            names = ", ".join(one.name for one in built_in.BUILT_IN)
            raise RequestError(
                f"{folder}: no chat template; expected a folder with {FILE}, or one of {names}"
            )
        return found

    @classmethod
    def find(
        cls, folders: Path | Sequence[Path], tokenizer: Tokenizer, template: str | None = None
    ) -> ChatTemplate | None:
        """Return what `load` returns for the first of some folders that has a template.

        Return None for a folder without a template whose vocabulary fits no built-in one.
        """
        several = [folders] if isinstance(folders, Path) else folders
        folder = next((one for one in several if stored_templates(one)[1]), several[-1])
        origin, stored = stored_templates(folder)
        sources: str | dict[str, str] = stored
        ready = None
        if template is None and not stored:
            if (ready := built_in.fitting(tokenizer)) is None:
                return None
            version, tokens = tokenizer.version, " ".join(ready.tokens)
            sign = f"is {version}" if version else f"has {tokens}"
            taken = f"its vocabulary {sign}: the built-in {ready.name} is taken"
            notice(f"{shown_name(folder)}: no chat template; {taken}")
        elif template is not None and template not in stored:
            ready = built_in.named(template)
        if ready is not None:
            sources, origin = ready.source(tokenizer), f"the built-in template {ready.name}"
        elif template in stored:
            sources, origin = stored[template], f"{origin} ({template})"
        elif template is not None:
            names = ", ".join([*stored, *(one.name for one in built_in.BUILT_IN)])
            expect(Path(template).is_file(), "chat template", template, f"a file or {names}")
            sources, origin = read_text(Path(template)), template
        stop = () if ready is None else ready.stop
        return cls(sources, tokenizer, origin=origin, variables=variables_of(folder), stop=stop)

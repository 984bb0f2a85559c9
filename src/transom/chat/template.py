"""`ChatTemplate`: messages to the text and the ids that a model was trained on, and which of them
it is to say.

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

from transom.base.errors import RequestError, notice, require
from transom.chat import built_in
from transom.chat.beginnings import Beginnings
from transom.chat.files import (
    DEFAULT,
    FILE,
    read_text,
    stored_templates,
    variables_of,
    write_templates,
)
from transom.chat.marking import (
    Marked,
    Marker,
    Marks,
    Text,
    TokenPlaces,
    kind_of,
    shared,
    strings,
    unprotected,
)
from transom.chat.messages import (
    JSON_RESULTS,
    READS_PARTS,
    REASONING,
    CallForm,
    Opened,
    call_form,
    joined_texts,
    message_data,
    open_last,
    plain,
    require_parts,
    result_as_json,
    wants_prompt,
)
from transom.chat.sandbox import Compiled
from transom.tokenizers.tokenizer import Tokenizer

Message = Mapping[str, Any]
TOOL_USE = "tool_use"
PROBE = "Qx7answer"


class ChatTemplate:
    """A template for one tokenizer; of several by name, `tool_use` is the one for conversations
    with tools.
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
        named = {DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        self.origin, self.tokenizer = origin, tokenizer
        self._compiled = {
            name: Compiled(source, origin if len(named) == 1 else f"{origin} ({name})")
            for name, source in named.items()
        }
        require(bool(named), origin, sorted(named), "expected one template or more")
        ids = {
            f"{role}_token": getattr(tokenizer, f"{role}_id")
            for role in ("bos", "eos", "pad", "unk")
        }
        self._variables = {
            name: tokenizer.id_to_token(id) for name, id in ids.items() if id is not None
        }
        self._variables |= variables or {}
        self._stop = tuple(stop)
        self._forms: dict[str, CallForm] = {}
        self.now: datetime | None = (
            None  # the time that `strftime_now` tells; None is that of each call
        )

    @property
    def sources(self) -> dict[str, str]:
        """The Jinja texts, by name."""
        return {name: one.source for name, one in self._compiled.items()}

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is told beside the messages, control tokens among it."""
        return dict(self._variables)

    @property
    def variables_read(self) -> dict[str, Any]:
        """Those of the variables that the template names."""
        names = frozenset().union(*(one.names for one in self._compiled.values()))
        return {name: value for name, value in self._variables.items() if name in names}

    @property
    def reads_time(self) -> bool:
        """Whether the text depends on the time."""
        return any("strftime_now" in one.source for one in self._compiled.values())

    def at(self, now: datetime) -> ChatTemplate:
        """Return this template with a fixed time."""
        fixed = copy(self)
        fixed.now = now
        return fixed

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads back from a model folder."""
        write_templates(folder, self.sources)

    # -- messages to text
    # ----------------------------------------------------------------------------

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
        """Return the text of a conversation and the head of an answer; `variables` are the
        template's own.

        `continue_final_message` leaves the last message open instead, for the model to go on with
        it: its content, or the field of that name.
        """
        prompt = wants_prompt(add_generation_prompt, continue_final_message)
        given = self.prepared(messages, tools, prompt, documents, variables)
        if continue_final_message:
            opened = self._opened(given, messages, continue_final_message)
            return opened.cut(self.text_of(opened.given))[0]
        return self.text_of(given)

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
        """Return the ids of `render`; BOS where the template writes it, and once."""
        prompt = wants_prompt(add_generation_prompt, continue_final_message)
        given = self.prepared(messages, tools, prompt, documents, variables)
        if continue_final_message:
            opened = self._opened(given, messages, continue_final_message)
            given, chat = opened.given, self.chat_of(opened.given)
            text, at = opened.cut(chat.text)
            protected = [(start, min(stop, at)) for start, stop in chat.protected if start <= at]
            chat = Marked(text, [(a, b) for a, b in protected if b <= len(text)], texts=chat.texts)
        else:
            chat = self.chat_of(given)
        self._tell_left_out(chat, given)
        require_parts(given, lambda fewer: self.text_of(fewer) == self.text_of(given), self.origin)
        ids = self.ids_of(chat)
        return ids[self.first_of(ids) :]

    def encode_with_mask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and a mask of assistant tokens that includes their ends
        of turns.

        The template's `{% generation %}` blocks define the mask. Without them, an answer lasts from
        its generation prompt to the end of its turn. Raise `RequestError` where neither can be
        found.
        """
        given = self.prepared(messages, tools, False, documents, variables)
        chat = self.chat_of(given, said=True)
        spans = chat.spans if self.chosen(given).generation else self._answers(given, chat)
        ids = self.ids_of(chat)
        mask = TokenPlaces(self.tokenizer, ids, chat.text, self.origin).mask(spans)
        first = self.first_of(ids)
        return ids[first:], mask[first:]

    def prepared(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the caller's values as plain data; values that the template does not read are
        refused.
        """
        given: dict[str, Any] = {
            "messages": [
                message_data(message, f"messages[{at}]") for at, message in enumerate(messages)
            ],
            "tools": None if tools is None else plain(list(tools), "tools"),
            "documents": None if documents is None else plain(list(documents), "documents"),
            **plain(dict(variables or {}), "variables"),
            "add_generation_prompt": add_generation_prompt,
        }
        require(bool(given["messages"]), "messages", [], "expected one message or more")
        chosen = self.chosen(given)
        for name in (*(name for name in ("tools", "documents") if given[name]), *(variables or ())):
            known = ", ".join(sorted(chosen.names - set(self._variables)))
            if name not in chosen.names:
                raise RequestError(
                    f"{name}: {chosen.origin} does not read it; expected are {known}"
                )
        for at, message in enumerate(given["messages"]):
            if isinstance(message.get("content"), list) and not READS_PARTS.search(chosen.source):
                message["content"] = joined_texts(message["content"], f"messages[{at}].content")
            if message["role"] == "tool" and JSON_RESULTS in chosen.source:
                result_as_json(message, f"messages[{at}]")
            if message.get("tool_calls"):
                self._call_form(chosen).fit(message)
        return given

    def chosen(self, given: Mapping[str, Any]) -> Compiled:
        """Return the template for this conversation, as transformers chooses it."""
        name = TOOL_USE if given["tools"] is not None and TOOL_USE in self._compiled else DEFAULT
        expected = (
            f"expected one of {', '.join(sorted(self._compiled))} by name; none is called {DEFAULT}"
        )
        require(name in self._compiled, self.origin, sorted(self._compiled), expected)
        return self._compiled[name]

    def _call_form(self, chosen: Compiled) -> CallForm:
        if chosen.source not in self._forms:
            more = {"tools": None, "documents": None, "add_generation_prompt": False}
            self._forms[chosen.source] = call_form(
                lambda messages: chosen.render(
                    {**self._variables, **more, "messages": messages}, now=self.now
                )
            )
        return self._forms[chosen.source]

    def _opened(
        self, given: dict[str, Any], messages: Sequence[Message], which: bool | str
    ) -> Opened:
        """Return the conversation with a mark at the end of its last message, which is to be
        continued.
        """
        chosen = self.chosen(given)
        tag = Marks.unused_in([chosen.source, *strings(self._variables), *strings(given)]).tag
        field = "content" if which is True else str(which)
        where = f"messages[{len(messages) - 1}].{field}"
        require(messages[-1].get(field) is not None, where, None, "expected text to go on from")
        return open_last(given, field, chosen.source, chosen.origin, f"{tag} ")

    # -- text to ids
    # ---------------------------------------------------------------------------------

    def text_of(self, given: Mapping[str, Any]) -> str:
        """Return the rendered text of what `prepared` returned."""
        return self.chosen(given).render({**self._variables, **given}, now=self.now)

    def chat_of(self, given: dict[str, Any], said: bool = False, text: str | None = None) -> Marked:
        """Return the rendered chat, which of its control words came in with messages, and which
        texts it writes.
        """
        chosen, now = self.chosen(given), self.now or datetime.now()
        text = chosen.render({**self._variables, **given}, now=now) if text is None else text
        marks = Marks.unused_in([chosen.source, text, *strings(self._variables), *strings(given)])
        around = marks.said if said else ("", "")
        texts: list[Text] = []
        for with_texts in (True, False):
            marker = Marker(self.tokenizer.special_tokens, marks, with_texts)
            marked = marker.mark(given)
            try:
                chat = marker.strip(chosen.render({**self._variables, **marked}, around, now))
            except RequestError:
                chat = Marked()
            if chat.text == text:
                chat.texts = chat.texts if with_texts else texts
                return chat
            texts = [one.found_in(text) for one in marker.texts or texts]
        spelled = sorted({word for one in strings(given) for word in marker.words_in(one)})
        raise RequestError(
            f"{chosen.origin}: what it writes depends on the control tokens {spelled} inside of "
            f"a message, so they cannot be kept as text; expected messages without them"
        )

    def ids_of(self, chat: Marked) -> list[int]:
        """Return the ids of a rendered chat; control words of messages stay text."""
        return self.tokenizer.encode(chat.text, allowed_special="all", protected=chat.protected)

    def first_of(self, ids: list[int]) -> int:
        """Return the index of the only BOS to keep, since some templates write several."""
        bos, first = self.tokenizer.bos_id, 0
        while bos is not None and ids[first : first + 2] == [bos, bos]:
            first += 1
        if first:
            notice(f"{self.origin}: writes {first + 1} BOS tokens in a row; one is kept")
        return first

    def _tell_left_out(self, chat: Marked, given: Mapping[str, Any]) -> None:
        """Print which texts the prompt lacks, except reasoning, which templates drop on purpose."""
        lost = {
            kind_of(one, given)
            for one in chat.texts or ()
            if one.lost and one.path[-1] not in REASONING
        }
        for kind in sorted(lost):
            notice(f"{self.origin} leaves out: {kind}")

    # -- what an assistant says
    # ----------------------------------------------------------------------

    def _answers(self, given: dict[str, Any], chat: Marked) -> list[tuple[int, int]]:
        """Where the answers stand: behind the prompt for each, up to the template's own end of the
        turn.
        """
        spans: list[tuple[int, int]] = []
        beginnings = self.beginnings(given)
        word = self.end_of_turn
        ends = [] if word is None else [stop for _, stop in unprotected(chat, [word])]
        for at, message in enumerate(given["messages"]):
            if message["role"] != "assistant":
                continue
            prompt = beginnings.prompt(at)
            behind = prompt is not None and chat.text.startswith(prompt)
            start = len(prompt or "") if behind else self.answer_start(given, at, chat)
            end = next((end for end in ends if start is not None and end > start), None)
            if (
                start is None or end is None or (spans and spans[-1][1] > start)
            ):  # gpt-oss: another end
                raise RequestError(
                    f"messages[{at}]: {self.chosen(given).origin} writes something else where "
                    f"this answer is asked "
                    "for, or no end of turn here or before; valid only for a mask is "
                    "a template with {% generation %} blocks"
                )
            spans.append((start, end))
        return spans

    def beginnings(self, given: Mapping[str, Any]) -> Beginnings:
        """Return the texts of the conversation up to each of its messages."""
        return Beginnings(self.chosen(given), {**self._variables, **given}, self.now)

    def answer_start(self, given: Mapping[str, Any], at: int, chat: Marked) -> int | None:
        """Return the first character of message `at` in a chat that does not begin with the prompt
        for it, or None.

        A prompt for a reasoning model may end with `<think>`, and nothing asks for the message that
        begins a chat. The answer follows the last head of an answer before its own words.
        """
        begin, last = chat.first_offset(at), at + 1 == len(given["messages"])
        if begin is None:  # nothing of it is written, but its frame is
            begin = len(chat.text) if last else chat.first_offset(at + 1)
            follows = not last and given["messages"][at + 1]["role"] == "assistant"
            begin = None if follows else begin
        if begin is None or not self.answer_head:
            return None
        earlier = (chat.last_offset(number) for number in range(at))
        floor = max(
            (offset for offset in earlier if offset is not None and offset < begin), default=0
        )
        found = chat.text.rfind(self.answer_head, floor, begin)
        return None if found < 0 else found + len(self.answer_head)

    @cached_property
    def answer_head(self) -> str:
        """The text before the words of an answer, as far as the template's prompt for one has it
        too.
        """
        question, answer = (
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": PROBE},
        )
        try:
            asked, begun = (
                self.render([question], add_generation_prompt=flag) for flag in (False, True)
            )
            whole = self.render([question, answer], add_generation_prompt=False)
        except RequestError:  # it accepts other conversations only
            return ""
        start, stop = shared(asked, whole), min(shared(begun, whole), max(whole.find(PROBE), 0))
        for begin, end in unprotected(Marked(whole), list(self.tokenizer.special_tokens)):
            start, stop = (
                begin if begin < one < end else one for one in (start, stop)
            )  # tokens stay whole
        return whole[start:stop]

    @cached_property
    def end_of_turn(self) -> str | None:
        """The token that this template writes after an answer, or None."""
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.render(turns, add_generation_prompt=False)
        except RequestError:  # it accepts other conversations only
            return None
        _, found, behind = text.rpartition(PROBE)
        control = re.match(
            rf"\s*({'|'.join(map(re.escape, self.tokenizer.special_tokens)) or '(?!)'})", behind
        )
        # Some vocabularies do not call it a control token, but have it as one token all the same.
        other = re.match(r"\s*(<[^<>\s]+>)", behind)
        word = control[1] if control else other[1] if other else None
        return (
            word
            if found and word is not None and self.tokenizer.token_to_id(word) is not None
            else None
        )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, beside those that the folder's generation_config.json names."""
        words = [*([] if self.end_of_turn is None else [self.end_of_turn]), *self._stop]
        ids = [self.tokenizer.token_to_id(word) for word in words]
        return tuple(dict.fromkeys(id for id in ids if id is not None))

    # -- files
    # ---------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, folder: str | Path, tokenizer: Tokenizer, template: str | None = None
    ) -> ChatTemplate:
        """The chat template of a model folder, or a built-in one that its control tokens ask for.

        `template` is the name of a built-in one or of one of the folder's, or a file. None at all
        is a `RequestError`.
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
        """Do as `load`, with the first of the folders that has a template, or else the last one.

        Return None for a folder without a template whose vocabulary is made for none.
        """
        several = [folders] if isinstance(folders, Path) else folders
        folder = next((one for one in several if stored_templates(one)[1]), several[-1])
        variables = variables_of(folder)
        origin, stored = stored_templates(folder)
        if stored and (template is None or template in stored):
            sources, name = (
                (stored, origin)
                if template is None
                else (stored[template], f"{origin} ({template})")
            )
            return cls(sources, tokenizer, origin=name, variables=variables)
        ready = built_in.fitting(tokenizer) if template is None else built_in.named(template)
        if ready is not None:
            if template is None:
                sign = (
                    f"is {tokenizer.version}"
                    if tokenizer.version
                    else f"has {' '.join(ready.tokens)}"
                )
                notice(
                    f"{folder}: no chat template; its vocabulary {sign}: the built-in "
                    f"{ready.name} is taken"
                )
            origin = f"the built-in template {ready.name}"
            return cls(
                ready.source(tokenizer),
                tokenizer,
                origin=origin,
                variables=variables,
                stop=ready.stop,
            )
        if template is None:
            return None
        names = [*stored, *(one.name for one in built_in.BUILT_IN)]
        require(
            Path(template).is_file(),
            "chat template",
            template,
            f"expected a file or {', '.join(names)}",
        )
        return cls(read_text(Path(template)), tokenizer, origin=template, variables=variables)

"""`ChatTemplate`: messages to the text and the ids that a model was trained on, and which of them it is to say.

    template = ChatTemplate.load(folder, tokenizer)
    ids = template.encode([{"role": "user", "content": "Hello"}])

Only words of the template become control tokens: a message that spells one stays text (`marking.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from transom.chat import built_in
from transom.chat.marking import Marked, Marker, Marks, mask_of, strings, token_ranges
from transom.chat.sandbox import Compiled
from transom.errors import RequestError, WorkError, notice, require
from transom.paths import read_json, refuse_pointer
from transom.tokenizer import Tokenizer
from transom.tokenizers.folder import TEMPLATES

Message = Mapping[str, Any]
FILE, CONFIG, OLD_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
DEFAULT, TOOL_USE = "default", "tool_use"
REASONING = ("reasoning_content", "thinking", "reasoning")
# A template that never names the text of a part of a message expects a string.
READS_PARTS = re.compile(r"""['"]text['"]|\.text\b""")


class ChatTemplate:
    """A template for one tokenizer; of several by name, `tool_use` is the one for conversations with tools."""

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
        accepted = f"accepted is one of {', '.join(sorted(named))} by name, as none of them is called {DEFAULT!r}"
        require(DEFAULT in named, origin, sorted(named), accepted)
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        ids |= {"pad_token": tokenizer.pad_id, "unk_token": tokenizer.unk_id}
        self._variables = {name: tokenizer.id_to_token(id) for name, id in ids.items() if id is not None}
        self._variables |= variables or {}
        self._stop = tuple(stop)

    @property
    def sources(self) -> dict[str, str]:
        """The Jinja texts, by name."""
        return {name: one.source for name, one in self._compiled.items()}

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is told beside the messages, control tokens among it."""
        return dict(self._variables)

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads back from a model folder."""
        others = {name: source for name, source in self.sources.items() if name != DEFAULT}
        try:
            (folder / FILE).write_text(self.sources[DEFAULT], encoding="utf-8")
            for name, source in others.items():
                (folder / TEMPLATES).mkdir(exist_ok=True)
                (folder / TEMPLATES / f"{name}.jinja").write_text(source, encoding="utf-8")
        except OSError as error:
            raise WorkError(f"{folder / FILE}: could not be written ({error})") from None

    # -- messages to text ----------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, with the head of an answer behind it; `variables` are the template's own."""
        given = self._given(messages, tools, add_generation_prompt, documents, variables)
        return self._chosen(given).render({**self._variables, **given})

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of `render`; BOS where the template writes it, and once."""
        given = self._given(messages, tools, add_generation_prompt, documents, variables)
        ids = self._ids(self._marked(given))
        return ids[self._first(ids) :]

    def encode_with_mask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """Ids of the whole conversation, and True for those that an assistant is to say, its end of turn too.

        `{% generation %}` in the template says which they are. Without it they are what stands between the prompt
        for an answer and the end of that turn; where the chat does not begin with that prompt, it is refused.
        """
        given = self._given(messages, tools, False, documents, variables)
        chat = self._marked(given, said=True)
        spans = chat.spans if self._chosen(given).generation else self._answers(given, chat)
        ids = self._ids(chat)
        mask = self._mask(ids, chat.text, spans)
        first = self._first(ids)
        return ids[first:], mask[first:]

    def _given(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        documents: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What the caller gives the template, as plain data, checked to be something that it reads."""
        given: dict[str, Any] = {
            "messages": [_message(message, f"messages[{at}]") for at, message in enumerate(messages)],
            "tools": None if tools is None else plain(list(tools), "tools"),
            "documents": None if documents is None else plain(list(documents), "documents"),
            **plain(dict(variables), "variables"),
            "add_generation_prompt": add_generation_prompt,
        }
        require(bool(given["messages"]), "messages", [], "accepted is one message or more")
        chosen = self._chosen(given)
        for name in (*(name for name in ("tools", "documents") if given[name]), *variables):
            accepted = f"this template reads {', '.join(sorted(chosen.names - set(self._variables)))}"
            require(name in chosen.names, f"{chosen.origin}: {name}", "given", accepted)
        if not READS_PARTS.search(chosen.source):
            for at, message in enumerate(given["messages"]):
                if isinstance(message.get("content"), list):
                    message["content"] = _joined(message["content"], f"messages[{at}].content")
        return given

    def _chosen(self, given: Mapping[str, Any]) -> Compiled:
        """The template for this conversation."""
        return self._compiled[TOOL_USE if given["tools"] is not None and TOOL_USE in self._compiled else DEFAULT]

    # -- text to ids ---------------------------------------------------------------------------------

    def _marked(self, given: dict[str, Any], said: bool = False) -> Marked:
        """The rendered chat, and which of its control words came in with the messages."""
        chosen, now = self._chosen(given), datetime.now()
        text = chosen.render({**self._variables, **given}, now=now)
        everything = [chosen.source, text, *strings(self._variables), *strings(given)]
        marker = Marker(self.tokenizer.special_tokens, Marks.unused_in(everything))
        marked = marker.mark(given)
        if marked == given and not said:
            return Marked(text)
        try:
            rendered = chosen.render({**self._variables, **marked}, marker.marks.said if said else ("", ""), now)
            chat = marker.strip(rendered)
        except RequestError:
            chat = Marked()
        if chat.text != text:
            spelled = sorted({word for one in strings(given) for word in marker.words_in(one)})
            raise RequestError(
                f"{chosen.origin}: what it writes depends on the control tokens {spelled} inside of a message, so "
                "they cannot be kept as text; accepted are messages without them"
            )
        return chat

    def _ids(self, chat: Marked) -> list[int]:
        return self.tokenizer.encode(chat.text, allowed_special="all", protected=chat.protected)

    def _first(self, ids: list[int]) -> int:
        """Where the ids begin: behind all but one BOS, as some templates write it beside the tokenizer's own."""
        bos, first = self.tokenizer.bos_id, 0
        while bos is not None and ids[first : first + 2] == [bos, bos]:
            first += 1
        if first:
            notice(f"{self.origin}: writes {first + 1} BOS tokens in a row; one is kept")
        return first

    # -- what an assistant says ----------------------------------------------------------------------

    def _answers(self, given: dict[str, Any], chat: Marked) -> list[tuple[int, int]]:
        """Where the answers stand: behind the prompt for each, up to the template's own end of the turn."""
        spans: list[tuple[int, int]] = []
        chosen, messages = self._chosen(given), given["messages"]
        ends = [] if self.end_of_turn is None else _unprotected(self.end_of_turn, chat)
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = {**self._variables, **given, "messages": messages[:at], "add_generation_prompt": True}
            start = len(prompt := chosen.render(asked)) if at else 0
            end = next((end for end in ends if end > start), None)
            open_before = bool(spans) and spans[-1][1] > start  # gpt-oss ends the last answer in its own way only
            if not at or end is None or open_before or not chat.text.startswith(prompt):
                raise RequestError(
                    f"messages[{at}]: {chosen.origin} writes something else where this answer is asked for, or no "
                    "end of turn here or before; accepted for a mask is a template with {% generation %} blocks"
                )
            spans.append((start, end))
        return spans

    def _mask(self, ids: list[int], text: str, spans: list[tuple[int, int]]) -> list[bool]:
        try:
            return mask_of(token_ranges(self.tokenizer, ids, text, self.origin), spans)
        except RequestError:  # some vocabularies know composed characters only
            composed = unicodedata.normalize("NFC", text)
            if composed == text:
                raise
        moved = {edge: len(unicodedata.normalize("NFC", text[:edge])) for span in spans for edge in span}
        spans = [(moved[start], moved[stop]) for start, stop in spans]
        return mask_of(token_ranges(self.tokenizer, ids, composed, self.origin), spans)

    @cached_property
    def end_of_turn(self) -> str | None:
        """The token that this template writes behind an answer; None where it writes none."""
        probe = "Qx7answer"
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": probe}]
        try:
            text = self.render(turns, add_generation_prompt=False)
        except RequestError:  # it accepts other conversations only
            return None
        _, found, behind = text.rpartition(probe)
        control = re.match(rf"\s*({'|'.join(map(re.escape, self.tokenizer.special_tokens)) or '(?!)'})", behind)
        # Some vocabularies do not call it a control token, but have it as one token all the same.
        other = re.match(r"\s*(<[^<>\s]+>)", behind)
        word = control[1] if control else other[1] if other else None
        return word if found and word is not None and self.tokenizer.token_to_id(word) is not None else None

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, beside those that the folder's generation_config.json names."""
        words = [*([] if self.end_of_turn is None else [self.end_of_turn]), *self._stop]
        ids = [self.tokenizer.token_to_id(word) for word in words]
        return tuple(dict.fromkeys(id for id in ids if id is not None))

    # -- files ---------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer, template: str | None = None) -> ChatTemplate:
        """The chat template of a model folder, or a built-in one that its control tokens ask for.

        `template` is the name of a built-in one or of one of the folder's, or a file. None at all is a
        `RequestError`.
        """
        found = cls.find(folder, tokenizer, template)
        accepted = f"accepted is a folder with {FILE}, or one of {', '.join(one.name for one in built_in.BUILT_IN)}"
        if found is None:
            raise RequestError(f"{folder}: no chat template; {accepted}")
        return found

    @classmethod
    def find(cls, folder: str | Path, tokenizer: Tokenizer, template: str | None = None) -> ChatTemplate | None:
        """`load` that returns None for a folder without a template whose vocabulary is made for none."""
        folder = Path(folder)
        variables = variables_of(folder)
        origin, stored = stored_templates(folder)
        if template is None and stored:
            return cls(stored, tokenizer, origin=origin, variables=variables)
        if template is not None and template in stored:
            return cls(stored[template], tokenizer, origin=f"{origin} ({template})", variables=variables)
        ready = built_in.fitting(tokenizer) if template is None else built_in.named(template)
        if ready is not None:
            if template is None:
                sign = f"is {tokenizer.version}" if tokenizer.version else f"has {' '.join(ready.tokens)}"
                notice(f"{folder}: no chat template; its vocabulary {sign}: the built-in {ready.name} is taken")
            origin = f"the built-in template {ready.name}"
            return cls(ready.source(tokenizer), tokenizer, origin=origin, variables=variables, stop=ready.stop)
        if template is None:
            return None
        names = [*stored, *(one.name for one in built_in.BUILT_IN)]
        require(Path(template).is_file(), "chat template", template, f"accepted is a file or {', '.join(names)}")
        return cls(read_text(Path(template)), tokenizer, origin=template, variables=variables)


def stored_templates(folder: Path) -> tuple[str, dict[str, str]]:
    """The file that a folder keeps its chat templates in, and those by name; none at all is an empty dict."""
    config, file = folder / CONFIG, folder / FILE
    in_config = _templates(read_json(config).get("chat_template"), config) if config.exists() else {}
    if file.exists():
        source = read_text(file)
        if in_config.get(DEFAULT, source) != source:
            notice(f"{folder}: {FILE} and {CONFIG} hold different chat templates; the first is taken")
        others = sorted((folder / TEMPLATES).glob("*.jinja"))
        return str(file), {**{one.stem: read_text(one) for one in others}, DEFAULT: source}
    if in_config or not (folder / OLD_FILE).exists():
        return str(config), in_config
    return str(folder / OLD_FILE), _templates(read_json(folder / OLD_FILE).get("chat_template"), folder / OLD_FILE)


def _templates(entry: Any, file: Path) -> dict[str, str]:
    """Templates by name, from a string or a list of `{"name": ..., "template": ...}`."""
    if entry is None:
        return {}
    named = [{"name": DEFAULT, "template": entry}] if isinstance(entry, str) else entry
    fits = isinstance(named, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in named
    )
    accepted = "accepted is a text, or a list of objects with a name and a template"
    require(fits, f"{file}: chat_template", type(entry).__name__, accepted)
    return {one["name"]: one["template"] for one in named}


def variables_of(folder: Path) -> dict[str, str]:
    """Tokens that tokenizer_config.json has names for (`image_token`), which templates write by these names."""
    if not (folder / CONFIG).exists():
        return {}
    config = read_json(folder / CONFIG)
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    contents = {
        name: entry.get("content") if isinstance(entry, dict) else entry
        for name, entry in named.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in contents.items() if isinstance(token, str)}


def read_text(file: Path) -> str:
    """Return the text of a template file."""
    refuse_pointer(file)
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RequestError(f"{file}: accepted is text in UTF-8 ({error})") from None


def _unprotected(word: str, chat: Marked) -> list[int]:
    """The ends of the places where the template itself writes `word`."""
    found = (match.span() for match in re.finditer(re.escape(word), chat.text))
    return [stop for start, stop in found if not any(start < end and begin < stop for begin, end in chat.protected)]


# -- messages ----------------------------------------------------------------------------------------


def plain(value: Any, name: str) -> Any:
    """A copy made of JSON's own types, so that a template meets nothing else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_key(key, name): plain(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{name}[{at}]") for at, one in enumerate(value)]
    raise RequestError(f"{name}: a {type(value).__name__}; accepted is what JSON can write")


def _key(key: object, name: str) -> str:
    require(isinstance(key, str), f"{name}: key", key, "accepted is text")
    return str(key)


def _message(message: Message, name: str) -> dict[str, Any]:
    """One message as plain data, its reasoning under the names that templates know."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{name}: accepted is an object with a role and a content")
    out: dict[str, Any] = plain(message, name)
    reasoning = next((out[key] for key in REASONING if out.get(key) is not None), None)
    if reasoning is not None:  # as transformers does: gpt-oss templates read `thinking`, all others the first
        out = {"thinking": reasoning, **out, "reasoning_content": reasoning}
    return out


def _joined(content: list[Any], name: str) -> str:
    """A list of texts as one text, for templates that know no parts."""
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
    require(all(isinstance(text, str) for text in texts), name, kinds, "this template reads parts of text only")
    return "".join(map(str, texts))

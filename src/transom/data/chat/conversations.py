"""`ChatExample`: one row of a data set for fine-tuning, whatever format it came in. No torch.

The format is recognised from the keys: `messages` (OpenAI's, with tools and weights), ShareGPT's
`conversations`, Alpaca's `instruction` and `output`, prompt and completion, `text`, pairs of
`chosen` and `rejected`, answers with a `label`, prompts with an `answer` to compare with. What is
not as a format says is one sentence.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transom.base.errors import RequestError, nearest, require
from transom.data.file_formats import parse_json

ExampleKind = Literal["chat", "completion", "text", "pair", "label", "answer"]
Message = dict[str, Any]
Messages = tuple[Message, ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = (
    *("role", "content", "name", "weight", "tool_calls", "tool_call_id"),
    *("reasoning_content", "thinking", "reasoning"),
)
FROM = {  # ShareGPT's words
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
REFERENCES = ("answer", "solution", "tests")


@dataclass(frozen=True)
class ChatExample:
    """One row; `kind` says which fields it has.

    `chat`: a conversation in `messages`. `completion`: `messages` are the prompt of its one answer.
    `label`: as before, and whether that answer is a good one. `pair`: two `answers`, the chosen one
    and the rejected one. `answer`: a prompt alone, and the `reference` that a reward compares with.
    `text`: plain `text`. A `bare` prompt and its answers are one text each, which without a chat
    template are written one behind the other.
    """

    id: str  # file and number of the row
    kind: ExampleKind
    messages: Messages = ()
    answers: tuple[Messages, ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None
    weight: float = 1.0  # of its loss
    label: bool | None = None
    reference: Mapping[str, Any] = field(default_factory=dict)
    bare: bool = False

    @property
    def needs_template(self) -> bool:
        """Return whether it is a conversation, which only a chat template can write."""
        return self.kind != "text" and not self.bare


class Format(NamedTuple):
    """A format by its name, the keys that tell it, other keys that it reads, and the fields it
    makes of a row.
    """

    name: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]

    def example(self, columns: Mapping[str, Any], id: str) -> ChatExample:
        """The row as a `ChatExample`."""
        return ChatExample(id, **self.fields(columns))

    def unread(self, columns: Mapping[str, Any]) -> list[str]:
        """Keys of a row, and of its messages as `messages.KEY`, that this format does not know."""
        known = (*self.needs, *self.reads)
        out = {key for key in columns if key not in known}
        for key in ("messages", "prompt", "completion", "chosen", "rejected"):
            turns = _listed(columns.get(key)) if key in known else None
            for turn in turns if isinstance(turns, list) else ():
                out |= {f"messages.{name}" for name in turn if name not in MESSAGE_KEYS}
        shared = _listed(columns.get("conversations")) if "conversations" in known else None
        for turn in shared if isinstance(shared, list) else ():
            read = MESSAGE_KEYS if "role" in turn else ("from", "value", "weight")
            out |= {f"conversations.{name}" for name in turn if name not in read}
        return sorted(out)


def recognise(columns: Mapping[str, Any]) -> Format:
    """The format of a row by its keys; the first of `FORMATS` whose keys are all there."""
    for one in FORMATS:
        if all(key in columns for key in one.needs):
            return one
    if "prompt" in columns and any(columns.get(key) is not None for key in REFERENCES):
        return PROMPT_AND_ANSWER
    keys = sorted(columns)
    require(bool(keys), "columns", None, "all are null; expected a row with a value")
    known = [key for one in FORMATS for key in one.needs]
    hint = next((hint for key in keys if (hint := nearest(key, known))), "")
    formats = "; ".join(" and ".join(one.needs) for one in FORMATS)
    raise RequestError(f"keys {keys}: expected rows with {formats}; prompt and answer{hint}")


# -- formats
# -----------------------------------------------------------------------------------------


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = messages_of(_listed(row["messages"]), "messages")
    common = {"messages": messages, "tools": _tools(row), "weight": _weight(row, "weight")}
    reference = _reference(row)
    if reference and messages[-1]["role"] != "assistant":
        return {"kind": "answer", **common, "reference": reference}
    require_answer(messages, "messages")
    return {"kind": "chat", **common}


def _sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = _listed(row["conversations"])
    expected = "expected a list of objects with from and value"
    require(isinstance(turns, list) and len(turns) > 0, "conversations", turns, expected)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") is not None else []
    said = [_sharegpt_turn(turn, f"conversations[{at}]") for at, turn in enumerate(turns)]
    messages = messages_of([*system, *said], "conversations")
    require_answer(messages, "conversations")
    return {
        "kind": "chat",
        "messages": messages,
        "tools": _tools(row),
        "weight": _weight(row, "weight"),
    }


def _sharegpt_turn(turn: Any, name: str) -> Any:
    if (
        not isinstance(turn, dict) or "role" in turn
    ):  # some sets keep OpenAI's messages under ShareGPT's key
        return turn
    expected = f"expected one of {', '.join(FROM)}"
    require(turn.get("from") in FROM, f"{name}.from", turn.get("from"), expected)
    more = {"weight": turn["weight"]} if "weight" in turn else {}
    return {"role": FROM[turn["from"]], "content": turn.get("value"), **more}


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    asked = _text(row["instruction"], "instruction")
    given = row.get("input")
    if given is not None and given != "":
        asked = f"{asked}\n\n{_text(given, 'input')}"
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": _text(row["output"], "output")},
    ]
    if row.get("system") is not None:
        turns.insert(0, {"role": "system", "content": row["system"]})
    return {
        "kind": "chat",
        "messages": messages_of(turns, "messages"),
        "weight": _weight(row, "weight"),
    }


def _completion(row: Mapping[str, Any]) -> dict[str, Any]:
    fields = _prompt_and_answers(row, row["prompt"], {"completion": row["completion"]})
    return {"kind": "completion", **fields, "weight": _weight(row, "weight")}


def _label(row: Mapping[str, Any]) -> dict[str, Any]:
    require(isinstance(row["label"], bool), "label", row["label"], "expected true or false")
    fields = _prompt_and_answers(row, row["prompt"], {"completion": row["completion"]})
    return {"kind": "label", **fields, "label": row["label"]}


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a pair; without a prompt of its own, it is what both answers begin
    with.
    """
    names = ("chosen", "rejected")
    answers = {name: [row[name]] if isinstance(row[name], dict) else row[name] for name in names}
    chosen, rejected = answers["chosen"], answers["rejected"]
    require(chosen != rejected, "rejected", rejected, "the same as chosen; expected another answer")
    prompt, cut = row.get("prompt"), 0
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = chosen[: _shared(chosen, rejected)]
        if isinstance(prompt, list):
            cut = len(prompt) if shared[: len(prompt)] == prompt else 0
        # Many sets keep the last question as text, too, beside conversations that hold it.
        elif prompt is None or any(
            isinstance(turn, dict) and turn.get("content") == prompt for turn in shared
        ):
            prompt, cut = shared, len(shared)
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        cut = _prompt_end(chosen, rejected)
        prompt = chosen[:cut]
    require(
        bool(prompt), "prompt", prompt, "expected one, or answers that begin with the same words"
    )
    return {
        "kind": "pair",
        **_prompt_and_answers(row, prompt, {name: one[cut:] for name, one in answers.items()}),
    }


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how far two texts, or two lists, are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves are compared in C: characters one by one take seconds on large sets
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _prompt_end(chosen: str, rejected: str) -> int:
    """Return where the common prompt of two texts ends, which is never inside a word.

    The prompt ends where the texts differ, as in TRL's `extract_prompt`, or before the word in
    which they differ. The space before a word belongs to that word, as in most vocabularies, so
    that prompt and answer have the same tokens as the text that both form. If one text is the
    beginning of the other, its last word is its answer.
    """
    cut, shorter = _shared(chosen, rejected), min(chosen, rejected, key=len)
    if cut == len(shorter):
        cut = max(0, len(shorter.rstrip()) - 1)
    while cut and any(_one_word(text[cut - 1], text[cut]) for text in (chosen, rejected)):
        cut -= 1
    last = chosen[cut - 1 : cut]
    return cut - (last.isspace() and last not in "\r\n")


def _one_word(before: str, after: str) -> bool:
    """Return whether two neighbouring characters are of one word, or of one run of white space.

    Chinese and Japanese are written without spaces: there every character may begin a word.
    """
    if before.isspace() or after.isspace():
        return before.isspace() and after.isspace()
    joined = (
        unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf") or before == "\u200d"
    )  # of emoji and accents
    return joined or not any(unicodedata.east_asian_width(one) in "WF" for one in (before, after))


def _prompt_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    fields = _prompt_and_answers(row, row["prompt"], {})
    return {"kind": "answer", **fields, "reference": _reference(row)}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "text", "text": _text(row["text"], "text"), "weight": _weight(row, "weight")}


PROMPT_AND_ANSWER = Format(
    "prompts with an answer", ("prompt",), (*REFERENCES, "tools"), _prompt_answer
)
# Those with more keys come first: a set of pairs may well keep its chosen conversations under
# `messages` too.
FORMATS = (
    Format("preference pairs", ("chosen", "rejected"), ("prompt", "tools"), _pair),
    Format("answers with a label", ("prompt", "completion", "label"), ("tools",), _label),
    Format("prompt and completion", ("prompt", "completion"), ("tools", "weight"), _completion),
    Format("messages", ("messages",), ("tools", "weight", *REFERENCES), _messages),
    Format("ShareGPT", ("conversations",), ("system", "tools", "weight"), _sharegpt),
    Format("Alpaca", ("instruction", "output"), ("input", "system", "weight"), _alpaca),
    Format("text", ("text",), ("weight",), _plain),
)


# -- parts of them
# -----------------------------------------------------------------------------------


def messages_of(value: Any, name: str) -> Messages:
    """Messages as plain data: contents are text or lists of parts, arguments of tool calls are
    objects or JSON.
    """
    expected = "expected a list of one message or more"
    require(isinstance(value, list) and len(value) > 0, name, value, expected)
    return tuple(_message(one, f"{name}[{at}]") for at, one in enumerate(value))


def _message(value: Any, name: str) -> Message:
    require(isinstance(value, dict), name, value, "expected an object with a role and a content")
    role, said = value.get("role"), value.get("role") == "assistant"
    require(role in ROLES, f"{name}.role", role, f"expected one of {', '.join(ROLES)}")
    out = {key: one for key, one in value.items() if one is not None}
    if "weight" in out:
        require(
            said,
            f"{name}.weight",
            out["weight"],
            f"expected no weight, which only messages of the assistant have, for {role}",
        )
        out["weight"] = _weight(out, "weight", f"{name}.weight")
    if "tool_calls" in out:
        calls = _listed(out["tool_calls"])
        fits = said and isinstance(calls, list)
        require(fits, f"{name}.tool_calls", calls, "expected a list, in messages of the assistant")
        out["tool_calls"] = [
            _call(call, f"{name}.tool_calls[{at}]") for at, call in enumerate(calls)
        ]
        if not out["tool_calls"]:
            del out["tool_calls"]
    content = out.get("content")
    if content is None and "tool_calls" in out:
        return out  # each template writes an empty content in its own way
    fits = isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(one, dict) for one in content)
    )
    require(fits, f"{name}.content", content, "expected text")
    out["content"] = content
    empty = not content.strip() if isinstance(content, str) else not content
    say = "this answer is empty; expected text, or tool_calls"
    require(not (said and empty) or "tool_calls" in out, f"{name}.content", content, say)
    return out


def _call(call: Any, name: str) -> Any:
    """Return a tool call whose arguments are an object, or an object as JSON text as in OpenAI's
    files.

    `chat/messages.py` gives a chat template the one that it can write.
    """
    function = call.get("function") if isinstance(call, dict) else None
    fits = isinstance(function, dict) and isinstance(function.get("name"), str)
    require(fits, name, call, "expected an object with a function, which has a name and arguments")
    given = function.get("arguments")  # type: ignore[union-attr]
    arguments = {} if given is None or given == "" else given
    parsed = arguments
    if isinstance(arguments, str):
        try:
            parsed = parse_json(arguments)
        except ValueError:
            parsed = None
    expected = "expected an object, or one as JSON"
    require(isinstance(parsed, dict), f"{name}.function.arguments", given, expected)
    return {**call, "function": {**function, "arguments": arguments}}  # type: ignore[dict-item]


def require_answer(messages: Messages, name: str) -> None:
    """Refuse a conversation in which the assistant says nothing."""
    roles = [message["role"] for message in messages]
    require(
        "assistant" in roles,
        f"roles of {name}",
        roles,
        "expected a conversation with an assistant's turn",
    )


def _prompt_and_answers(
    row: Mapping[str, Any], prompt: Any, answers: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a prompt and what is answered to it, each a text or messages."""
    bare = isinstance(prompt, str)
    if bare:
        messages: Messages = ({"role": "user", "content": _text(prompt, "prompt")},)
    else:
        messages = messages_of(prompt, "prompt")
    said: list[Messages] = []
    for name, answer in answers.items():
        if isinstance(answer, str):
            said.append(({"role": "assistant", "content": _text(answer, name)},))
            continue
        bare = False
        turns = messages_of(answer, name)
        fits = turns[0]["role"] == turns[-1]["role"] == "assistant"
        require(
            fits,
            f"roles of {name}",
            [turn["role"] for turn in turns],
            "expected answers of the assistant",
        )
        said.append(turns)
    return {"messages": messages, "answers": tuple(said), "tools": _tools(row), "bare": bare}


def _text(value: Any, name: str) -> str:
    fits = isinstance(value, str) and bool(value.strip())
    require(fits, name, value, "expected text that is not empty")
    return str(value)


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """Return tools, which are a list of objects, or None."""
    given = row.get("tools")
    tools = None if given == "" else _listed(given)
    fits = tools is None or (
        isinstance(tools, list) and all(isinstance(one, dict) for one in tools)
    )
    require(fits, "tools", given, "expected a list of objects, or one as JSON")
    return tuple(tools) if tools else None


def _listed(value: Any) -> Any:
    """Return the list in a text of JSON, as tables store messages and tools, and any other value
    unchanged.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value


def _weight(row: Mapping[str, Any], key: str, name: str = "weight") -> float:
    value = row.get(key)
    value = 1.0 if value is None else value
    fits = type(value) in (int, float) and 0 <= value <= sys.float_info.max
    require(fits, name, value, "expected a number of 0 or more")
    return float(value)


def _reference(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in REFERENCES if row.get(key) is not None}

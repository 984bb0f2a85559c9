"""`ChatExample`: one row of a data set for fine-tuning, in any of the formats that people use.

The keys of a row tell its format: `messages` (OpenAI's, with tools and weights), ShareGPT's
`conversations`, Alpaca's `instruction` and `output`, prompt and completion, `text`, pairs of
`chosen` and `rejected`, answers with a `label`, and prompts with an `answer` to compare with.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transom.base.errors import expect
from transom.chat.marking import common_prefix
from transom.data.chat.messages import (
    MESSAGE_KEYS,
    Messages,
    from_json,
    messages_of,
    tools_of,
    weight_of,
)
from transom.data.row_kinds import Columns, RowKind, recognise, text_of

ExampleKind = Literal["chat", "completion", "text", "pair", "label", "answer"]
SHAREGPT_KEYS = ("from", "value", "weight")
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
Keys = tuple[str, ...]
Fields = Callable[[Columns], dict[str, Any]]
TURNS = {"messages", "prompt", "completion", "chosen", "rejected", "conversations"}
REFERENCES = ("answer", "solution", "tests")


@dataclass(frozen=True)
class ChatExample:
    """One example of a data set.

    Attributes:
        id: The file and the number of the row.
        kind: `chat` is a conversation. `completion` is a prompt and its answer. `label` is the
            same with a `label`. `pair` is a prompt with a chosen and a rejected answer. `answer`
            is a prompt with a `reference`. `text` is a document.
        messages: The conversation, or the prompt.
        answers: The answers to the prompt, each as messages.
        text: The document.
        tools: Descriptions of functions that the model may call.
        weight: The loss weight of the example.
        label: Whether the answer is a good one.
        reference: What a reward compares the model's answer with.
        bare: Whether the prompt and the answers are one text each. Without a chat template they
            are written one after another.
    """

    id: str
    kind: ExampleKind
    messages: Messages = ()
    answers: tuple[Messages, ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None
    weight: float = 1.0
    label: bool | None = None
    reference: Mapping[str, Any] = field(default_factory=dict)
    bare: bool = False

    @property
    def needs_template(self) -> bool:
        """Return whether it is a conversation, which only a chat template can write."""
        return self.kind != "text" and not self.bare


def example_of(columns: Columns, id: str) -> ChatExample:
    """Return a row as an example. Raise `RequestError` if it is malformed."""
    format = recognise(columns, FORMATS)
    return format.make(format.read(columns), id)


# -- formats ---------------------------------------------------------------------------------------


def _messages(row: Columns) -> dict[str, Any]:
    return _chat(row["messages"], "messages", _reference(row))


def _chat(turns: Any, name: str, reference: Mapping[str, Any] | None = None) -> dict[str, Any]:
    messages = messages_of(turns, name)
    roles = [message["role"] for message in messages]
    if reference and roles[-1] != "assistant":
        return {"kind": "answer", "messages": messages, "reference": reference}
    expected = "a conversation with an assistant's turn"
    expect("assistant" in roles, f"roles of {name}", roles, expected)
    return {"kind": "chat", "messages": messages}


def _sharegpt(row: Columns) -> dict[str, Any]:
    turns = from_json(row["conversations"])
    if isinstance(turns, list):
        turns = [_sharegpt_turn(turn, f"conversations[{at}]") for at, turn in enumerate(turns)]
        turns = _system(row) + turns if turns else turns
    return _chat(turns, "conversations")


def _sharegpt_turn(turn: Any, name: str) -> Any:
    if not isinstance(turn, dict) or "role" in turn:  # some sets have OpenAI's messages there
        return turn
    expected = f"one of {', '.join(SHAREGPT_ROLES)}"
    expect(turn.get("from") in SHAREGPT_ROLES, f"{name}.from", turn.get("from"), expected)
    role = SHAREGPT_ROLES[turn["from"]]
    return {"role": role, "content": turn.get("value"), "weight": turn.get("weight")}


def _alpaca(row: Columns) -> dict[str, Any]:
    question = text_of(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        question = f"{question}\n\n{text_of(row['input'], 'input')}"
    answer = {"role": "assistant", "content": text_of(row["output"], "output")}
    turns = [*_system(row), {"role": "user", "content": question}, answer]
    return _chat(turns, "messages")


def _system(row: Columns) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") is not None else []


def _completion(row: Columns) -> dict[str, Any]:
    answers = {"completion": row["completion"]}
    return {"kind": "completion", **_prompt_and_answers(row["prompt"], answers)}


def _label(row: Columns) -> dict[str, Any]:
    expect(isinstance(row["label"], bool), "label", row["label"], "true or false")
    return {**_completion(row), "kind": "label", "label": row["label"]}


def _pair(row: Columns) -> dict[str, Any]:
    """Return a pair. Its prompt may be the common beginning of both answers."""
    chosen, rejected = (
        [row[name]] if isinstance(row[name], dict) else row[name] for name in ("chosen", "rejected")
    )
    expect(chosen != rejected, "rejected", rejected, "another answer than chosen")
    prompt, cut = row.get("prompt"), 0
    if isinstance(chosen, list) and isinstance(rejected, list):
        common = chosen[: common_prefix(chosen, rejected)]
        # Many sets have the last question as text besides conversations that contain it.
        contents = [turn.get("content") for turn in common if isinstance(turn, dict)]
        prompt = common if prompt is None or prompt in contents else prompt
        if isinstance(prompt, list) and common[: len(prompt)] == prompt:
            cut = len(prompt)
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        cut = _prompt_end(chosen, rejected)
        prompt = chosen[:cut]
    expect(bool(prompt), "prompt", prompt, "one, or answers that begin with the same words")
    answers = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
    return {"kind": "pair", **_prompt_and_answers(prompt, answers)}


def _prompt_answer(row: Columns) -> dict[str, Any]:
    fields = _prompt_and_answers(row["prompt"], {})
    return {"kind": "answer", **fields, "reference": _reference(row)}


def _plain(row: Columns) -> dict[str, Any]:
    return {"kind": "text", "text": text_of(row["text"], "text")}


def _format(name: str, needs: Keys, reads: Keys, fields: Fields) -> RowKind[ChatExample]:
    """Return a format of rows. `fields` returns those of the example but `tools` and `weight`."""

    def make(columns: Columns, id: str) -> ChatExample:
        tools, weight = tools_of(columns), weight_of(columns)
        return ChatExample(id, **fields(columns), tools=tools, weight=weight)

    return RowKind(name, needs, reads, make, _unread_in_turns)


def _unread_in_turns(columns: Columns) -> set[str]:
    """Return the keys of the messages of a row, as `messages.KEY`, that are not read."""
    out = set()
    for key in TURNS & columns.keys():
        turns, shared = from_json(columns[key]), key == "conversations"
        for turn in turns if isinstance(turns, list) else ():
            known = turn if isinstance(turn, dict) else {}  # a text may look like a list
            read = SHAREGPT_KEYS if shared and "role" not in known else MESSAGE_KEYS
            out |= {f"{key if shared else 'messages'}.{one}" for one in known if one not in read}
    return out


# Formats with more keys come first, because a set of pairs may also have its chosen conversations
# under `messages`.
FORMATS = (
    _format("preference pairs", ("chosen", "rejected"), ("prompt", "tools"), _pair),
    _format("answers with a label", ("prompt", "completion", "label"), ("tools",), _label),
    _format("prompt and completion", ("prompt", "completion"), ("tools", "weight"), _completion),
    _format("messages", ("messages",), ("tools", "weight", *REFERENCES), _messages),
    _format("ShareGPT", ("conversations",), ("system", "tools", "weight"), _sharegpt),
    _format("Alpaca", ("instruction", "output"), ("input", "system", "weight"), _alpaca),
    _format("text", ("text",), ("weight",), _plain),
    *(
        _format("prompts with an answer", ("prompt", key), (*REFERENCES, "tools"), _prompt_answer)
        for key in REFERENCES
    ),
)


# -- parts of formats ------------------------------------------------------------------------------


def _prompt_and_answers(prompt: Any, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a prompt and the answers to it, each of which is a text or messages."""
    made = [
        ({"role": "assistant", "content": text_of(answer, name)},)
        if isinstance(answer, str)
        else messages_of(answer, name)
        for name, answer in answers.items()
    ]
    for name, turns in zip(answers, made, strict=True):
        roles = [turn["role"] for turn in turns]
        fits = roles[0] == roles[-1] == "assistant"
        expect(fits, f"roles of {name}", roles, "answers of the assistant")
    bare = all(isinstance(one, str) for one in (prompt, *answers.values()))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": text_of(prompt, "prompt")}]
    return {"messages": messages_of(prompt, "prompt"), "answers": tuple(made), "bare": bare}


def _prompt_end(chosen: str, rejected: str) -> int:
    """Return where the common prompt of two texts ends, which is never inside a word.

    The prompt ends where the texts differ, as in TRL's `extract_prompt`, or before the word in
    which they differ. The space before a word belongs to that word, as in most vocabularies, so
    that prompt and answer have the same tokens as the joint text. If one text is the beginning of
    the other, its last word is its answer.
    """
    cut, shorter = common_prefix(chosen, rejected), min(chosen, rejected, key=len)
    if cut == len(shorter):
        cut = max(0, len(shorter.rstrip()) - 1)
    while cut and any(_one_word(text[cut - 1], text[cut]) for text in (chosen, rejected)):
        cut -= 1
    last = chosen[cut - 1 : cut]
    return cut - (last.isspace() and last not in "\r\n")


def _one_word(before: str, after: str) -> bool:
    """Return whether neighbouring characters belong to one word, or to one run of white space.

    Chinese and Japanese are written without spaces, so there every character may begin a word.
    """
    if before.isspace() or after.isspace():
        return before.isspace() and after.isspace()
    # Accents and the parts of an emoji.
    joined = unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf") or before == "\u200d"
    return joined or not any(unicodedata.east_asian_width(one) in "WF" for one in (before, after))


def _reference(row: Columns) -> dict[str, Any]:
    return {key: row[key] for key in REFERENCES if row.get(key) is not None}

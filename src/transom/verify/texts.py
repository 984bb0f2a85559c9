"""The tokenizer and the chat template of a folder: BOS once, what a user spells stays text, and
chats have the ids that `transformers` gives them, where it is installed.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, notice
from transom.chat.files import stored_templates
from transom.chat.template import ChatTemplate, Message
from transom.checkpoints.open_model import load_tokenizer
from transom.tokenizers.tokenizer import Tokenizer
from transom.verify.findings import Finding, one_line
from transom.verify.tiny_runs import quiet

FILES = ("tokenizer.json", "tekken*.json", "tokenizer.model", "*.model.v*")
_USER: Message = {"role": "user", "content": "Hello"}
_ANSWER: Message = {"role": "assistant", "content": "Good day."}
IDS = "chat ids = transformers"
CHATS: dict[str, Sequence[Message]] = {
    "a question": [_USER],
    "three turns": [_USER, _ANSWER, {"role": "user", "content": "And now?"}],
    "a system message": [{"role": "system", "content": "Be brief."}, _USER],
}


def compare_texts(folder: Path, name: str) -> Iterator[Finding]:
    """All comparisons of a folder's texts; one without a tokenizer has none, which is said."""
    if not any(any(folder.glob(pattern)) for pattern in FILES):
        notice(f"{name}: no tokenizer in the folder: no texts are compared")
        return
    tokenizer = load_tokenizer(folder)
    try:
        yield from spelled(tokenizer, name)
    except RequestError as error:  # a vocabulary of few characters writes none of these texts
        notice(f"{name}: no texts are compared: {error}")
        return
    try:
        template = ChatTemplate.find(folder, tokenizer)
    except RequestError as error:  # made for a chat format that is not built in
        notice(f"{name}: no chats are compared: {error}")
        return
    if template is None:
        notice(f"{name}: no chat template: no chats are compared")
        return
    refused = []
    for what, messages in CHATS.items():
        try:
            yield from begun_once(template, messages, f"{name}, {what}")
        except RequestError as error:  # some templates have no system message
            refused.append(f"{what} ({error})")
    if refused:
        notice(f"{name}: the chat template refuses {'; '.join(refused)}")
    yield from spelled_in_a_chat(template, name)
    if stored_templates(folder)[1]:
        yield from as_in_transformers(folder, template, name)


def as_in_transformers(folder: Path, template: ChatTemplate, name: str) -> Iterator[Finding]:
    """Ids of prompts for an answer and of a whole chat, against what transformers makes of the
    folder.
    """
    if find_spec("transformers") is None:
        notice(f"{name}: transformers is not installed: no chats are compared with it")
        return
    transformers: Any = importlib.import_module("transformers")
    try:
        with quiet():
            theirs = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever another library raises
        notice(
            f"{name}: no chats are compared: transformers cannot load the tokenizer "
            f"({one_line(error)})"
        )
        return
    for what, messages in CHATS.items():
        yield from same_ids(template, theirs, messages, True, f"{name}, {what}")
    yield from same_ids(template, theirs, [_USER, _ANSWER], False, f"{name}, an answered question")


def same_ids(
    template: ChatTemplate, theirs: Any, messages: Sequence[Message], prompt: bool, where: str
) -> Iterator[Finding]:
    """One comparison, behind any BOS, which another check counts; a chat that both refuse has
    none.
    """
    tokenizer, mine, refusal = template.tokenizer, None, ""
    try:
        mine = template.encode(messages, add_generation_prompt=prompt)
    except RequestError as error:
        refusal = str(error)
    try:
        found = theirs.apply_chat_template(
            [dict(one) for one in messages], add_generation_prompt=prompt, return_dict=False
        )
    except Exception as error:  # a template's own refusal, or whatever another library raises
        if mine is not None:
            notice(f"{where}: not compared with transformers, which refuses it ({one_line(error)})")
        return
    if mine is None:
        yield Finding(IDS, where, math.inf, 0.0, refusal)
        return
    mine, expected = (ids[leading(tokenizer, ids) :] for ids in (mine, list(found)))
    at = next((i for i, (one, two) in enumerate(zip_longest(mine, expected)) if one != two), None)
    detail = (
        ""
        if at is None
        else f"from token {at} on {mine[at : at + 5]}, transformers has {expected[at : at + 5]}"
    )
    yield Finding(IDS, where, float(at is not None), 0.0, detail)


def spelled(tokenizer: Tokenizer, name: str) -> Iterator[Finding]:
    """A text that spells every control token has none of them."""
    words = list(tokenizer.special_tokens)
    ids = tokenizer.encode(" ".join(["a", *words, "b"]))
    found = [
        tokenizer.id_to_token(id)
        for id in ids
        if id in tokenizer.special_ids and id != tokenizer.unk_id
    ]
    detail = f"{found[0]} became a token" if found else ""
    yield Finding(
        "spelled tokens stay text", f"{name}, {len(words)} of them", float(len(found)), 0.0, detail
    )
    for adds, where in ((False, "as it is"), (tokenizer.adds_bos, "with what the tokenizer adds")):
        ids = tokenizer.encode("a", add_bos=adds)
        error = float(abs(leading(tokenizer, ids) - adds))
        yield Finding(
            "BOS once",
            f"{name}, a text {where}",
            error,
            0.0,
            counted(tokenizer, ids) if error else "",
        )


def begun_once(
    template: ChatTemplate, messages: Sequence[Message], where: str
) -> Iterator[Finding]:
    """The template and the tokenizer do not both begin the chat, whichever of them writes the
    BOS.
    """
    tokenizer = template.tokenizer
    bos = None if tokenizer.bos_id is None else tokenizer.id_to_token(tokenizer.bos_id)
    text = template.render(messages)
    written = int(bool(bos) and text.startswith(bos or ""))
    ids = template.encode(messages)
    if written and leading(tokenizer, tokenizer.encode(text, allowed_special="all")) > 1:
        notice(f"{where}: the template itself writes BOS more than once")
    wrong = float(abs(leading(tokenizer, ids) - written))
    yield Finding("BOS once", where, wrong, 0.0, counted(tokenizer, ids) if wrong else "")


def leading(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """How many BOS tokens stand at the beginning."""
    return next((at for at, id in enumerate(ids) if id != tokenizer.bos_id), len(ids))


def counted(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What is wrong, in words."""
    return f"begins with {leading(tokenizer, ids)} BOS tokens"


def spelled_in_a_chat(template: ChatTemplate, name: str) -> Iterator[Finding]:
    """A message that spells every control token makes the control tokens of one that spells
    none.
    """
    tokenizer = template.tokenizer
    words = list(tokenizer.special_tokens)
    try:
        expected = controls(template, "x")
        mine = controls(template, f"x {' '.join(words)} x")
    except RequestError as error:  # a refusal is no obedience
        notice(f"{name}: {error}")
        return
    more = {id: count for id, count in mine.items() if count != expected[id]}
    error_of = float(sum(abs(count - expected[id]) for id, count in more.items()))
    detail = (
        f"{tokenizer.id_to_token(next(iter(more)))} of a message became a token" if more else ""
    )
    yield Finding("spelled tokens stay text", f"{name}, in a message", error_of, 0.0, detail)


def controls(template: ChatTemplate, content: str) -> Counter[int]:
    """How often each control token stands in a chat of one question."""
    ids = template.encode([{"role": "user", "content": content}])
    return Counter(
        id for id in ids if id in template.tokenizer.special_ids and id != template.tokenizer.unk_id
    )

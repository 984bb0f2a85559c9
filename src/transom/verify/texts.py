"""The tokenizer and the chat template of a folder.

BOS comes once, control tokens that a user spells stay text, and chats have the ids that
`transformers` gives them, if it is installed.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, notice, one_line
from transom.chat.files import stored_templates
from transom.chat.template import ChatTemplate, Message
from transom.checkpoints.files.layout import holds_tokenizer
from transom.checkpoints.open_model import open_text
from transom.tokenizers.tokenizer import Tokenizer
from transom.verify.findings import Finding, exact, missing
from transom.verify.tiny_runs import quiet

USER: Message = {"role": "user", "content": "Hello"}
ANSWER: Message = {"role": "assistant", "content": "Good day."}
CHATS: dict[str, Sequence[Message]] = {
    "a question": [USER],
    "three turns": [USER, ANSWER, {"role": "user", "content": "And now?"}],
    "a system message": [{"role": "system", "content": "Be brief."}, USER],
}
IDS = "chat ids = transformers"
SPELLED = "spelled tokens stay text"


def compare_texts(folder: Path, name: str) -> Iterator[Finding]:
    """Compare the texts and chats of a folder; a notice names what cannot be compared."""
    if not holds_tokenizer(folder):
        notice(f"{name}: no tokenizer in the folder, no texts are compared")
        return
    text = open_text(folder)
    try:
        yield from _compare_spelled(text.tokenizer, name)
        template = text.template
    except RequestError as error:  # a small vocabulary, or one for a format that is not built in
        notice(f"{name}: no chats are compared: {error}")
        return
    if template is None:
        notice(f"{name}: no chat template, no chats are compared")
        return
    for what, messages in CHATS.items():
        try:
            yield _compare_bos(template, messages, f"{name}, {what}")
        except RequestError as error:  # some templates have no system message
            notice(f"{name}: the chat template refuses {what} ({error})")
    yield from _compare_spelled_in_chat(template, name)
    if stored_templates(folder)[1]:
        yield from _compare_with_transformers(folder, template, name)


def _compare_spelled(tokenizer: Tokenizer, name: str) -> Iterator[Finding]:
    """Encode a text that spells every control token, and texts with and without BOS."""
    words = list(tokenizer.special_tokens)
    controls = _controls(tokenizer, tokenizer.encode(" ".join(["a", *words, "b"])))
    detail = f"{', '.join(controls)} became tokens"
    yield exact(SPELLED, f"{name}, {len(words)} tokens", controls.total(), detail)
    for adds, what in ((False, "as it is"), (tokenizer.adds_bos, "as the tokenizer frames it")):
        count = _leading_bos(tokenizer, tokenizer.encode("a", add_bos=adds))
        case, detail = f"{name}, a text {what}", f"begins with {count} BOS tokens"
        yield exact("BOS once", case, abs(count - adds), detail)


def _compare_bos(template: ChatTemplate, messages: Sequence[Message], case: str) -> Finding:
    """Compare the number of BOS tokens of a chat with whether its template writes one."""
    tokenizer = template.tokenizer
    bos = None if tokenizer.bos_id is None else tokenizer.id_to_token(tokenizer.bos_id)
    text = template.render(messages)
    written = bool(bos) and text.startswith(bos or "")
    if written and _leading_bos(tokenizer, tokenizer.encode(text, allowed_special="all")) > 1:
        notice(f"{case}: the template itself writes BOS more than once")
    count = _leading_bos(tokenizer, template.encode(messages))
    return exact("BOS once", case, abs(count - written), f"begins with {count} BOS tokens")


def _compare_spelled_in_chat(template: ChatTemplate, name: str) -> Iterator[Finding]:
    """Compare the control tokens of a chat with and without a message that spells all of them."""
    tokenizer = template.tokenizer
    contents = ("x", f"x {' '.join(tokenizer.special_tokens)} x")
    try:
        plain, spelled = (
            _controls(tokenizer, template.encode([{"role": "user", "content": content}]))
            for content in contents
        )
    except RequestError as error:  # the message is refused, so nothing became a token
        notice(f"{name}: {error}")
        return
    other = (spelled - plain) | (plain - spelled)
    detail = f"{', '.join(other)} of a message became tokens"
    yield exact(SPELLED, f"{name}, in a message", other.total(), detail)


def _leading_bos(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Return how many BOS tokens are at the beginning."""
    return next((at for at, id in enumerate(ids) if id != tokenizer.bos_id), len(ids))


def _controls(tokenizer: Tokenizer, ids: Sequence[int]) -> Counter[str]:
    """Return how often each control token appears."""
    special = [id for id in ids if id in tokenizer.special_ids and id != tokenizer.unk_id]
    return Counter(str(tokenizer.id_to_token(id)) for id in special)


def _compare_with_transformers(
    folder: Path, template: ChatTemplate, name: str
) -> Iterator[Finding]:
    """Compare the ids of prompts and of an answered chat with those of transformers."""
    if find_spec("transformers") is None:
        notice(f"{name}: transformers is not installed: no chats are compared with it")
        return
    load = importlib.import_module("transformers").AutoTokenizer.from_pretrained
    try:
        theirs = quiet()(load)(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any error of another library
        reason = one_line(error)
        notice(f"{name}: no chats are compared: transformers cannot load the tokenizer ({reason})")
        return
    chats = [(messages, True, what) for what, messages in CHATS.items()]
    for messages, prompt, what in (*chats, ([USER, ANSWER], False, "an answered question")):
        yield from _compare_ids(template, theirs, messages, prompt, f"{name}, {what}")


def _compare_ids(
    template: ChatTemplate, theirs: Any, messages: Sequence[Message], prompt: bool, case: str
) -> Iterator[Finding]:
    """Compare the ids of one chat after its BOS, unless transformers refuses the chat."""
    measured: Sequence[int] | RequestError
    try:
        measured = template.encode(messages, add_generation_prompt=prompt)
    except RequestError as error:
        measured = error
    plain = [dict(one) for one in messages]
    write = theirs.apply_chat_template
    try:
        expected = list(write(plain, add_generation_prompt=prompt, return_dict=False))
    except Exception as error:  # the template's own refusal, or any error of another library
        if not isinstance(measured, RequestError):
            reason = one_line(error)
            notice(f"{case}: not compared with transformers, which refuses it ({reason})")
        return
    if isinstance(measured, RequestError):
        yield missing(IDS, case, measured)
        return
    mine, other = (ids[_leading_bos(template.tokenizer, ids) :] for ids in (measured, expected))
    pairs = enumerate(zip_longest(mine, other))
    differs = [
        f"token {at}: {one}, transformers has {two}" for at, (one, two) in pairs if one != two
    ]
    yield exact(IDS, case, differs)

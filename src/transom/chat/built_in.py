"""Templates for folders that have none: which there are, and which of them a vocabulary was made
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transom.base.errors import RequestError
from transom.tokenizers.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "templates"
# Mistral's models of SentencePiece saw a space behind each control token, because it writes one
# before every text.
SPACE, NO_SPACE = "{%- set space = ' ' %}", "{%- set space = '' %}"
THINKS, NO_THINKING = "{%- set thinks = true %}", "{%- set thinks = false %}"


@dataclass(frozen=True)
class BuiltIn:
    """A template by name, and the control tokens by which a vocabulary says that it is meant for
    it.
    """

    name: str
    tokens: tuple[str, ...]  # a vocabulary without all of them is not asked to write this format
    stop: tuple[
        str, ...
    ] = ()  # control tokens that end an answer, besides the one behind every answer
    tekken: bool = False  # a byte-level vocabulary, which writes no space of its own

    def source(self, tokenizer: Tokenizer) -> str:
        """The Jinja text, without spaces that this tokenizer writes by itself and tokens that it
        lacks.
        """
        text = (FOLDER / f"{self.name.removesuffix('-tekken')}.jinja").read_text(encoding="utf-8")
        if "[THINK]" not in tokenizer.special_tokens:
            text = text.replace(THINKS, NO_THINKING)
        return text.replace(SPACE, NO_SPACE) if self.tekken or _writes_spaces(tokenizer) else text


def _writes_spaces(tokenizer: Tokenizer) -> bool:
    """Whether text behind a control token begins with a space that is not in the text."""
    token = next(iter(tokenizer.special_tokens), "")
    behind = tokenizer.encode(f"{token}a", allowed_special="all")[1:]
    return bool(behind) and (tokenizer.id_to_token(behind[0]) or "").startswith("\u2581")


SETTINGS = "[MODEL_SETTINGS]"  # from v15 on chats hold settings, which tekken.json gives rules for
_ACCEPTED = (
    "expected v1 to v7, v11 and v13 of a tekken file, or a chat template beside the "
    "vocabulary or by name"
)
_SYSTEM, _INST = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]")
# In the order in which they are tried; those without tokens can only be asked for by name, since
# the vocabulary of Llama 2 and of Mistral v1 is also that of the models beneath them.
BUILT_IN = (
    BuiltIn(
        "llama4", ("<|header_start|>", "<|header_end|>", "<|eot|>"), ("<|end_of_text|>", "<|eom|>")
    ),
    BuiltIn(
        "llama3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|end_of_text|>", "<|eom_id|>"),
    ),
    BuiltIn("mistral-v13", (*_SYSTEM, *_INST, "[ARGS]", "[THINK]", "[/THINK]"), tekken=True),
    BuiltIn("mistral-v11", (*_SYSTEM, *_INST, "[ARGS]", "[CALL_ID]"), tekken=True),
    BuiltIn("mistral-v7", (*_SYSTEM, *_INST)),
    BuiltIn("mistral-v7-tekken", (*_SYSTEM, *_INST), tekken=True),
    BuiltIn("mistral-v3", _INST),
    BuiltIn("mistral-v3-tekken", _INST, tekken=True),
    BuiltIn("gemma", ("<start_of_turn>", "<end_of_turn>")),
    BuiltIn("chatml", ("<|im_start|>", "<|im_end|>"), ("<|endoftext|>",)),
    BuiltIn("llama2", ()),
    BuiltIn("mistral-v1", ()),
    BuiltIn(
        "mistral-v2", ()
    ),  # by name or by the version of its file: its control tokens are those of v3
    BuiltIn(
        "plain", ()
    ),  # for vocabularies without control tokens but BOS and EOS, which ends every turn
)


def named(name: str) -> BuiltIn | None:
    """The built-in template of this name."""
    return next((one for one in BUILT_IN if one.name == name), None)


def fitting(tokenizer: Tokenizer) -> BuiltIn | None:
    """The built-in template that a vocabulary's version, or its control tokens, ask for.

    A format of Mistral's that is not built in is a `RequestError`.
    """
    by_bytes = not tokenizer.raw_byte_ids
    if (
        tokenizer.version is not None
    ):  # Mistral's: tekken has the tokens of later versions in all of them
        return named(
            _of_version(int(tokenizer.version.removeprefix("v")), tokenizer.format == "tekken")
        )
    if SETTINGS in tokenizer.special_tokens:
        raise RequestError(f"a vocabulary with {SETTINGS}, chat format v15: {_ACCEPTED}")
    for one in BUILT_IN:
        alike = one.tekken == by_bytes or not one.name.startswith("mistral")
        if one.tokens and alike and all(token in tokenizer.special_tokens for token in one.tokens):
            return one
    return None


def _of_version(number: int, tekken: bool) -> str:
    """The name of the template for a version of Mistral's vocabularies (mistral-common:
    tokens/tokenizers).
    """
    if number >= 15 or (number >= 11 and not tekken):
        raise RequestError(f"a vocabulary of chat format v{number}: {_ACCEPTED}")
    if number >= 11:
        return "mistral-v13" if number >= 13 else "mistral-v11"
    name = f"mistral-v{next(one for one in (7, 3, 2, 1) if one <= max(number, 1))}"
    return f"{name}-tekken" if tekken and number > 2 else name

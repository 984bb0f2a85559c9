"""Templates for folders that have none, and the vocabularies that each of them is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transom.base.errors import RequestError
from transom.tokenizers.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "templates"
# SentencePiece writes a space before every text, so Mistral's models of SentencePiece have seen one
# after each control token.
SPACE, NO_SPACE = "{%- set space = ' ' %}", "{%- set space = '' %}"
THINKS, NO_THINKING = "{%- set thinks = true %}", "{%- set thinks = false %}"


@dataclass(frozen=True)
class BuiltIn:
    """A built-in template.

    Attributes:
        name: The name of the template.
        tokens: The control tokens that it writes; a vocabulary without all of them does not choose
            it. stop: Control tokens that end an answer, besides the one that the template writes
            after it. tekken: Whether it is for byte-level vocabularies, which write no space of
            their own.
    """

    name: str
    tokens: tuple[str, ...]
    stop: tuple[str, ...] = ()
    tekken: bool = False

    def source(self, tokenizer: Tokenizer) -> str:
        """Return the Jinja text without spaces that the tokenizer adds and tokens that it lacks."""
        text = (FOLDER / f"{self.name.removesuffix('-tekken')}.jinja").read_text(encoding="utf-8")
        if "[THINK]" not in tokenizer.special_tokens:
            text = text.replace(THINKS, NO_THINKING)
        return text.replace(SPACE, NO_SPACE) if self.tekken or _writes_spaces(tokenizer) else text


def _writes_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether text after a control token is encoded with a space that is not in the text."""
    token = next(iter(tokenizer.special_tokens), "")
    after = tokenizer.encode(f"{token}a", allowed_special="all")[1:]
    return bool(after) and (tokenizer.id_to_token(after[0]) or "").startswith("\u2581")


SETTINGS = "[MODEL_SETTINGS]"  # chats hold settings from v15 on, for which tekken.json has rules
_EXPECTED = (
    "expected v1 to v7, v11 or v13 of a tekken file, or a chat template beside the "
    "vocabulary or by name"
)
_SYSTEM, _INST = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]")
_HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# In the order in which they are tried. Those without tokens can only be asked for by name, since
# the vocabulary of Llama 2 and of Mistral v1 is also that of the base models.
BUILT_IN = (
    BuiltIn(
        "llama4", ("<|header_start|>", "<|header_end|>", "<|eot|>"), ("<|end_of_text|>", "<|eom|>")
    ),
    BuiltIn("llama3", _HEADER, ("<|end_of_text|>", "<|eom_id|>")),
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
    ),  # for vocabularies without control tokens except BOS and EOS, which ends every turn
)


def named(name: str) -> BuiltIn | None:
    """Return the built-in template of this name, or None."""
    return next((one for one in BUILT_IN if one.name == name), None)


def fitting(tokenizer: Tokenizer) -> BuiltIn | None:
    """Return the built-in template that a vocabulary's version or control tokens call for, or None.

    Raises:
        RequestError: For a format of Mistral's that is not built in.
    """
    by_bytes = not tokenizer.raw_byte_ids
    if tokenizer.version is not None:
        # Control tokens do not tell, since all tekken files have those of later versions too.
        number = int(tokenizer.version.removeprefix("v"))
        return named(_of_version(number, tokenizer.format == "tekken"))
    if SETTINGS in tokenizer.special_tokens:
        raise RequestError(f"a vocabulary with {SETTINGS}, chat format v15: {_EXPECTED}")
    for one in BUILT_IN:
        alike = one.tekken == by_bytes or not one.name.startswith("mistral")
        if one.tokens and alike and all(token in tokenizer.special_tokens for token in one.tokens):
            return one
    return None


def _of_version(number: int, tekken: bool) -> str:
    """Return the name of the template for a version of Mistral's vocabularies (mistral-common)."""
    if number >= 15 or (number >= 11 and not tekken):
        raise RequestError(f"a vocabulary of chat format v{number}: {_EXPECTED}")
    if number >= 11:
        return "mistral-v13" if number >= 13 else "mistral-v11"
    name = f"mistral-v{next(one for one in (7, 3, 2, 1) if one <= max(number, 1))}"
    return f"{name}-tekken" if tekken and number > 2 else name

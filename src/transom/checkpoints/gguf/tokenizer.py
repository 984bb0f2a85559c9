"""Tokenizer and chat templates in the metadata of GGUF files, as the files of a model folder.

Token ids are those of llama.cpp, with two exceptions. The types of the file decide which tokens are
control tokens, while llama.cpp also takes some names for them (`</s>`, which is HTML in Gemma). And
letters that its patterns classify differently stay where the model's own tokenizer has them.

GGUF states no Unicode normalization. Text that is not in NFC therefore has other ids than with the
tokenizer.json of a model that normalizes it first (Qwen 2).

Source: gguf.md of ggml, and llama.cpp (src/llama-vocab.cpp) for the defaults of missing keys.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from transom.base.errors import RequestError, expect, notice, short_repr
from transom.base.files import write_text
from transom.chat.files import DEFAULT
from transom.checkpoints.files.layout import GENERATION
from transom.checkpoints.gguf.pre_tokenizers import PreTokenizer, named_pre_tokenizer
from transom.checkpoints.gguf.sentence_piece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceFile,
)
from transom.tokenizers.folder import TOKENIZER_FILE
from transom.tokenizers.token_files import CONFIG_FILE

KEY, TEMPLATE_KEY = "tokenizer.ggml.", "tokenizer.chat_template"
BYTE_PAIRS, SENTENCE_PIECE = "gpt2", "llama"
# Names of tokens in tokenizer_config.json, and the keys of their ids in GGUF.
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
    "eot_token": "eot_token_id",
    "eom_token": "eom_token_id",
}
ENDS = ("eos_token", "eot_token", "eom_token")
# Spellings that llama.cpp's converter takes for control tokens; older files have them as text.
_CONTROL = re.compile(r"<[|\uff5c]\w.*[|\uff5c]>")
_KINDS = {str: "text", int: "an integer", bool: "true or false", float: "a number"}


def write_tokenizer_files(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer, its config, the chat templates and the stop tokens into a folder.

    The files are tokenizer.json for byte pairs (`gpt2`) or tokenizer.model for SentencePiece
    (`llama`), tokenizer_config.json and generation_config.json.

    Args:
        metadata: The values of a GGUF file by key.
        folder: An existing folder.

    Raises:
        RequestError: The file has another kind of tokenizer, an unknown pre-tokenizer, or values
            that contradict each other.
    """
    kind = _value(metadata, "model", str)
    expected = f"{BYTE_PAIRS} (byte pairs) or {SENTENCE_PIECE} (SentencePiece)"
    expect(kind in (BYTE_PAIRS, SENTENCE_PIECE), f"{KEY}model", kind, expected)
    vocabulary = _Vocabulary.of(metadata, kind == SENTENCE_PIECE)
    if kind == BYTE_PAIRS:
        pre = named_pre_tokenizer(_value(metadata, "pre", str), f"{KEY}pre")
        edges = vocabulary.edges(metadata, pre.adds_bos)
        library = _byte_pairs(metadata, vocabulary, pre, edges)
        write_text(folder / TOKENIZER_FILE, library.to_str())
        own: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        edges = vocabulary.edges(metadata, adds_bos=True)
        model = _sentence_piece(metadata, vocabulary)
        (folder / "tokenizer.model").write_bytes(model.to_bytes())
        own = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": model.add_dummy_prefix}
    ids = vocabulary.ids
    templates = _templates(metadata)
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    stored = templates[DEFAULT] if templates.keys() == {DEFAULT} else listed
    config = {
        **own,
        **{role: vocabulary.tokens[id] for role, id in ids.items()},
        "add_bos_token": "bos_token" in edges,
        "add_eos_token": "eos_token" in edges,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": stored} if templates else {}),
    }
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2))
    ends = list(dict.fromkeys(ids[role] for role in ENDS if role in ids))
    settings: dict[str, Any] = {
        f"{role}_id": ids[role] for role in ("bos_token", "pad_token") if role in ids
    }
    settings |= {"eos_token_id": ends} if ends else {}
    if settings:
        write_text(folder / GENERATION, json.dumps(settings, indent=2))


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file, the type of each, and the ids of tokens by role."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    @classmethod
    def of(cls, metadata: Mapping[str, Any], sentence_piece: bool) -> _Vocabulary:
        """Read and check the tokens. Those that begin or end a text are made control tokens."""
        tokens = _values(metadata, "tokens", str)
        expect(bool(tokens), f"{KEY}tokens", tokens, "one token or more")
        types = _values(metadata, "token_type", int, len(tokens))
        strange = next((one for one in types if not NORMAL <= one <= BYTE), None)
        expect(strange is None, f"{KEY}token_type", strange, "types from 1 to 6")
        for id, token in enumerate(tokens):
            if not token:
                tokens[id], types[id] = f"[EMPTY_{id}]", UNUSED  # the name in llama.cpp
            elif types[id] in (NORMAL, USER_DEFINED) and _CONTROL.fullmatch(token):
                types[id] = CONTROL
            elif sentence_piece and types[id] == USER_DEFINED:
                tokens[id] = token.replace(" ", SPACE)  # llama.cpp finds them in the text itself
        (token, count), *_ = Counter(tokens).most_common(1)
        expect(count == 1, f"{KEY}tokens", token, f"each token once, not {count} times")
        ids = _ids(metadata, len(tokens))
        if sentence_piece:
            unknown = types.index(UNKNOWN) if UNKNOWN in types else 0
            defaults = {"unk_token": unknown, "bos_token": 1, "eos_token": 2}
            ids = {role: id for role, id in defaults.items() if id < len(tokens)} | ids
        for role, id in list(ids.items()):
            if role in ("bos_token", *ENDS):
                types[id] = CONTROL
            elif types[id] == NORMAL and role != "unk_token":
                notice(f"{KEY}{ROLES[role]}: the token {tokens[id]!r} is text and gets no role")
                del ids[role]
        return cls(tokens, types, ids)

    def edges(self, metadata: Mapping[str, Any], adds_bos: bool) -> set[str]:
        """Return which of BOS and EOS a text gets; `adds_bos` counts where no key states it."""
        edges = set()
        for role, default in (("bos_token", adds_bos), ("eos_token", False)):
            adds = _value(metadata, f"add_{role}", bool, default and role in self.ids)
            expected = f"false, since there is no {KEY}{ROLES[role]}"
            expect(not adds or role in self.ids, f"{KEY}add_{role}", adds, expected)
            edges |= {role} if adds else set()
        return edges


def _byte_pairs(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, pre: PreTokenizer, edges: set[str]
) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json."""
    tokens, types = vocabulary.tokens, vocabulary.types
    ids = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(ids, _merges(metadata, ids), ignore_merges=pre.ignore_merges)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer, library.decoder = pre.build(), decoders.ByteLevel()
    for add, wanted in (
        (library.add_special_tokens, (UNKNOWN, CONTROL)),
        (library.add_tokens, (USER_DEFINED,)),
    ):
        found = (token for token, type in zip(tokens, types, strict=True) if type in wanted)
        add([AddedToken(token, normalized=False) for token in found])
    around = {role: tokens[vocabulary.ids[role]] for role in edges}
    library.post_processor = processors.TemplateProcessing(
        single=[one for one in ("bos_token", "$A", "eos_token") if one in {"$A", *edges}],
        special_tokens=[
            {"id": role, "ids": [ids[token]], "tokens": [token]} for role, token in around.items()
        ],
    )
    return library


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges as pairs of tokens, which a space separates."""
    pairs = []
    for place, merge in enumerate(dict.fromkeys(_values(metadata, "merges", str))):
        left, _, right = merge.partition(" ")
        known = left in ids and right in ids and left + right in ids
        expected = "two tokens and a space between them that make another token"
        expect(known, f"{KEY}merges[{place}]", merge, expected)
        pairs.append((left, right))
    return pairs


def _sentence_piece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> SentencePieceFile:
    """Return the model of a tokenizer.model."""
    tokens = vocabulary.tokens
    scores = _values(metadata, "scores", float, len(tokens))
    strange = next((one for one in scores if not math.isfinite(one)), None)
    expect(strange is None, f"{KEY}scores", strange, "finite numbers")
    # A model has one unknown piece; other tokens that no text makes are control pieces.
    types = [CONTROL if one == UNKNOWN else one for one in vocabulary.types]
    types[vocabulary.ids["unk_token"]] = UNKNOWN
    found = {token for token, type in zip(tokens, types, strict=True) if type == BYTE}
    complete = not found or found == {f"<0x{byte:02X}>" for byte in range(256)}
    expect(complete, f"{KEY}token_type", f"{len(found)} byte tokens", "none, or <0x00> to <0xFF>")
    return SentencePieceFile(
        tokens,
        scores,
        types,
        {role.removesuffix("_token"): id for role, id in vocabulary.ids.items()},
        _value(metadata, "add_space_prefix", bool, True),
        _value(metadata, "remove_extra_whitespaces", bool, False),
    )


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name."""
    named = [key for key in metadata if key == TEMPLATE_KEY or key.startswith(f"{TEMPLATE_KEY}.")]
    for key in named:
        expect(isinstance(metadata[key], str), key, metadata[key], "a chat template")
    return {key.removeprefix(TEMPLATE_KEY)[1:] or DEFAULT: metadata[key] for key in named}


def _ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    """Return the ids of tokens by role, as far as the file states them."""
    ids = {}
    for role, key in ROLES.items():
        if f"{KEY}{key}" in metadata:
            ids[role] = _value(metadata, key, int)
            expected = f"an id below {count}, the number of tokens"
            expect(0 <= ids[role] < count, f"{KEY}{key}", ids[role], expected)
    return ids


def _value(metadata: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return a value of the metadata, which must be of this kind; None as default requires it."""
    value = metadata.get(f"{KEY}{name}", default)
    expect(type(value) is kind, f"{KEY}{name}", value, _KINDS[kind])
    return value


def _values(metadata: Mapping[str, Any], name: str, kind: type, count: int | None = None) -> Any:
    """Return a copy of a list of the metadata, of this kind and length."""
    values = metadata.get(f"{KEY}{name}")
    if not isinstance(values, list) or count not in (None, len(values)):
        got = f"{len(values)} values" if isinstance(values, list) else short_repr(values)
        expected = "a list" if count is None else f"a list of {count} values, one for each token"
        raise RequestError(f"{KEY}{name}: got {got}; expected {expected}")
    for place, one in enumerate(values):
        if type(one) is not kind:
            expected = f"expected {_KINDS[kind]}"
            raise RequestError(f"{KEY}{name}[{place}]: got {short_repr(one)}; {expected}")
    return list(values)

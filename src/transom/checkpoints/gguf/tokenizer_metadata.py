"""A tokenizer and its chat templates as the metadata of a GGUF file.

GGUF states tokens, merges or scores, and the name of a pre-tokenizer. A tokenizer that needs more
is refused. What only changes the ids of unusual text is reported: Unicode normalization, and white
space that special tokens swallow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers.models import BPE

from transom.base.errors import RequestError, expect, notice
from transom.chat.files import DEFAULT, stored_templates
from transom.checkpoints.files.generation_config import stop_tokens_of
from transom.checkpoints.gguf.pre_tokenizers import matching_pre_tokenizer
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
from transom.checkpoints.gguf.tokenizer import (
    BYTE_PAIRS,
    ENDS,
    KEY,
    ROLES,
    SENTENCE_PIECE,
    TEMPLATE_KEY,
)
from transom.tokenizers.backend import TokenizerBackend
from transom.tokenizers.fast import FastBackend
from transom.tokenizers.folder import read_folder
from transom.tokenizers.tokenizer import Tokenizer

_NO_SCORE = -1000.0  # of tokens that no merge makes, as llama.cpp's converter writes it


def tokenizer_metadata(folder: Path, rows: int = 0, where: str = "") -> dict[str, Any]:
    """Return what a GGUF file states about a tokenizer and its chat templates.

    `write_tokenizer_files` makes files of the same tokenizer from it.

    Args:
        folder: The folder of a tokenizer.
        rows: The number of rows of the model's embeddings. Ids without a token get one that no text
            contains, because llama.cpp expects a token for every row.
        where: The folder in messages, instead of its path.

    Raises:
        RequestError: GGUF cannot state this tokenizer.
    """
    where, arguments = where or str(folder), read_folder(folder)
    tokenizer = Tokenizer(**arguments)
    file = next(iter(arguments["files"].values()))
    stated = _vocabulary(arguments["backend"], file, max(rows, tokenizer.vocab_size), where)
    ends = dict.fromkeys([tokenizer.eos_id, *stop_tokens_of(folder, tokenizer)])
    ends.pop(None, None)
    if len(ends) > len(ENDS):
        notice(f"{where}: GGUF states {len(ENDS)} of the {len(ends)} tokens that end a text")
    edges = [*tokenizer.begin, *tokenizer.end]
    if set(edges) - {tokenizer.bos_id, tokenizer.eos_id}:
        notice(f"{where}: GGUF states BOS and EOS only; a text gets the ids {edges} here")
    ids = {
        "bos_token": tokenizer.bos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
        **dict(zip(ENDS, ends, strict=False)),
    }
    stated |= {ROLES[role]: id for role, id in ids.items() if id is not None}
    stated |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": tokenizer.adds_eos}
    templates = {
        TEMPLATE_KEY if name == DEFAULT else f"{TEMPLATE_KEY}.{name}": text
        for name, text in stored_templates(folder)[1].items()
    }
    return {f"{KEY}{key}": value for key, value in stated.items()} | templates


def _vocabulary(backend: TokenizerBackend, file: bytes, count: int, where: str) -> dict[str, Any]:
    """Return the kind of a tokenizer, and `count` tokens with their types and scores."""
    if isinstance(backend, FastBackend):
        document = json.loads(backend.to_json())
        stated, types = _merged(document, where)
    elif backend.format == "sentencepiece":
        stated, types = _sentence_piece(file, where)
    else:
        expected = "expected a tokenizer.json or a SentencePiece model, which GGUF can state"
        raise RequestError(f"{where}: got a tokenizer of the kind {backend.format}; {expected}")
    types |= {
        token.id: CONTROL if token.control else USER_DEFINED for token in backend.added.values()
    }
    if stated["model"] == SENTENCE_PIECE and backend.unk_id is not None:
        types[backend.unk_id] = UNKNOWN
    swallowing = [name for name, one in backend.added.items() if one.lstrip or one.rstrip]
    if swallowing:
        notice(f"{where}: GGUF does not state that {swallowing[0]!r} swallows white space")
    tokens = []
    for id in range(count):
        token = backend.id_to_token(id)
        if token is None:
            token, types[id] = f"[PAD{id}]", UNUSED  # the name that llama.cpp's converter gives it
        elif types.get(id) == USER_DEFINED and stated["model"] == SENTENCE_PIECE:
            token = token.replace(SPACE, " ")  # llama.cpp finds it in the text itself
        tokens.append(token)
    if "scores" in stated:
        stated["scores"] = [stated["scores"].get(id, _NO_SCORE) for id in range(count)]
    return stated | {
        "tokens": tokens,
        "token_type": [types.get(id, NORMAL) for id in range(count)],
    }


def _merged(document: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[int, int]]:
    """Return the merges of a tokenizer.json and its pre-tokenizer, or the scores of its tokens."""
    model, normalizer = document["model"], document["normalizer"]
    expected = "BPE without marks of parts of words, which GGUF can state"
    marks = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    fits = model["type"] == "BPE" and not any(marks)
    expect(fits, f"{where}: model of tokenizer.json", model["type"], expected)
    added = document["added_tokens"]
    types = {one["id"]: USER_DEFINED for one in added if not one["special"]}
    if model["byte_fallback"]:
        return _scored(document, types, where)
    for step in (normalizer or {"normalizers": []}).get("normalizers", [normalizer]):
        _report_normalization(step["type"], where)
    field = f"{where}: pre_tokenizer of tokenizer.json"
    pre = matching_pre_tokenizer(document["pre_tokenizer"], model["ignore_merges"], field)
    pairs = [tuple(pair) for pair in model["merges"]]
    if pre.ignore_merges != model["ignore_merges"]:
        merger, others = BPE(model["vocab"], pairs), {one["content"] for one in added}
        odd = next(
            (one for one in model["vocab"].keys() - others if len(merger.tokenize(one)) > 1), None
        )
        expected = "tokens that are results of merges"
        expect(odd is None, f"{where}: model of tokenizer.json", odd, expected)
    return {
        "model": BYTE_PAIRS,
        "pre": pre.names[0],
        "merges": [" ".join(pair) for pair in pairs],
    }, types


def _sentence_piece(content: bytes, where: str) -> tuple[dict[str, Any], dict[int, int]]:
    """Return the scores of a SentencePiece model, how it treats spaces, and the types of pieces."""
    model = SentencePieceFile.of(content)
    expect(model.merges, f"{where}: model type", "unigram", "pairs merged by score")
    if model.normalizes:
        _report_normalization("the normalization of its model", where)
    return {
        "model": SENTENCE_PIECE,
        "pre": "default",
        "scores": dict(enumerate(model.scores)),
        "add_space_prefix": model.add_dummy_prefix,
        "remove_extra_whitespaces": model.remove_extra_whitespaces,
    }, dict(enumerate(model.types))


def _report_normalization(form: str, where: str) -> None:
    notice(f"{where}: GGUF does not state {form}; text that it changes gets other ids elsewhere")


def _scored(
    document: Mapping[str, Any], types: dict[int, int], where: str
) -> tuple[dict[str, Any], dict[int, int]]:
    """Return scores that merge pairs in the order of a tokenizer.json with byte fallback.

    A score belongs to the token that a merge makes. So all merges that make one token must follow
    each other, and every pair of tokens that spells a token must be a merge. This is so in files
    that were made from SentencePiece models, except that runs of spaces may share one score.
    """
    model, field = document["model"], f"{where}: merges of tokenizer.json"
    merges, ids = {tuple(pair) for pair in model["merges"]}, model["vocab"]
    made = ["".join(pair) for pair in model["merges"]]
    last = {token: place for place, token in enumerate(made)}
    scores: dict[str, float] = {}
    reach, rank = -1, -1
    for place, token in enumerate(made):
        rank += place > reach  # merges that make the same tokens as earlier ones share their rank
        reach = max(reach, last[token])
        scores[token] = -float(rank)
    sharing = Counter(scores.values())
    mixed = (one for one, rank in scores.items() if sharing[rank] > 1 and len(set(one)) > 1)
    types |= {ids[token]: BYTE for byte in range(256) if (token := f"<0x{byte:02X}>") in ids}
    added = {one["id"] for one in document["added_tokens"]}
    missing = (
        token
        for token, id in ids.items()
        for cut in range(1, len(token))
        if (token[:cut], token[cut:]) not in merges
        and token[:cut] in ids
        and token[cut:] in ids
        and id not in added
    )
    odd = next(chain(mixed, missing), None)
    expect(odd is None, field, odd, "those of a SentencePiece model, in their order")
    return {
        "model": SENTENCE_PIECE,
        "pre": "default",
        "scores": {ids[token]: score for token, score in scores.items()},
        "add_space_prefix": _adds_prefix(document, where),
    }, types


def _adds_prefix(document: Mapping[str, Any], where: str) -> bool:
    """Return whether a tokenizer.json that writes spaces as U+2581 puts one before a text."""
    adds, space = False, {"String": " "}
    for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        entry = document[name] or {inner: []}
        for step in entry.get(inner, [entry]):
            kind = step["type"], step.get("content", step.get("prepend")), step.get("pattern")
            if kind == ("Prepend", SPACE, None):
                adds = True
            elif step["type"] == "Metaspace" and not step["split"]:
                adds = step["prepend_scheme"] != "never"
                if adds:
                    puts = "puts a space before a text, also before one that begins with a space"
                    notice(f"{where}: a program that reads the GGUF file {puts}")
            elif kind not in (("Replace", SPACE, space), ("Split", None, space)):
                expected = "that of a SentencePiece model"
                expect(False, f"{where}: {name} of tokenizer.json", step["type"], expected)
    return adds

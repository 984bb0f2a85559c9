"""Which tokenizer a folder holds, and what the files beside it say about its special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, notice, require
from transom.base.files import json_object, read_bytes, read_json
from transom.tokenizers.backend import Backend
from transom.tokenizers.beside import (
    ADDED_FILE,
    CONFIG_FILE,
    NAMED,
    SPECIALS_FILE,
    Beside,
)

TOKENIZER_FILE = "tokenizer.json"
# What lies beside a vocabulary, says how it is used, and goes along when it is saved.
COMPANIONS = (CONFIG_FILE, SPECIALS_FILE, ADDED_FILE, "chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"  # a folder of further templates, NAME.jinja
ACCEPTED = (
    f"expected a folder with {TOKENIZER_FILE}, tekken.json or tokenizer.model, or a file of "
    f"one of these kinds"
)


@dataclass
class FolderTokenizer:
    """A vocabulary and what its folder says about it."""

    backend: Backend
    named: dict[str, str]  # bos_token, eos_token and pad_token, where there is one
    adds_bos: bool
    adds_eos: bool
    files: dict[str, bytes] = field(default_factory=dict)  # all that was read and must go along


def read_folder(path: str | Path) -> FolderTokenizer:
    """The tokenizer of a folder, or in one file; of several in a folder the one taken is said."""
    path = Path(path)
    file = _chosen(path) if path.is_dir() else path
    require(file.is_file(), "tokenizer", str(path), ACCEPTED)
    content = read_bytes(file)
    present = [name for name in COMPANIONS if (file.parent / name).is_file()]
    present += [
        f"{TEMPLATES}/{path.name}" for path in sorted((file.parent / TEMPLATES).glob("*.jinja"))
    ]
    files = {name: read_bytes(file.parent / name) for name in present}
    beside = Beside.of(file.parent, files)
    backend, named = _backend(file, content, beside)
    named |= beside.named
    for name, token in list(named.items()):
        if token is not None and backend.token_to_id(token) is None:
            notice(f"{file}: {name} {token!r} is not in the vocabulary and is left out")
            named[name] = None
    known = {name: token for name, token in named.items() if token is not None}
    adds_bos, adds_eos = _policy(backend, known, beside.config, file.parent / CONFIG_FILE)
    return FolderTokenizer(
        backend, known, adds_bos, adds_eos, {_saved_name(file, backend): content, **files}
    )


def _chosen(folder: Path) -> Path:
    """The tokenizer file of a folder: tokenizer.json before Mistral's own files before
    tokenizer.model.
    """
    found = list(_candidates(folder))
    require(bool(found), "tokenizer", str(folder), ACCEPTED)
    if len(found) > 1:
        others = ", ".join(file.name for file in found[1:])
        notice(f"{folder}: tokenizer taken from {found[0].name}; name the file to take {others}")
    return found[0]


def _candidates(folder: Path) -> Iterator[Path]:
    yield from (file for file in (folder / TOKENIZER_FILE,) if file.is_file())
    yield from sorted(folder.glob("tekken*.json"))
    versioned = [file for file in folder.glob("*.model.v*") if _file_version(file)]
    yield from sorted(
        versioned, key=lambda file: int((_file_version(file) or "v0")[1:]), reverse=True
    )
    yield from (file for file in (folder / "tokenizer.model",) if file.is_file())


def _saved_name(file: Path, backend: Backend) -> str:
    """The file's own name if a folder's tokenizer is looked for under it, else the usual one of its
    kind.
    """
    usual = {"tokenizer.json": TOKENIZER_FILE, "tekken": "tekken.json"}.get(
        backend.format, "tokenizer.model"
    )
    named = (file.parent / usual, *_candidates(file.parent))
    return file.name if file in named and backend.format != "tokenizer.json" else usual


def _file_version(file: Path) -> str | None:
    """Mistral's number at the end of `tokenizer.model.v3` or `tokenizer.model.v7m1`."""
    match = re.search(r"\.model\.(v\d+)(m\d+)?$", file.name)
    return match[1] if match else None


def _backend(file: Path, content: bytes, beside: Beside) -> tuple[Backend, dict[str, str | None]]:
    """The vocabulary of a file, its kind seen from the content, and what it says itself of BOS, EOS
    and PAD.
    """
    if file.suffix == ".json" or re.match(rb'\s*\{\s*"', content):
        data = json_object(content, file)
        if "vocab" in data and "config" in data:
            from transom.tokenizers import tekken

            backend = tekken.tekken_backend(data, str(file))
            names = zip(NAMED, (tekken.BOS, tekken.EOS, tekken.PAD), strict=True)
            return backend, {name: token for name, token in names if token in backend.added}
        return _fast_backend(content, file, beside), {}
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        from transom.tokenizers import llama

        ranked, family = llama.llama_backend(content, str(file), _model_vocab_size(file.parent))
        return ranked, dict(zip(NAMED, (llama.BOS, llama.EOS, family.pad), strict=True))
    from transom.tokenizers.sentence_piece import SentencePieceBackend

    model = SentencePieceBackend(
        content,
        source=str(file),
        added=beside.added,
        special=[token for token in beside.named.values() if token is not None],
        version=_file_version(file),
        prefix_everywhere=beside.config.get("legacy") is not False,
    )
    return model, {**model.named()}


def _fast_backend(content: bytes, file: Path, beside: Beside) -> Backend:
    import tokenizers

    from transom.tokenizers.fast import FastBackend, add_beside

    try:
        backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise RequestError(f"{file}: expected the JSON of a fast tokenizer ({error})") from error
    add_beside(backend, beside, str(file))
    special = [token for token in beside.named.values() if token is not None]
    known = [token for token in special if backend.token_to_id(token) is not None]
    return FastBackend(
        backend, known, [end for end in beside.ends if backend.token_to_id(end) is not None]
    )


def _policy(
    backend: Backend, named: dict[str, str], config: Mapping[str, Any], file: Path
) -> tuple[bool, bool]:
    """Whether the makers' tokenizer puts BOS before and EOS behind a text.

    The post-processor of a tokenizer.json decides alone, as in `transformers`; for other files
    `add_bos_token` and `add_eos_token` come before what the makers do by default.
    """
    adds = []
    for name, ids in zip(NAMED, backend.frame, strict=False):
        flag = f"add_{name}"
        asked = config.get(flag)
        require(
            asked is None or type(asked) is bool,
            f"{file}: {flag}",
            asked,
            "expected true, false or null",
        )
        id = backend.token_to_id(named[name]) if name in named else None
        framed = id is not None and id in ids
        if backend.format != "tokenizer.json":
            adds.append(framed if asked is None else asked and id is not None)
            continue
        if asked is not None and asked != framed:
            does = "adds it" if framed else "does not"
            notice(
                f"{file}: {flag} is {json.dumps(asked)}, but the post-processor {does}; the "
                f"latter counts"
            )
        adds.append(framed)
    return adds[0], adds[1]


def _model_vocab_size(folder: Path) -> int | None:
    """`vocab_size` of the model in this folder, None where no file says it (-1 and 0 say
    nothing).
    """
    for name in ("params.json", "config.json"):
        if not (folder / name).is_file():
            continue
        data = read_json(folder / name)
        for part in (data, data.get("model"), data.get("text_config")):
            size = part.get("vocab_size") if isinstance(part, dict) else None
            if type(size) is int and size > 0:
                return size
    return None

"""Which tokenizer a folder holds, and what the files beside it say about its special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transom.errors import RequestError, notice, require
from transom.tokenizers.backend import AddedToken, Backend

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
# What lies beside a vocabulary, says how it is used, and goes along when it is saved.
COMPANIONS = (CONFIG_FILE, SPECIALS_FILE, ADDED_FILE, "chat_template.jinja")
NAMED = ("bos_token", "eos_token", "pad_token")
ACCEPTED = (
    f"accepted is a folder with {TOKENIZER_FILE}, tekken.json or tokenizer.model, or a file of one of these kinds"
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
    content = _content(file)
    files = {name: _content(file.parent / name) for name in COMPANIONS if (file.parent / name).is_file()}
    config = _json_object(files[CONFIG_FILE], file.parent / CONFIG_FILE) if CONFIG_FILE in files else {}
    backend, named = _backend(file, content, config, files)
    named |= _named(file.parent, files, config)
    for name, token in list(named.items()):
        if token is not None and backend.token_to_id(token) is None:
            notice(f"{file}: {name} {token!r} is not in the vocabulary and is left out")
            named[name] = None
    known = {name: token for name, token in named.items() if token is not None}
    adds_bos, adds_eos = _policy(backend, known, config, file.parent / CONFIG_FILE)
    return FolderTokenizer(backend, known, adds_bos, adds_eos, {_saved_name(file, backend): content, **files})


def _chosen(folder: Path) -> Path:
    """The tokenizer file of a folder: tokenizer.json before Mistral's own files before tokenizer.model."""
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
    yield from sorted(versioned, key=lambda file: int((_file_version(file) or "v0")[1:]), reverse=True)
    yield from (file for file in (folder / "tokenizer.model",) if file.is_file())


def _saved_name(file: Path, backend: Backend) -> str:
    """The file's own name if a folder's tokenizer is looked for under it, else the usual one of its kind."""
    usual = {"tokenizer.json": TOKENIZER_FILE, "tekken": "tekken.json"}.get(backend.format, "tokenizer.model")
    named = (file.parent / usual, *_candidates(file.parent))
    return file.name if file in named and backend.format != "tokenizer.json" else usual


def _file_version(file: Path) -> str | None:
    """Mistral's number at the end of `tokenizer.model.v3` or `tokenizer.model.v7m1`."""
    match = re.search(r"\.model\.(v\d+)(m\d+)?$", file.name)
    return match[1] if match else None


def _backend(
    file: Path, content: bytes, config: dict[str, Any], files: dict[str, bytes]
) -> tuple[Backend, dict[str, str | None]]:
    """The vocabulary of a file, its kind seen from the content, and what it says itself of BOS, EOS and PAD."""
    if file.suffix == ".json" or re.match(rb'\s*\{\s*"', content):
        data = _json_object(content, file)
        if "vocab" in data and "config" in data:
            from transom.tokenizers import tekken

            backend = tekken.tekken_backend(data, str(file))
            names = zip(NAMED, (tekken.BOS, tekken.EOS, tekken.PAD), strict=True)
            return backend, {name: token for name, token in names if token in backend.added}
        return _fast_backend(content, file, _named(file.parent, files, config))
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        from transom.tokenizers import llama

        ranked, family = llama.llama_backend(content, str(file), _model_vocab_size(file.parent))
        return ranked, dict(zip(NAMED, (llama.BOS, llama.EOS, family.pad), strict=True))
    from transom.tokenizers.sentence_piece import SentencePieceBackend

    model = SentencePieceBackend(
        content,
        source=str(file),
        added=_added(file.parent, files, config),
        special=[token for token in _named(file.parent, files, config).values() if token is not None],
        version=_file_version(file),
        prefix_everywhere=config.get("legacy") is not False,
    )
    return model, {**model.named()}


def _fast_backend(
    content: bytes, file: Path, named: dict[str, str | None]
) -> tuple[Backend, dict[str, str | None]]:
    import tokenizers

    from transom.tokenizers.fast import FastBackend

    try:
        backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise RequestError(f"{file}: accepted is the JSON of a fast tokenizer ({error})") from error
    special = [token for token in named.values() if token is not None and backend.token_to_id(token) is not None]
    return FastBackend(backend, special), {}


def _named(folder: Path, files: dict[str, bytes], config: dict[str, Any]) -> dict[str, str | None]:
    """Names of BOS, EOS and PAD; one in tokenizer_config.json wins over special_tokens_map.json, null is none."""
    specials = _json_object(files[SPECIALS_FILE], folder / SPECIALS_FILE) if SPECIALS_FILE in files else {}
    named: dict[str, str | None] = {}
    for entries in (specials, config):
        for name in NAMED:
            entry = entries.get(name)
            token = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(token, str) or (name in entries and entry is None):
                named[name] = token
    return named


def _added(folder: Path, files: dict[str, bytes], config: dict[str, Any]) -> dict[str, AddedToken]:
    """Tokens beside a SentencePiece model, which added_tokens.json lists and tokenizer_config.json describes."""
    added: dict[str, AddedToken] = {}
    if ADDED_FILE in files:
        listed = _json_object(files[ADDED_FILE], folder / ADDED_FILE)
        control = _control_spellings(folder, files, config)
        for spelling, id in listed.items():
            require(type(id) is int, f"{folder / ADDED_FILE}: {spelling}", id, "accepted is a token id")
            added[spelling] = AddedToken(id, control=spelling in control)
    where = f"{folder / CONFIG_FILE}: added_tokens_decoder"
    described = config.get("added_tokens_decoder") or {}
    require(isinstance(described, dict), where, described, "accepted is a JSON object")
    for id, entry in described.items():
        right = id.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
        require(right, f"{where}: {id}", entry, "accepted is a token id with an object that has `content`")
        flags = {flag: entry.get(flag) is True for flag in ("lstrip", "rstrip", "single_word")}
        added[entry["content"]] = AddedToken(int(id), control=entry.get("special") is True, **flags)
    return added


def _control_spellings(folder: Path, files: dict[str, bytes], config: dict[str, Any]) -> set[str]:
    """All that special_tokens_map.json and tokenizer_config.json give a role."""
    specials = _json_object(files[SPECIALS_FILE], folder / SPECIALS_FILE) if SPECIALS_FILE in files else {}
    found: set[str] = set()
    for entries in (specials, config):
        for role, value in entries.items():
            if role.endswith("_token") or role == "additional_special_tokens":
                for one in value if isinstance(value, list) else [value]:
                    spelling = one.get("content") if isinstance(one, dict) else one
                    found |= {spelling} if isinstance(spelling, str) else set()
    return found


def _policy(backend: Backend, named: dict[str, str], config: dict[str, Any], file: Path) -> tuple[bool, bool]:
    """Whether the makers' tokenizer puts BOS before and EOS behind a text.

    The post-processor of a tokenizer.json decides alone, as in `transformers`; for other files `add_bos_token` and
    `add_eos_token` come before what the makers do by default.
    """
    adds = []
    for name, ids in zip(NAMED, backend.frame, strict=False):
        flag = f"add_{name}"
        asked = config.get(flag)
        require(asked is None or type(asked) is bool, f"{file}: {flag}", asked, "accepted is true, false or null")
        id = backend.token_to_id(named[name]) if name in named else None
        framed = id is not None and id in ids
        if backend.format != "tokenizer.json":
            adds.append(framed if asked is None else asked and id is not None)
            continue
        if asked is not None and asked != framed:
            does = "adds it" if framed else "does not"
            notice(f"{file}: {flag} is {json.dumps(asked)}, but the post-processor {does}; the latter counts")
        adds.append(framed)
    return adds[0], adds[1]


def _model_vocab_size(folder: Path) -> int | None:
    """`vocab_size` of the model in this folder, None where no file says it (-1 and 0 say nothing)."""
    for name in ("params.json", "config.json"):
        if not (folder / name).is_file():
            continue
        data = _json_object(_content(folder / name), folder / name)
        for part in (data, data.get("model"), data.get("text_config")):
            size = part.get("vocab_size") if isinstance(part, dict) else None
            if type(size) is int and size > 0:
                return size
    return None


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({error.strerror})") from error


def _json_object(content: bytes, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise RequestError(f"{file}: accepted is JSON ({error})") from error
    require(isinstance(data, dict), str(file), type(data).__name__, "accepted is a JSON object")
    return dict(data)

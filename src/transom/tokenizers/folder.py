"""Choose the tokenizer of a folder and read the files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import expect, explained, notice
from transom.base.files import json_object, read_bytes, read_json
from transom.tokenizers.backend import TokenizerBackend
from transom.tokenizers.token_files import ADDED_FILE, CONFIG_FILE, NAMED, SPECIALS_FILE, TokenFiles

TOKENIZER_FILE = "tokenizer.json"
# The files beside a vocabulary that decide how it is used, which are saved with it.
COMPANIONS = (CONFIG_FILE, SPECIALS_FILE, ADDED_FILE, "chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"  # a folder of further templates, NAME.jinja
EXPECTED = (
    f"a folder with {TOKENIZER_FILE}, tekken.json or tokenizer.model, or a "
    f"file of one of these kinds"
)


def read_folder(path: str | Path) -> dict[str, Any]:
    """Return the arguments of `Tokenizer` for the tokenizer of a folder or in a file.

    A notice tells which one of several is taken.
    """
    path = Path(path)
    file = _chosen(path) if path.is_dir() else path
    expect(file.is_file(), "tokenizer", str(path), EXPECTED)
    content, folder = read_bytes(file), file.parent
    present = [name for name in COMPANIONS if (folder / name).is_file()]
    present += [f"{TEMPLATES}/{one.name}" for one in sorted((folder / TEMPLATES).glob("*.jinja"))]
    files = {name: read_bytes(folder / name) for name in present}
    described = TokenFiles.of(folder, files)
    backend, named = _backend(file, content, described)
    named |= described.named
    for name, token in list(named.items()):
        if token is not None and backend.token_to_id(token) is None:
            notice(f"{file}: {name} {token!r} is not in the vocabulary and is left out")
            named[name] = None
    arguments = {role.removesuffix("_token"): named.get(role) for role in NAMED}
    adds = _policy(backend, named, described.config, folder / CONFIG_FILE)
    files = {_saved_name(file, backend): content, **files}
    return {"backend": backend, "files": files, **arguments, **adds}


def _chosen(folder: Path) -> Path:
    """Return the tokenizer file of a folder: tokenizer.json, Mistral's, or tokenizer.model."""
    candidates = list(_candidates(folder))
    expect(bool(candidates), "tokenizer", str(folder), EXPECTED)
    if len(candidates) > 1:
        others = ", ".join(file.name for file in candidates[1:])
        notice(
            f"{folder}: tokenizer taken from {candidates[0].name}; name the file to take {others}"
        )
    return candidates[0]


def _candidates(folder: Path) -> Iterator[Path]:
    yield from (file for file in (folder / TOKENIZER_FILE,) if file.is_file())
    yield from sorted(folder.glob("tekken*.json"))
    versions = {
        file: int(version[1:])
        for file in folder.glob("*.model.v*")
        if (version := _file_version(file))
    }
    yield from sorted(versions, key=lambda file: versions[file], reverse=True)
    yield from (file for file in (folder / "tokenizer.model",) if file.is_file())


def _saved_name(file: Path, backend: TokenizerBackend) -> str:
    """Return the name under which the vocabulary file is saved, so that it is found again."""
    usual = {"tokenizer.json": TOKENIZER_FILE, "tekken": "tekken.json"}.get(
        backend.format, "tokenizer.model"
    )
    named = backend.format != "tokenizer.json" and file in _candidates(file.parent)
    return file.name if named else usual


def _file_version(file: Path) -> str | None:
    """Return Mistral's number in `tokenizer.model.v3` or `tokenizer.model.v7m1`, or None."""
    match = re.search(r"\.model\.(v\d+)(m\d+)?$", file.name)
    return match[1] if match else None


def _backend(
    file: Path, content: bytes, described: TokenFiles
) -> tuple[TokenizerBackend, dict[str, str | None]]:
    """Return the vocabulary of a file, and the BOS, EOS and PAD that it names."""
    if file.suffix == ".json" or re.match(rb'\s*\{\s*"', content):
        data = json_object(content, file)
        if "vocab" in data and "config" in data:
            from transom.tokenizers import tekken

            backend = tekken.tekken_backend(data, str(file))
            names = zip(NAMED, (tekken.BOS, tekken.EOS, tekken.PAD), strict=True)
            return backend, {name: token for name, token in names if token in backend.added}
        return _fast_backend(content, file, described), {}
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        from transom.tokenizers import llama

        ranked, family = llama.llama_backend(content, str(file), _model_vocab_size(file.parent))
        return ranked, dict(zip(NAMED, (llama.BOS, llama.EOS, family.pad), strict=True))
    from transom.tokenizers.sentence_piece import SentencePieceBackend

    model = SentencePieceBackend(
        content,
        source=str(file),
        added=described.added,
        special=described.special,
        version=_file_version(file),
        prefix_everywhere=described.config.get("legacy") is not False,
    )
    return model, {**model.named}


def _fast_backend(content: bytes, file: Path, described: TokenFiles) -> TokenizerBackend:
    import tokenizers

    from transom.tokenizers.fast import FastBackend, add_tokens

    # The library raises bare Exception.
    with explained(f"{file}: expected the JSON of a fast tokenizer", Exception):
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    add_tokens(library, described, str(file))
    special, ends = (
        [token for token in tokens if library.token_to_id(token) is not None]
        for tokens in (described.special, described.ends)
    )
    return FastBackend(library, special, ends)


def _policy(
    backend: TokenizerBackend,
    named: Mapping[str, str | None],
    config: Mapping[str, Any],
    file: Path,
) -> dict[str, bool]:
    """Return `adds_bos` and `adds_eos`: what the makers' tokenizer puts around a text.

    The post-processor of a tokenizer.json decides alone, as in transformers. For other files
    `add_bos_token` and `add_eos_token` take precedence over what the makers do by default.
    """
    adds = {}
    for name, ids in zip(NAMED, backend.frame, strict=False):
        asked = config.get(f"add_{name}")
        right = asked is None or type(asked) is bool
        expect(right, f"{file}: add_{name}", asked, "true, false or null")
        token = named.get(name)
        id = None if token is None else backend.token_to_id(token)
        framed = id is not None and id in ids
        if backend.format == "tokenizer.json" and asked not in (None, framed):
            does = "adds it" if framed else "does not"
            notice(
                f"{file}: add_{name} is {json.dumps(asked)}, but the post-processor "
                f"{does}; the latter counts"
            )
        decided = backend.format == "tokenizer.json" or asked is None
        counts = framed if decided else bool(asked) and id is not None
        adds[f"adds_{name.removesuffix('_token')}"] = counts
    return adds


def _model_vocab_size(folder: Path) -> int | None:
    """Return `vocab_size` of the model in this folder; None, -1 and 0 mean that it is unknown."""
    for file in (folder / "params.json", folder / "config.json"):
        data = read_json(file) if file.is_file() else {}
        for part in (data, data.get("model"), data.get("text_config")):
            size = part.get("vocab_size") if isinstance(part, dict) else None
            if type(size) is int and size > 0:
                return size
    return None

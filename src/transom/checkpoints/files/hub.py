"""Download models by hub id through huggingface_hub, or take them from its cache. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from transom.base.errors import RequestError, explained, notice, one_line
from transom.checkpoints.files.layout import ADAPTER_CONFIG, CONFIG, INDEX, PARAMS, WEIGHTS
from transom.checkpoints.files.pooling import POOLING
from transom.tokenizers.folder import TEMPLATES

_SETTINGS = (
    *("*.json", "*.jinja", "*.model", "*.model.v*", "tokenizer.txt", "merges.txt", "vocab.txt"),
    *(f"{TEMPLATES}/*.jinja", POOLING),
)
# Sets of weights; the first that a repository has is taken. Adapters come last.
_WEIGHTS = (
    *("model*.safetensors", "consolidated*.safetensors", "consolidated.*.pth"),
    *("adapter_model.safetensors", "adapter_model.bin"),
)


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form `owner/model` of a hub id."""
    fits = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is not None
    return fits and ".." not in name and "--" not in name


def download(name: str, revision: str | None = None, *, settings_only: bool = False) -> Path:
    """Return the local folder of a hub id; files that are not in the cache are downloaded.

    If the hub cannot be reached, the copy in the cache is used, with a notice.

    Args:
        name: The hub id.
        revision: Branch, tag or commit; None is the default branch.
        settings_only: Download config, tokenizer and chat template, but no weights.

    Raises:
        RequestError: There is no such model or revision, its terms were not accepted, or its
            weights have a format that is not read.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name} at revision {revision}" if revision else name
    refusals = {
        GatedRepoError: "its terms must be accepted first; accept them on the hub and log in",
        RevisionNotFoundError: "no such revision on the hub",
        RepositoryNotFoundError: "no such folder, and no such model on the hub (or it is private)",
    }
    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except tuple(refusals) as error:
        reason = next(text for kind, text in refusals.items() if isinstance(error, kind))
        raise RequestError(f"{at}: {reason}") from None
    except Exception as error:  # without a network, the type depends on the version of the client
        return _cached(name, revision, at, one_line(error), settings_only)
    if not settings_only and not weights_of(files):
        raise RequestError(
            f"{at}: no weights that are read; expected safetensors or consolidated.*.pth (of a "
            "repository of GGUF files, download one and name the file)"
        )
    wanted = wanted_files(files, settings_only)
    with explained(f"{at}: could not be downloaded", Exception):
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def _cached(name: str, revision: str | None, at: str, why: str, settings_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    unreachable = f"the hub cannot be reached ({why})"
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # the type depends on the version of the client
        raise RequestError(
            f"{at}: no such folder, not in the hub's cache, and {unreachable}"
        ) from None
    if not settings_only and not weights_of([path.name for path in folder.iterdir()]):
        raise RequestError(
            f"{at}: the hub's cache has its settings without weights, and {unreachable}"
        )
    notice(f"{at}: the hub cannot be reached; the copy in its cache is used")
    return folder


def weights_of(files: Collection[str]) -> list[str]:
    """Return the files of one set of weights of a repository: a model's, or else an adapter's."""
    sets = ([f for f in files if "/" not in f and fnmatch(f, pattern)] for pattern in _WEIGHTS)
    return next(filter(None, sets), [])


def wanted_files(files: Collection[str], settings_only: bool = False) -> list[str]:
    """Return the settings, tokenizer and one set of weights of a repository.

    Configs of files that are not read are left out.
    """
    weights, unread = weights_of(files), set()
    if weights and not weights[0].startswith("adapter_model"):
        unread.add(ADAPTER_CONFIG)
    if weights and weights[0].startswith("consolidated"):
        unread |= {f"{WEIGHTS}{INDEX}", *([CONFIG] if PARAMS in files else [])}
    wanted = [
        file
        for pattern in _SETTINGS
        for file in files
        if fnmatch(file, pattern) and file.count("/") == pattern.count("/") and file not in unread
    ]
    return [*dict.fromkeys(wanted), *([] if settings_only else weights)]

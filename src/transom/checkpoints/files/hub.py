"""Model folders by hub id: downloaded once through huggingface_hub, then read from its cache. No
torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from transom.base.errors import RequestError, notice
from transom.checkpoints.files.pooling import POOLING
from transom.tokenizers.folder import TEMPLATES

_SETTINGS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.model.v*",
    "tokenizer.txt",
    "merges.txt",
    "vocab.txt",
)
# Sets of weights, the first that a repository has counts; those of adapters are read on the weights
# of their base.
_MODELS = ("model*.safetensors", "consolidated*.safetensors", "consolidated.*.pth")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path could be `owner/model`."""
    return (
        re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is not None
        and ".." not in name
        and "--" not in name
    )


def download(name: str, revision: str | None = None, *, settings_only: bool = False) -> Path:
    """The local folder of a hub id, fetched where this machine does not have it; what fails is a
    `RequestError`.

    `settings_only` leaves the weights where they are: config, tokenizer and chat template say what
    a model is.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name} at revision {revision}" if revision else name
    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except GatedRepoError:
        raise RequestError(
            f"{at}: the hub wants its terms accepted first; accept them there and log in"
        ) from None
    except RevisionNotFoundError:
        raise RequestError(f"{at}: no such revision on the hub") from None
    except RepositoryNotFoundError:
        raise RequestError(
            f"{at}: no such folder here, and no such model on the hub (or it is private)"
        ) from None
    except (
        Exception
    ) as error:  # whatever the HTTP client of this version raises when there is no network
        return _cached(name, revision, at, error, settings_only)
    if not settings_only and not weights_of(files):
        others = [
            file
            for end in (".safetensors", ".bin", ".gguf")
            for file in files
            if file.endswith(end)
        ]
        found = f"it has {others[0]}" if others else "it has none"
        raise RequestError(f"{at}: {found}; expected weights in safetensors or consolidated.*.pth")
    try:
        wanted = wanted_files(files, settings_only)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # as above, or a full disk
        raise RequestError(f"{at}: could not be downloaded ({_short(error)})") from None


def _cached(
    name: str, revision: str | None, at: str, error: Exception, settings_only: bool
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # not there: which of its errors says so depends on the version
        raise RequestError(
            f"{at}: no such folder, not in the hub's cache here, and the hub cannot be reached "
            f"({_short(error)})"
        ) from None
    if not settings_only and not weights_of([path.name for path in folder.iterdir()]):
        raise RequestError(
            f"{at}: the hub's cache here holds its settings without weights, and the hub cannot "
            f"be reached ({_short(error)})"
        )
    notice(f"{at}: the hub cannot be reached, the copy in its cache is used")
    return folder


def weights_of(files: Collection[str]) -> list[str]:
    """One set of weights of a repository: safetensors of Hugging Face's layout first, an adapter's
    last.
    """
    top = [file for file in files if "/" not in file]
    sets = ([file for file in top if fnmatch(file, pattern)] for pattern in (*_MODELS, *_ADAPTERS))
    return next((found for found in sets if found), [])


def wanted_files(files: Collection[str], settings_only: bool = False) -> list[str]:
    """Settings, tokenizer and one set of weights of a repository, without the configs of what is
    not read.
    """
    weights, unread = weights_of(files), set()
    if weights and not weights[0].startswith("adapter_model"):
        unread.add("adapter_config.json")
    if weights and weights[0].startswith("consolidated"):
        unread.add("model.safetensors.index.json")
        if "params.json" in files:
            unread.add("config.json")
    settings = [
        file for file in files if "/" not in file and any(fnmatch(file, one) for one in _SETTINGS)
    ]
    settings += [file for file in files if fnmatch(file, f"{TEMPLATES}/*.jinja") or file == POOLING]
    return [file for file in settings if file not in unread] + ([] if settings_only else weights)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__

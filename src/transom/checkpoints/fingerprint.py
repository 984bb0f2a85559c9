"""Which weights an adapter belongs to: a fingerprint of its base, kept in `transom.json` beside the
adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transom.base import fields
from transom.base.errors import RequestError, notice, require
from transom.base.fields import describe
from transom.base.files import cache_dir, read_json, write_text
from transom.checkpoints.files.folders import files_read, model_folder, read_args
from transom.checkpoints.files.lazy_tensors import Source, Stored
from transom.checkpoints.load import open_state, outline, shapes_of
from transom.config.model_args import ModelArgs
from transom.names.transforms import turn_rotary

ADAPTER_FACTS = "transom.json"
_VERSION = 1  # of the rule by which fingerprints are made
_SETTLED = 2_000_000_000  # nanoseconds
_THREADS = 4  # hashing releases the interpreter; as many tensors that are not maps are in memory


@dataclass(frozen=True)
class AdapterFacts:
    """What PEFT's files do not say of an adapter: the base it was trained on."""

    base_fingerprint: str = describe("", "`fingerprint` of the base")
    base: str = describe("", "folder or hub id of the base, as it was given")
    quantize: dict[str, Any] | None = describe(
        None, "how the base was quantized in training (QuantizeArgs)"
    )
    dtype: str | None = describe(
        None, "dtype that the base's weights had in training; the files' own when none"
    )

    def __post_init__(self) -> None:
        require(
            bool(self.base_fingerprint),
            "base_fingerprint",
            self.base_fingerprint,
            "expected a fingerprint",
        )


def fingerprint(folder: str | Path, *, fresh: bool = False) -> str:
    """Return a hash of the weights of a model folder, hex: every number under our name in its
    stored dtype.

    Rotary rows are hashed as interleaved pairs, so a model has one fingerprint in all formats that
    keep its dtype and tying. Settings (`rope_theta`, the tokenizer) are not part of it. Files are
    streamed.

    The result is cached on this machine and reused while the files of config and weights are the
    same. With `fresh` it is computed again.
    """
    where = model_folder(folder)
    now = time.time_ns()
    signs = _signs(where)
    known = None if fresh else _known(where, signs)
    if known is not None:
        return known
    args = read_args(where)
    made = fingerprint_of(args, open_state(where, args, shapes_of(outline(args))))
    # A file that changes twice within one tick of the clock looks the same, so results of new files
    # are not kept.
    if (
        not fresh
        and all(max(sign[2:4]) < now - _SETTLED for sign in signs)
        and _signs(where) == signs
    ):
        _keep(where, signs, made)
    return made


# Identifies a file that was hashed: name, size, times of its content and of its entry, inode.
Sign = list[Any]


def _signs(folder: Path) -> list[Sign]:
    signs: list[Sign] = []
    for path in files_read(folder):
        try:
            found = path.stat()
        except OSError:
            continue  # whoever reads the file says why it cannot be read
        signs.append([path.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
    return signs


def _cached(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return cache_dir() / "fingerprints" / f"{name}.json"


def _known(folder: Path, signs: list[Sign]) -> str | None:
    """Return the cached fingerprint of exactly these files, if there is one."""
    path = _cached(folder)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        fits = kept["version"] == _VERSION and kept["files"] == signs
        return str(kept["fingerprint"]) if fits else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _keep(folder: Path, signs: list[Sign], made: str) -> None:
    path = _cached(folder)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    content = {
        "version": _VERSION,
        "folder": str(folder.resolve()),
        "files": signs,
        "fingerprint": made,
    }
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(path)


def fingerprint_of(args: ModelArgs, source: Source) -> str:
    """`fingerprint` of parameters that are open already."""
    names = sorted(source)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _digest(name, source[name], args), names)
        whole = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    if (
        args.mla_args is not None
    ):  # latent heads cannot be turned, so their order is part of what they are
        whole += f"rotary rows {args.rope_layout}\n"
    return hashlib.sha256(whole.encode()).hexdigest()


def _digest(name: str, stored: Stored, args: ModelArgs) -> str:
    tensor = stored.read()
    if args.mla_args is None:
        tensor = turn_rotary(name, tensor, args, "interleaved")
    out = hashlib.sha256(f"{stored.dtype} {tuple(stored.shape)} ".encode())
    out.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def write_facts(
    adapter: str | Path,
    base: str | Path,
    base_fingerprint: str,
    quantize: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write `transom.json` into an adapter folder: on which weights and in which form it was
    trained.
    """
    facts = AdapterFacts(
        base_fingerprint, str(base), None if quantize is None else dict(quantize), dtype
    )
    write_text(Path(adapter) / ADAPTER_FACTS, json.dumps(fields.write(facts), indent=2))


def read_facts(adapter: str | Path) -> AdapterFacts | None:
    """What `transom.json` of an adapter folder says; None where there is none."""
    path = Path(adapter) / ADAPTER_FACTS
    return fields.read(AdapterFacts, read_json(path), str(path)) if path.exists() else None


def check_trained_on(adapter: Path, base: Path) -> None:
    """`check_base` where the adapter says what it was trained on; a base that was quantized then is
    said.
    """
    facts = read_facts(adapter)
    if facts is None:
        return
    check_base(adapter, base)
    if facts.quantize is not None:
        kind = facts.quantize.get("kind")
        notice(
            f"{adapter}: trained on a base in {kind}, here on all of its precision; transom "
            f"merge measures both"
        )


def check_base(adapter: str | Path, base: str | Path, base_fingerprint: str | None = None) -> str:
    """The fingerprint of `base` (taken as known where given), which must be the one that `adapter`
    was trained on.

    Another base is a `RequestError`; an adapter that does not say its own, as PEFT's do not, is a
    notice.
    """
    found = fingerprint(base) if base_fingerprint is None else base_fingerprint
    facts = read_facts(adapter)
    if facts is None:
        notice(
            f"{adapter}: no {ADAPTER_FACTS} says on which weights it was trained, so {base} "
            f"cannot be checked"
        )
    elif facts.base_fingerprint != found:
        raise RequestError(
            f"base: got {str(base)!r}; its weights have fingerprint {found[:12]}, and "
            f"{adapter} was trained on "
            f"{facts.base_fingerprint[:12]} ({facts.base}); expected the base that it was "
            f"trained on"
        )
    return found

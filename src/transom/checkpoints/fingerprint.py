"""Fingerprints of model weights, and `transom.json`: the base that an adapter was trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from transom.base import fields
from transom.base.errors import RequestError, expect, notice
from transom.base.fields import describe
from transom.base.files import cache_dir, read_json, shown_name, write_text
from transom.checkpoints.files.layout import files_read
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.location import find_model
from transom.checkpoints.read_args import read_args
from transom.checkpoints.state import open_parameters
from transom.config.model_args import ModelArgs
from transom.names.transforms import permute_rotary
from transom.quantize.args import QuantizeArgs

ADAPTER_FACTS = "transom.json"
_VERSION = 1  # of the rule by which fingerprints are made
_SETTLED = 2_000_000_000  # nanoseconds after which a file's times tell whether it was changed
_THREADS = 4  # hashing releases the interpreter's lock; each thread may hold one tensor in memory


@dataclass(frozen=True)
class AdapterFacts:
    """What PEFT's files do not state about an adapter: the base that it was trained on."""

    base_fingerprint: str = describe("", "`fingerprint` of the base")
    base: str = describe("", "folder or hub id of the base, as it was given")
    quantize: QuantizeArgs | None = describe(None, "how the base was quantized in training")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = describe(
        None, "dtype of the base's weights in training; None is that of the files"
    )

    def __post_init__(self) -> None:
        made = self.base_fingerprint
        expect(bool(made), "base_fingerprint", made, "the fingerprint of a model")


def fingerprint(folder: str | Path, *, fresh: bool = False) -> str:
    """Return a hash of the weights of a model, 64 hex digits.

    It is a SHA-256 over every number, under Transom's names and in the dtype of the files. Rotary
    rows are hashed as interleaved pairs, so a model has one fingerprint in all formats that keep
    its dtype and tying. Settings such as `rope_theta` and the tokenizer are not part of it.

    Args:
        folder: A model folder, a run folder for its best step, or a hub id.
        fresh: Compute it again. Otherwise a result that is cached on this machine is used while
            the files of config and weights have not changed.

    Raises:
        RequestError: There is no such model, or its files are damaged.
    """
    location = find_model(folder)
    expect(location.adapter is None, "model", str(folder), "no adapter")
    where = location.model
    now, states = time.time_ns(), _file_states(where)
    cache = _cache_file(where, states)
    with contextlib.suppress(OSError):
        cached = "" if fresh else cache.read_text(encoding="utf-8")
        if re.fullmatch("[0-9a-f]{64}", cached):
            return cached
    args = read_args(where)
    made = fingerprint_of(args, open_parameters(where, args, apart=True))
    # A file that changes twice within one tick of the clock has the same times, so results for new
    # files are not cached.
    settled = all(max(state[2:4]) < now - _SETTLED for state in states)
    if not fresh and settled and _file_states(where) == states:
        with contextlib.suppress(OSError):  # without the cache, the weights are hashed again
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(made, encoding="utf-8")
    return made


def _file_states(folder: Path) -> list[list[Any]]:
    """Return name, size, times and inode of each file that the fingerprint depends on."""
    states: list[list[Any]] = []
    for path in files_read(folder):
        with contextlib.suppress(OSError):  # reading the file reports why it cannot be read
            s = path.stat()
            states.append([path.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino])
    return states


def _cache_file(folder: Path, states: list[list[Any]]) -> Path:
    """Return the file for the fingerprint of a folder while its files are in these states."""
    key = json.dumps([_VERSION, str(folder.resolve()), states])
    return cache_dir() / "fingerprints" / hashlib.sha256(key.encode()).hexdigest()


def fingerprint_of(args: ModelArgs, source: LazyTensors) -> str:
    """Return the fingerprint of parameters that are open already; see `fingerprint`."""
    names = sorted(source)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _digest(name, source[name], args), names)
        lines = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    if args.mla_args is not None:  # the rows of latent heads are hashed in the order of the files
        lines += f"rotary rows {args.rope_layout}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def _digest(name: str, lazy: LazyTensor, args: ModelArgs) -> str:
    tensor = lazy.read()
    if args.mla_args is None:
        tensor = permute_rotary(name, tensor, args, "interleaved")
    out = hashlib.sha256(f"{lazy.dtype} {tuple(lazy.shape)} ".encode())
    out.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def write_facts(
    adapter: str | Path,
    base: str | Path,
    base_fingerprint: str,
    quantize: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write `transom.json` into an adapter folder; the arguments are the fields of AdapterFacts."""
    known = {"base_fingerprint": base_fingerprint, "base": str(base)}
    facts = fields.read(AdapterFacts, {**known, "quantize": quantize, "dtype": dtype})
    write_text(Path(adapter) / ADAPTER_FACTS, json.dumps(fields.write(facts), indent=2))


def read_facts(adapter: str | Path) -> AdapterFacts | None:
    """Return the content of an adapter's `transom.json`, or None without such a file."""
    path = Path(adapter) / ADAPTER_FACTS
    return fields.read(AdapterFacts, read_json(path), str(path)) if path.exists() else None


def check_trained_on(adapter: Path, base: Path) -> None:
    """Check an adapter that states its base as `check_base` does; others pass.

    A notice tells if the base was quantized in training, since it is not quantized here.
    """
    facts = read_facts(adapter)
    if facts is None:
        return
    check_base(adapter, base)
    if facts.quantize is not None:
        notice(
            f"{adapter}: trained on a base in {facts.quantize.kind}, here in full precision; "
            "transom merge measures both"
        )


def check_base(adapter: str | Path, base: str | Path, base_fingerprint: str | None = None) -> str:
    """Check that an adapter was trained on the weights of `base`; return their fingerprint.

    Args:
        adapter: The adapter's folder. If it has no `transom.json`, as those that PEFT writes, a
            notice is printed.
        base: The model's folder.
        base_fingerprint: The fingerprint of `base`, if it is known already.

    Raises:
        RequestError: The adapter was trained on other weights.
    """
    found = fingerprint(base) if base_fingerprint is None else base_fingerprint
    facts = read_facts(adapter)
    if facts is None:
        notice(
            f"{adapter}: no {ADAPTER_FACTS} states on which weights it was trained: "
            f"{shown_name(Path(base))} is not checked"
        )
    elif facts.base_fingerprint != found:
        raise RequestError(
            f"base: got {shown_name(Path(base))!r} with fingerprint {found[:12]}; expected the "
            f"base that {adapter} was trained on, with fingerprint {facts.base_fingerprint[:12]} "
            f"({facts.base})"
        )
    return found

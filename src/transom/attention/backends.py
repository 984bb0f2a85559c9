"""The attention backends: what each can do, and which one a job gets.

Backends that failed `transom verify attention` on this machine are listed in attention.json in the
cache folder, and are not used here.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from transom.attention import blockwise, flex, sdpa, varlen
from transom.attention.graphs import constant_in_graphs
from transom.attention.mask import MaskSpec
from transom.attention.reference import reference
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import RequestError, expect, nearest, notice
from transom.base.files import cache_dir, read_json
from transom.base.locks import FolderLock

LONG = 1024  # slots from which compiled block masks are faster than masked blocks


class Attend(Protocol):
    """Attention of one layer.

    Args:
        q_BTNH: Queries [B, T, N, H] of any floating dtype.
        view: The keys and values that the queries may attend to, with their positions.
        spec: The mask rule, and the positions of the queries.
        score: Scale, soft cap and sinks.

    Returns:
        [B, T, N, v's H] in the dtype of the queries. Rows of queries that may attend to no key are
        zero.
    """

    def __call__(
        self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    A call computes it in this way only, and raises a `RequestError` for a job that it can't
    compute or if it may not be used on this machine.

    Attributes:
        name: Its name.
        function: The computation, without checks.
        why_not: A function that returns why the backend can't compute a job, or None if it can.
    """

    name: str
    function: Attend
    why_not: Callable[[Tensor, CacheView, MaskSpec, ScoreArgs], str | None]

    def __call__(
        self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /
    ) -> Tensor:
        reason = refusal(self.name) or self.why_not(q_BTNH, view, spec, score)
        if reason is not None:
            raise RequestError(
                f"attention backend: got {self.name!r}, which {reason}; expected auto"
            )
        return self.function(q_BTNH, view, spec, score)


def _always(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    """Return None: the backend can compute every job."""
    return None


BACKENDS: dict[str, Backend] = {
    one.name: one
    for one in (
        Backend("sdpa", sdpa.sdpa, sdpa.why_not),
        Backend("blockwise", blockwise.blockwise, _always),
        Backend("flex", flex.flex, flex.why_not),
        Backend("varlen", varlen.varlen, varlen.why_not),
        Backend("reference", reference, _always),
    )
}


def backend(name: str) -> Attend:
    """Return the backend of that name; `auto` chooses one for every job.

    Raises:
        RequestError: There is no backend of that name.
    """
    if name == "auto":
        return auto
    known = ("auto", *BACKENDS)
    expect(name in BACKENDS, "attention backend", name, f"{', '.join(known)}{nearest(name, known)}")
    return BACKENDS[name]


def auto(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Compute attention with the backend that `choose` returns.

    The choice is made once per step and kind of layer: it is stored in `spec`.
    """
    if torch.compiler.is_compiling():  # a graph must not depend on what an earlier layer stored
        return choose(q_BTNH, view, spec, score).function(q_BTNH, view, spec, score)
    states = (q_BTNH, *view.dense()[0])
    key = (score.plain, view.new_at, *((x.dtype, x.size(-1)) for x in states))
    if key not in spec.tables:
        spec.tables[key] = choose(q_BTNH, view, spec, score)
    chosen: Backend = spec.tables[key]
    return chosen.function(q_BTNH, view, spec, score)


def in_operators_of_torch(
    q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs
) -> Tensor:
    """Compute attention by operators that every process with torch has, for exported programs."""
    return (sdpa.sdpa if score.plain else reference)(q_BTNH, view, spec, score)


def choose(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Backend:
    """Return the first backend of the job's `preference` that can compute it here.

    Raises:
        RequestError: All backends that could compute it failed `transom verify attention`.
    """
    skipped = []
    for name in preference(q_BTNH, view, spec, score):
        if BACKENDS[name].why_not(q_BTNH, view, spec, score) is None:
            if _usable(name):
                return BACKENDS[name]
            skipped.append(name)
    raise RequestError(
        f"attention: got a job for {', '.join(skipped)}, which failed `transom verify attention` "
        f"on this machine; expected another backend by name, or {refused_file()} without them"
    )


def preference(
    q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs
) -> tuple[str, ...]:
    """Return the backends to try for a job, fastest first; blockwise can compute every job."""
    if not q_BTNH.is_cuda:
        return ("sdpa", "blockwise")
    many = q_BTNH.size(1) >= flex.BLOCK  # for fewer queries its blocks are mostly empty
    if not score.plain:
        return ("flex", "blockwise") if many else ("blockwise",)
    if view.only_new and spec.layout is not None:
        packed = len(spec.layout.documents) > q_BTNH.size(0)
        if packed or spec.rule.size:
            return ("varlen", "sdpa", "blockwise")
        return ("sdpa", "varlen", "blockwise")
    # sdpa would compute everything that the rule hides, and keep the mask for a backward pass.
    apart = view.new_at is None and view.positions_BS.size(1) >= LONG
    kept = torch.is_grad_enabled() and spec.rule.kind != "full"
    masked = many and apart and (kept or spec.rule.size > 0)
    return ("flex", "sdpa", "blockwise") if masked else ("sdpa", "blockwise")


@constant_in_graphs
def refusal(name: str) -> str | None:
    """Return why a backend is not used on this machine, or None."""
    reason = refused().get(name)
    if reason is None:
        return None
    return f"failed `transom verify attention` on this machine ({reason})"


@constant_in_graphs
def _usable(name: str) -> bool:
    """Return whether a backend may be used here; a notice names one that is skipped."""
    reason = refusal(name)
    if reason is not None:
        notice(f"attention backend {name} is skipped: it {reason}; see {refused_file()}")
    return reason is None


@functools.cache
def refused() -> Mapping[str, str]:
    """Return {backend: reason} of the backends that failed `verify attention` on this machine.

    The file is read once; see `reload`.
    """
    return _read_refused().get(machine_key(), {})


def reload() -> None:
    """Read the file of refused backends again at its next use."""
    refused.cache_clear()


def refuse(failures: Mapping[str, str]) -> Path:
    """Write {backend: reason} as the backends that are not used on this machine from now on.

    Returns:
        The file that was written.
    """
    for name in failures:
        expect(name in BACKENDS, "attention backend", name, ", ".join(BACKENDS))
    path = refused_file()
    with FolderLock(path, wait=True):  # another process may write as well
        table = {**_read_refused(), machine_key(): dict(failures)}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        kept = {key: value for key, value in table.items() if value}
        part.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        part.replace(path)  # readers see the old file or the new one
    reload()
    return path


def refused_file() -> Path:
    """Return the path of attention.json in the cache folder."""
    return cache_dir() / "attention.json"


def machine_key() -> str:
    """Return what decides about kernels: torch's version, the CPU's instructions and the GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"torch {torch.__version__}, {platform.machine()} "
        f"{torch.backends.cpu.get_cpu_capability()}, {gpu}"
    )


def _read_refused() -> dict[str, dict[str, str]]:
    """Return {machine: {backend: reason}}; a notice names a file that can't be read."""
    path = refused_file()
    try:
        table = read_json(path) if path.exists() else {}
        valid = all(isinstance(x, str) for row in table.values() for x in row.values())
    except (OSError, ValueError, AttributeError):  # no JSON, or a row that is no object
        valid = False
    if not valid:
        notice(f"{path} can't be read: no attention backend is skipped; expected JSON of reasons")
        return {}
    return table

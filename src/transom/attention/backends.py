"""The attention backends: what each can do, which one a job gets, and which are refused on this
machine.
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
from transom.base.errors import RequestError, nearest, notice
from transom.base.files import cache_dir
from transom.base.locks import FolderLock

LONG = 1024  # slots from which compiled block masks are worth more than masked blocks, tokens


class Attend(Protocol):
    """attend(q [B, T, N, H], view, spec, score) -> [B, T, N, v's H]; fully masked rows give
    zeros.
    """

    def __call__(
        self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute attention; `why_not` says in words what keeps it from a job, None when it
    can do it.

    Called, it is that way and no other: a job it cannot do, or a backend refused here, is a
    `RequestError`.
    """

    name: str
    function: Attend
    why_not: Callable[[Tensor, CacheView, MaskSpec, ScoreArgs], str | None]

    def __call__(
        self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /
    ) -> Tensor:
        reason = refusal(self.name) or self.why_not(q_BTNH, view, spec, score)
        if reason is not None:
            able = [
                name
                for name, other in BACKENDS.items()
                if other.why_not(q_BTNH, view, spec, score) is None
            ]
            raise RequestError(
                f"attention backend {self.name!r}: {reason}; expected {', '.join(able)}"
            )
        return self.function(q_BTNH, view, spec, score)


def _always(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> str | None:
    return None


BACKENDS: dict[str, Backend] = {
    one.name: one
    for one in (
        Backend("sdpa", sdpa.sdpa, sdpa.why_not),
        Backend("blockwise", blockwise.blockwise, blockwise.why_not),
        Backend("flex", flex.flex, flex.why_not),
        Backend("varlen", varlen.varlen, varlen.why_not),
        Backend("reference", reference, _always),
    )
}


def backend(name: str) -> Attend:
    """The backend of that name, or `auto`; forced, it raises `RequestError` on a job it cannot
    do.
    """
    if name == "auto":
        return auto
    if name not in BACKENDS:
        known = ("auto", *BACKENDS)
        raise RequestError(
            f"attention backend {name!r}: known are {', '.join(known)}{nearest(name, known)}"
        )
    return BACKENDS[name]


def auto(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
    """Attention by the first backend in this job's order that can do it and is not refused on this
    machine.
    """
    return choose(q_BTNH, view, spec, score).function(q_BTNH, view, spec, score)


def choose(q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Backend:
    """The backend that `auto` takes; a `RequestError` where all that could do the job are
    refused.
    """
    refused_here = []
    for name in preference(q_BTNH, view, spec, score):
        if BACKENDS[name].why_not(q_BTNH, view, spec, score) is None:
            if refusal(name) is None:
                return BACKENDS[name]
            refused_here.append(name)
    raise RequestError(
        f"attention: {', '.join(refused_here)} could do this job and failed `transom verify "
        f"attention` on this "
        f"machine; expected another backend by name, or {refused_file()} without them"
    )


def preference(
    q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs
) -> tuple[str, ...]:
    """Backends in the order in which they are tried; the reference never is, and blockwise can do
    everything.
    """
    if not q_BTNH.is_cuda:
        return ("sdpa", "blockwise")
    if not score.plain:  # one compiled kernel; for a few queries its block of 128 is mostly empty
        return ("flex", "blockwise") if q_BTNH.size(1) >= flex.BLOCK else ("blockwise",)
    layout = spec.layout
    if view.only_new and layout is not None:
        packed = len(layout.documents) > q_BTNH.size(0)
        return (
            ("varlen", "sdpa", "blockwise")
            if packed or spec.rule.size
            else ("sdpa", "varlen", "blockwise")
        )
    blind = (
        view.new_at is None and spec.rule.size > 0
    )  # sdpa would work through all that the rule hides
    if blind and q_BTNH.size(1) >= flex.BLOCK and view.positions_BS.size(1) >= LONG:
        return ("flex", "sdpa", "blockwise")
    return ("sdpa", "blockwise")


@constant_in_graphs
def refusal(name: str) -> str | None:
    """Why a backend is refused on this machine, or None."""
    reason = refused().get(name)
    return (
        None
        if reason is None
        else f"it failed `transom verify attention` on this machine ({reason})"
    )


@functools.cache
def refused() -> Mapping[str, str]:
    """{backend: reason} of those that failed `verify attention` on this machine; read once, see
    `reload`.
    """
    return _read_refused().get(machine_key(), {})


def reload() -> None:
    """Forget what was read of the file of refused backends: the next use reads it again."""
    refused.cache_clear()


def refuse(failures: Mapping[str, str]) -> Path:
    """Write {backend: reason} as all that is refused on this machine from now on; an empty table
    refuses none.
    """
    unknown = [name for name in failures if name not in BACKENDS]
    if unknown:
        raise RequestError(f"attention backend {unknown[0]!r}: known are {', '.join(BACKENDS)}")
    path = refused_file()
    with FolderLock(path, wait=True):  # another process may be adding what it has found
        table = {**_read_refused(), machine_key(): dict(failures)}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        kept = {key: value for key, value in table.items() if value}
        part.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        part.replace(path)  # a reader finds the old file or the new one, never half of one
    reload()
    return path


def refused_file() -> Path:
    """attention.json in the cache folder."""
    return cache_dir() / "attention.json"


def machine_key() -> str:
    """What decides which kernels run here: torch's version, the processor's instructions and the
    GPU.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"torch {torch.__version__}, {platform.machine()} "
        f"{torch.backends.cpu.get_cpu_capability()}, {gpu}"
    )


def _read_refused() -> dict[str, dict[str, str]]:
    """{machine: {backend: reason}}; a file that cannot be read refuses nothing and is said so."""
    path = refused_file()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notice(
            f"{path} could not be read ({type(error).__name__}): no attention backend is refused"
        )
        return {}
    rows = table.values() if isinstance(table, dict) else [None]
    if not all(
        isinstance(row, dict) and all(isinstance(reason, str) for reason in row.values())
        for row in rows
    ):
        notice(
            f"{path} holds something else than backends and reasons: no attention backend is "
            f"refused"
        )
        return {}
    return table

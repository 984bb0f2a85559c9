"""Every attention backend on this machine against the float64 reference, for every job that it says
it can do.

What comes out is a support matrix with the largest error of each backend and dtype, a diagnosis of
every failure, and the list of backends that are refused from then on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from transom.attention.backends import BACKENDS, Backend, machine_key, refused_file
from transom.attention.reference import reference
from transom.base.runtime import dtype_name
from transom.verify.attention_jobs import Inputs, Job, build, jobs
from transom.verify.findings import Finding, difference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Against float64 on the same rounded inputs, whose values are about 1: a few roundings of the dtype
# (half the kernels round the attention weights too), for gradients times the keys they sum over.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_FACTOR = 4.0
BLOCKS = (
    128,
    64,
    32,
    16,
)  # tokens; a kernel that is wrong at other lengths only is told by the largest


@dataclass(frozen=True)
class Outcome:
    """What one backend made of one job: why it cannot do it, or its error, or what it raised."""

    backend: str
    device: str
    dtype: torch.dtype
    job: Job
    error: float = 0.0
    why_not: str = ""
    raised: str = ""
    in_masked_row: bool = False

    @property
    def tolerance(self) -> float:
        """Largest error accepted."""
        return TOLERANCES[self.dtype] * (GRADIENT_FACTOR if self.job.gradients else 1.0)

    @property
    def ok(self) -> bool:
        """Whether the job was done right, or declined."""
        return bool(self.why_not) or (not self.raised and self.error <= self.tolerance)


def verify_attention(
    devices: Iterable[str],
    backends: Mapping[str, Backend] = BACKENDS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    todo: Callable[[], Iterator[Job]] = jobs,
) -> Iterator[Outcome]:
    """Every job in every dtype, done by every backend that declares it can."""
    for device in map(torch.device, devices):
        with many_shapes(device):
            for job, dtype in product(todo(), dtypes):
                inputs = build(job, device).to(dtype)
                expected = results(reference, inputs.to(torch.float64), job)
                for name, backend in backends.items():
                    yield outcome(name, backend, inputs, expected, job, device.type, dtype)


def many_shapes(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Compiled kernels meet more shapes here than a model has, and would give up at torch's usual
    limit.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    import torch._dynamo.config as limits  # slow to import, and of no use elsewhere

    return limits.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)


def outcome(
    name: str,
    backend: Backend,
    inputs: Inputs,
    expected: tuple[Tensor, ...],
    job: Job,
    device: str,
    dtype: torch.dtype,
) -> Outcome:
    """One backend on one job; it is asked directly, so that one that is refused can prove itself
    again.
    """
    q, view, spec, score = inputs.tensors[0], inputs.view, inputs.spec, inputs.score
    reason = backend.why_not(q, view, spec, score)
    if reason is not None:
        return Outcome(name, device, dtype, job, why_not=reason)
    try:
        mine = results(backend.function, inputs, job)
    except Exception as error:  # whatever a kernel raises is a finding, not the end of the others
        said = " ".join(str(error).split())[:200]
        return Outcome(name, device, dtype, job, raised=f"{type(error).__name__}: {said}")
    gaps = [difference(x, y) for x, y in zip(mine, expected, strict=True)]
    blank = (expected[0] == 0).all(-1)  # rows that see nothing come out as zeros
    in_masked = (
        bool((~mine[0].isfinite()).any(-1).logical_and(blank).any())
        if mine[0].shape == expected[0].shape
        else False
    )
    return Outcome(name, device, dtype, job, max(gaps), in_masked_row=in_masked)


def results(attend: Callable[..., Tensor], inputs: Inputs, job: Job) -> tuple[Tensor, ...]:
    """The output, and where the job asks for them the gradients of q, k, v and sinks."""
    if not job.gradients:
        with torch.no_grad():
            return (attend(inputs.tensors[0], inputs.view, inputs.spec, inputs.score),)
    out = attend(inputs.tensors[0], inputs.view, inputs.spec, inputs.score)
    pull = torch.cos(torch.arange(out.numel(), dtype=torch.float64, device=out.device)).view_as(out)
    grads = torch.autograd.grad(out, inputs.tensors, pull.to(out.dtype), allow_unused=True)
    zeros = (
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(inputs.tensors, grads, strict=True)
    )
    return (out.detach(), *zeros)


# -- what it means
# ----------------------------------------------------------------------------------------


def failures(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """{backend: what is wrong with it, in words} of those that did wrong what they say they can
    do.
    """
    every = list(outcomes)
    names = dict.fromkeys(one.backend for one in every if not one.ok)
    return {
        name: diagnosis([one for one in every if one.backend == name and not one.why_not])
        for name in names
    }


def diagnosis(tried: list[Outcome]) -> str:
    """The most telling thing that all failures of one backend have in common, and the first
    case.
    """
    bad = [one for one in tried if not one.ok]
    first = bad[0]
    where = f"first in {dtype_name(first.dtype)} on {first.device}: {first.job}"
    for dtype in dict.fromkeys(one.dtype for one in bad):
        of_dtype = [one for one in tried if one.dtype == dtype]
        if all(one.raised for one in of_dtype):
            return f"its kernel cannot take {dtype_name(dtype)} ({of_dtype[0].raised})"
    if raising := [one for one in bad if one.raised]:
        return f"it raises {raising[0].raised}, {len(bad)} of {len(tried)} jobs fail, {where}"
    if any(one.in_masked_row for one in bad):
        return f"NaN from a masked row, {where}"
    right = {one.job.length for one in tried if one.ok and one.job.group == "lengths"}
    wrong = {one.job.length for one in bad if one.job.group == "lengths"}
    for block in BLOCKS:
        whole = [length for length in right | wrong if length % block == 0]
        if wrong and whole and not set(whole) & wrong and all(length % block for length in wrong):
            return f"wrong at lengths that are no multiple of {block}, {where}"
    groups = ", ".join(dict.fromkeys(one.job.group for one in bad))
    return f"error {first.error:.1e} where {first.tolerance:.0e} is accepted ({groups}), {where}"


@dataclass(frozen=True)
class Row:
    """One backend and dtype on one device: largest error per group, None where it declines all of
    it.
    """

    device: str
    backend: str
    dtype: str
    errors: dict[str, float | None]
    failed: dict[str, bool]
    declined: str = ""  # why it does nothing at all here


def matrix(outcomes: Iterable[Outcome]) -> list[Row]:
    """The support matrix, in the order in which things were tried."""
    groups: dict[tuple[str, str, torch.dtype], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.device, one.backend, one.dtype), []).append(one)
    columns = list(dict.fromkeys(job.group for job in jobs()))
    rows = []
    for (device, backend, dtype), every in sorted(
        groups.items(), key=lambda item: list(BACKENDS).index(item[0][1])
    ):
        done = [one for one in every if not one.why_not]
        errors = {
            name: max(
                (
                    float("inf") if one.raised else one.error
                    for one in done
                    if one.job.group == name
                ),
                default=None,
            )
            for name in columns
        }
        failed = {
            name: any(not one.ok for one in done if one.job.group == name) for name in columns
        }
        rows.append(
            Row(
                device, backend, dtype_name(dtype), errors, failed, "" if done else every[0].why_not
            )
        )
    return rows


def save_matrix(rows: Iterable[Row]) -> Path:
    """Keep the matrix beside the list of refused backends, under the name of this machine."""
    path = refused_file().with_name("attention-matrix.json")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        table = {}
    table = table if isinstance(table, dict) else {}
    table[machine_key()] = [plain(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1), encoding="utf-8")
    return path


def plain(row: Row) -> dict[str, object]:
    """A row as JSON takes it: an error that is not finite becomes a word."""
    words = {
        name: "not finite" if error == float("inf") else error for name, error in row.errors.items()
    }
    return {**vars(row), "errors": words}


def check_attention() -> Iterator[Finding]:
    """The same as findings, on the CPU in the two dtypes that leave no room for doubt."""
    for one in verify_attention(["cpu"], dtypes=DTYPES[:2]):
        if not one.why_not and one.backend != "reference":
            detail = "" if one.ok else one.raised or f"{one.backend} in {dtype_name(one.dtype)}"
            error = float("inf") if one.raised else one.error
            yield Finding(f"{one.backend} = reference", str(one.job), error, one.tolerance, detail)

"""Every attention backend against the float64 reference, for every job that it declares to support.

The result is a support matrix with the largest error of each backend, dtype and group of jobs. A
backend that fails is diagnosed, and `verify_machine` refuses it on this machine from then on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from transom.attention.backends import BACKENDS, Backend, refuse, refused_file
from transom.attention.reference import reference
from transom.base.errors import notice, one_line
from transom.base.runtime import dtype_name, one_thread, pick_device
from transom.verify.attention_jobs import Inputs, Job, build, jobs
from transom.verify.findings import Finding, difference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest value of float64 attention on the same rounded inputs, which are about 1:
# a few roundings of the dtype, since half of the kernels also round the attention weights.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
GRADIENT_FACTOR = 4.0  # gradients sum over keys
BLOCKS = (128, 64, 32, 16)  # tokens; the block sizes of known kernels, largest first


@dataclass(frozen=True)
class Outcome:
    """The result of one backend on one job.

    Attributes:
        error: The largest relative error of the output and the gradients; infinite if it raised.
        declined: Why the backend does not support the job, else empty.
        raised: The error that the backend raised, else empty.
        nan_in_masked_row: Whether a query that may attend to no key gave NaN.
    """

    backend: str
    device: str
    dtype: torch.dtype
    job: Job
    error: float = 0.0
    declined: str = ""
    raised: str = ""
    nan_in_masked_row: bool = False

    @property
    def tolerance(self) -> float:
        """The largest accepted error."""
        return TOLERANCES[self.dtype] * (GRADIENT_FACTOR if self.job.gradients else 1.0)

    @property
    def ok(self) -> bool:
        """Whether the backend declined the job or its error is accepted."""
        return bool(self.declined) or self.error <= self.tolerance


def check(device: str | None = None) -> Iterator[Finding]:
    """Compare all backends in float64 and float32, by default on the CPU; refuse none of them."""
    for one in compare_backends([pick_device(device or "cpu").type], dtypes=DTYPES[:2]):
        if not one.declined and one.backend != "reference":
            detail = one.raised or f"{one.backend} in {dtype_name(one.dtype)}"
            comparison = f"{one.backend} = reference"
            yield Finding(comparison, str(one.job), one.error, one.tolerance, detail)


def compare_backends(
    devices: Iterable[str],
    backends: Mapping[str, Backend] = BACKENDS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    all_jobs: Callable[[], Iterator[Job]] = jobs,
) -> Iterator[Outcome]:
    """Yield the outcome of every backend on every job in every dtype.

    Backends are called directly, so that one that was refused earlier can pass again.
    """
    for device in map(torch.device, devices):
        with _many_shapes(device):
            for job, dtype in product(all_jobs(), dtypes):
                inputs = build(job, device).to(dtype)
                expected = _results(reference, inputs.to(torch.float64), job)
                for name, backend in backends.items():
                    yield _outcome(name, backend, inputs, expected, job, dtype)


def _many_shapes(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Raise torch.compile's limit of recompilations: there are more shapes here than in a model."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    import torch._dynamo.config as limits  # slow to import, and needed on CUDA only

    return limits.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)


def _outcome(
    name: str,
    backend: Backend,
    inputs: Inputs,
    expected: tuple[Tensor, ...],
    job: Job,
    dtype: torch.dtype,
) -> Outcome:
    q = inputs.tensors[0]
    place = (name, q.device.type, dtype, job)
    reason = backend.why_not(q, inputs.view, inputs.spec, inputs.score)
    if reason is not None:
        return Outcome(*place, declined=reason)
    try:
        measured = _results(backend.function, inputs, job)
    except Exception as error:  # any error of a kernel is a failure of this backend alone
        return Outcome(*place, error=math.inf, raised=one_line(error))
    worst = max(difference(x, y) for x, y in zip(measured, expected, strict=True))
    masked = (expected[0] == 0).all(-1)  # the output of a query that may attend to no key
    same_shape = measured[0].shape == expected[0].shape
    nan = same_shape and bool((~measured[0].isfinite().all(-1) & masked).any())
    return Outcome(*place, error=worst, nan_in_masked_row=nan)


def _results(attend: Callable[..., Tensor], inputs: Inputs, job: Job) -> tuple[Tensor, ...]:
    """Return the output and, if the job asks for them, the gradients of q, k, v and the sinks."""
    q = inputs.tensors[0]
    with torch.set_grad_enabled(job.gradients):
        out = attend(q, inputs.view, inputs.spec, inputs.score)
    if not job.gradients:
        return (out,)
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64, device=out.device))
    gradients = torch.autograd.grad(
        out, inputs.tensors, weights.view_as(out).to(out.dtype), allow_unused=True
    )
    pairs = zip(inputs.tensors, gradients, strict=True)
    return (out.detach(), *(torch.zeros_like(x) if grad is None else grad for x, grad in pairs))


# -- diagnosis and support matrix


def failures(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Return the diagnosis of every backend that failed a job, by name."""
    tried: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if not one.declined:
            tried.setdefault(one.backend, []).append(one)
    return {
        name: _diagnosis(done) for name, done in tried.items() if not all(one.ok for one in done)
    }


def _diagnosis(tried: list[Outcome]) -> str:
    """Return the most specific cause that fits all failures of one backend, and the first case."""
    failed = [one for one in tried if not one.ok]
    first = failed[0]
    case = f"first in {dtype_name(first.dtype)} on {first.device}: {first.job}"
    for dtype in dict.fromkeys(one.dtype for one in failed):
        of_dtype = [one for one in tried if one.dtype == dtype]
        if all(one.raised for one in of_dtype):
            return f"its kernel does not support {dtype_name(dtype)} ({of_dtype[0].raised})"
    if raising := [one for one in failed if one.raised]:
        return f"raised {raising[0].raised}, {len(failed)} of {len(tried)} jobs fail, {case}"
    if any(one.nan_in_masked_row for one in failed):
        return f"NaN for a query that may attend to no key, {case}"
    right = {one.job.length for one in tried if one.ok and one.job.group == "lengths"}
    wrong = {one.job.length for one in failed if one.job.group == "lengths"}
    for block in BLOCKS:
        multiples = {length for length in right | wrong if length % block == 0}
        if wrong and multiples and not multiples & wrong:
            return f"wrong at lengths that are not a multiple of {block}, {case}"
    groups = ", ".join(dict.fromkeys(one.job.group for one in failed))
    return f"error {first.error:.1e}, tolerance {first.tolerance:.0e} ({groups}), {case}"


def support_matrix(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return one row per device, backend and dtype, as plain data.

    `errors` has the largest error of every group of jobs: None if all were declined, "not finite"
    for infinity. `failed` names the groups with a failure, and `declined` is the reason of a
    backend that declined everything.
    """
    groups: dict[tuple[str, str, torch.dtype], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.backend, one.device, one.dtype), []).append(one)
    columns = list(dict.fromkeys(job.group for job in jobs()))
    rows = []
    for backend, device, dtype in sorted(groups, key=lambda key: list(BACKENDS).index(key[0])):
        tried = groups[backend, device, dtype]
        done = [one for one in tried if not one.declined]
        errors: dict[str, float | str | None] = {}
        for group in columns:
            largest = max((one.error for one in done if one.job.group == group), default=None)
            errors[group] = "not finite" if largest == math.inf else largest
        row = {"device": device, "backend": backend, "dtype": dtype_name(dtype), "errors": errors}
        row["failed"] = list(dict.fromkeys(one.job.group for one in done if not one.ok))
        rows.append({**row, "declined": "" if done else tried[0].declined})
    return rows


# -- this machine


@dataclass(frozen=True)
class MachineReport:
    """The result of `verify_machine`.

    Attributes:
        rows: The support matrix.
        failed: The diagnosis of every backend that failed, by name.
        comparisons: How many jobs the backends were asked to do, declined ones included.
        refused: Whether the backends that failed are refused from now on.
    """

    rows: list[dict[str, Any]]
    failed: dict[str, str]
    comparisons: int
    refused: bool


def verify_machine(device: str | None = None) -> MachineReport:
    """Compare all backends on all devices, and refuse the backends that fail.

    The refusal holds for this machine until a later call finds the backend correct.

    Args:
        device: Compare on this device only, and refuse no backend.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if device is not None:
        devices = [pick_device(device).type]
    with one_thread():
        outcomes = list(compare_backends(devices))
    failed, refused = failures(outcomes), False
    if device is not None:
        notice(f"--device {device}: no backend is refused for one device alone")
    else:
        try:
            refuse(failed)
            refused = True
        except OSError as error:  # the comparisons took minutes, so they are reported all the same
            notice(f"{refused_file()}: cannot be written ({error.strerror}); no backend is refused")
    return MachineReport(support_matrix(outcomes), failed, len(outcomes), refused)

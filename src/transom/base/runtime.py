"""Device, dtype, random seeds, memory and clocks of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from transom.base.errors import RequestError, expect, notice
from transom.base.processes import local_rank, local_world_size, world_size

# The names that torch gives to instructions that multiply bfloat16: x86 (two), Arm.
BFLOAT16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
M_MMAP_THRESHOLD = -3  # malloc.h of glibc
KEPT_KERNELS = 64  # in the cache of oneDNN: more than a step of one shape needs
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_LARGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # bytes; of <sys/mman.h>


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in configs, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a block with `model` in evaluation mode: without dropout, jitter and capacity of experts.

    Afterwards every module is in the mode that it was in before.
    """
    if not model.training:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; `auto` is cuda, or else mps, or else cpu.

    Of several ranks, each has a GPU of its own, and `auto` without a GPU is cpu.

    Raises:
        RequestError: The name is unknown, or this machine has no such device.
    """
    if world_size() > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        count, ranks = torch.cuda.device_count(), local_world_size()
        expected = f"cpu, or at most {count} ranks on this machine, one for each GPU"
        expect(local_rank() < count, "device", f"{name} for {ranks} ranks", expected)
        return torch.device("cuda", local_rank())
    if world_size() > 1:
        alone = name not in ("auto", "cpu")
        expect(not alone, "device", name, "auto, cuda or cpu with several ranks")
        return torch.device("cpu")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(
            f"device: got {name!r}; expected auto, cpu, cuda, cuda:N or mps"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RequestError(f"device: got {name!r}; expected one of {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError("device: got 'mps'; expected another one, since mps is not available")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; `auto` is bfloat16 where it is fast, else float32.

    Raises:
        RequestError: The name is unknown.
    """
    if name == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device.type) else torch.float32
    expect(name in DTYPES, "dtype", name, f"auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def bound_kernel_caches() -> None:
    """Limit the kernels that oneDNN keeps, unless the environment sets other limits.

    oneDNN keeps a kernel for every shape of a product, together with the weights in its own layout.
    Packed rows of ever new lengths would take tens of megabytes more with every step. oneDNN reads
    the limits at the first product of a process, so a later call has no effect.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))


@contextlib.contextmanager
def one_thread(alone: bool = True) -> Iterator[None]:
    """Run a block with one thread: little work gains nothing from a second one.

    It also waits for no other thread while another process uses the cores. With `alone=False` the
    number of threads stays.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if alone else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks of modules at the end of a block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value inside a block."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)  # the attribute of the class is visible again


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast.

    It does nothing for devices that do not have it (meta), and in exported programs.
    """
    available = torch.amp.is_autocast_available(device_type) and not torch.compiler.is_exporting()
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


@functools.cache
def bfloat16_is_fast(device_type: str) -> bool:
    """Return whether bfloat16 products are faster than float32 ones on this kind of device.

    The instructions of the CPU and torch's kernels decide, so that a machine has one answer.
    Products are timed only where the instructions are unknown.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = _cpu_multiplies_bfloat16() if device_type == "cpu" else None
    return _bfloat16_wins_clearly(device_type) if known is None else known


def warn_if_bfloat16_is_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Print a notice if a dtype is bfloat16 on a device where float32 is faster."""
    if dtype == torch.bfloat16 and not bfloat16_is_fast(device.type):
        notice(
            "bfloat16 is slow on this device; --dtype float32 is faster and takes twice the memory"
        )


def _cpu_multiplies_bfloat16() -> bool | None:
    """Return whether the CPU can multiply bfloat16 and torch has kernels for it; None is
    unknown.
    """
    instructions = _cpu_instructions()
    if instructions is None:
        return None
    # oneDNN converts to float32 on processors that lack these instructions. Without oneDNN the
    # product is a plain loop.
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    kernels = torch.backends.mkldnn.is_available() and (probe is None or bool(probe()))
    return kernels and not instructions.isdisjoint(BFLOAT16_INSTRUCTIONS)


def _cpu_instructions() -> frozenset[str] | None:
    """Return the names of the CPU's instruction sets; None if this torch does not list them."""
    listed = getattr(torch.cpu, "get_capabilities", None)
    return listed and frozenset(name for name, value in listed().items() if value is True)


def _bfloat16_wins_clearly(device_type: str) -> bool:
    """Return whether a timed bfloat16 product takes at most 3/4 of the time of a float32 one.

    The two take turns, and the fastest of ten counts, so that other work does not decide.
    """
    wide = torch.ones(512, 512, device=device_type)
    narrow = wide.bfloat16()

    def seconds(matrix: torch.Tensor) -> float:
        return _fastest(lambda: matrix @ matrix, matrix.device, 1)

    pairs = [(seconds(narrow), seconds(wide)) for _ in range(10)]
    return min(one for one, _ in pairs) <= 0.75 * min(other for _, other in pairs)


@functools.cache
def matmul_peak(device_type: str, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large square product on this device, as the reference of MFU.

    The product takes well under a second.
    """
    size, repeats = (1536, 3) if device_type == "cpu" else (8192, 10)
    private = torch.Generator().manual_seed(
        0
    )  # ones would let the processor clock higher than real data does
    a = torch.randn(size, size, generator=private).to(device_type, dtype)
    # The second matrix is transposed, as in a projection: for float16 on a CPU, torch has a kernel
    # for this layout alone.
    return 2.0 * size**3 / _fastest(lambda: a @ a.T, a.device, repeats)


@functools.cache
def read_bandwidth(device_type: str) -> float:
    """Measure how many bytes per second this device reads from its memory, with all threads.

    It sums a tensor that is far larger than the caches. This takes well under a second.
    """
    size = 1 << (29 if device_type == "cpu" else 31)  # bytes
    x = torch.ones(size // 4, device=device_type)
    return size / _fastest(x.sum, x.device, repeats=10)


def _fastest(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the queued work of a device, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_bytes(device: torch.device) -> int:
    """Return the peak of memory in bytes.

    On a GPU it is the allocated memory since `reset_peak_memory`, on a CPU the resident memory of
    the process. MPS records no peak. There it is the most that this function has read since
    `reset_peak_memory`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        _seen_on_mps[:] = [max([*_seen_on_mps, torch.mps.driver_allocated_memory()])]
        return _seen_on_mps[0]
    # On Linux this is at least the peak of the process that started this one, and is never reset.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return _stated_bytes(b"VmHWM") or (peak if sys.platform == "darwin" else 1024 * peak)


def _stated_bytes(field: bytes) -> int | None:
    """Return a size that Linux states of this process; None where it states none."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_bytes().splitlines()
        return next(1024 * int(one.split()[1]) for one in lines if one.startswith(field))
    return None


def large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask for large pages for the memory of a new tensor, and return it.

    Memory in pages of 2 MB is read faster, by a tenth where all of it is read in turn. This has to
    come before the first number is written. It does nothing on other devices than the CPU, and on
    systems other than Linux.
    """
    if tensor.device.type == "cpu" and sys.platform == "linux":
        first = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        size = (tensor.data_ptr() + tensor.nbytes) // _LARGE_PAGE * _LARGE_PAGE - first
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor


def release_memory() -> None:
    """Give memory that was freed on the CPU back to the system, where the C library is glibc's."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_freed_memory() -> None:
    """Let the C library of Linux give freed weights back to the system from now on.

    It would keep freed pieces of up to 32 MiB otherwise, between which gathered weights leave gaps:
    the resident memory of a rank would be almost that of one process.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def resident_bytes() -> int:
    """Return the resident memory of this process now, or its peak where only that is known."""
    return _stated_bytes(b"VmRSS") or memory_bytes(torch.device("cpu"))


_seen_on_mps: list[int] = []


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of memory. That of a CPU process can be reset on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):  # no such file, or a sandbox that doesn't permit it
            Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    _seen_on_mps.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device or the host had no memory left.

    Hosts that overcommit memory kill the process instead.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    allocators = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in allocators)


def seed_everything(seed: int) -> None:
    """Seed the default generators of Python and torch, for code of users; ours are explicit."""
    random.seed(seed)
    torch.manual_seed(seed)


def mixed_seed(seed: int, *place: int) -> int:
    """Return the seed of one of many streams of random numbers that belong to `seed`.

    `place` names the stream, such as a row of a batch or a turn of a chat. Any two (seed, place)
    have independent streams, while `seed + place` would give seed 1 the streams of seed 0.
    """
    mixed = np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0]
    return int(mixed) & 0x7FFF_FFFF_FFFF_FFFF  # what a generator of torch accepts


def machine() -> dict[str, object]:
    """Return what a result depends on: versions, processor, GPU and threads."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "processor": processor_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """Return the marketing name of the processor, or its architecture."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

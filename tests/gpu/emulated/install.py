"""A CUDA device for a torch that has none, so that the code for GPUs runs where no GPU is.

Its memory is the host's and its kernels are those of the CPU, so numbers are right and speed means
nothing. What shows is what Python code does: tensors on two devices, places where the host waits,
copies of pinned memory, CUDA graphs whose inputs do not stay in their place. What does not show is
anything of CUDA's own kernels and compilers, and races between streams: `torch.compile` runs its
graphs eagerly, and flash attention is a loop. Call `install` before torch looks for a GPU. It
changes the process for good.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
import torch._inductor  # both look for CUDA while they are imported
from torch import Tensor

COUNT = 8  # devices, as in device.h
MEMORY = 16 << 30  # bytes that a device states to have
HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent
kernels: Any = torch.ops.emulated_gpu


def why_not() -> str | None:
    """Return why there can be no emulated device here, in words; None if there can be one."""
    if torch.backends.cuda.is_built():
        return "needs a torch without CUDA, whose kernels would be used"
    return None if shutil.which("g++") else "needs g++"


def install() -> None:
    """Compile the device, and put it behind the names of `torch.cuda`."""
    torch.ops.load_library(str(compiled()))
    torch.cuda._initialized = True  # type: ignore[attr-defined]
    for name, value in cuda().items():
        setattr(torch.cuda, name, value)
    eager, resize = torch.compile, torch.UntypedStorage.resize_

    def compile_eager(model: Any = None, *, backend: Any = None, options: Any = None, **more: Any):
        return eager(model, backend="eager", **more)

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        with torch.no_grad():
            holder = torch.empty(0, dtype=torch.uint8, device=storage.device)
            kernels.resize_storage(holder.set_(storage), size)
        return storage

    torch.compile, torch.UntypedStorage.resize_ = compile_eager, resize_  # type: ignore
    for name, function in (("forward", flash_forward), ("backward", flash_backward)):
        LIBRARY.impl(f"_flash_attention_{name}", function)


LIBRARY = torch.library.Library("aten", "IMPL", "CUDA")


def compiled() -> Path:
    """Return the library of the device, which is compiled once per checkout and release of torch.

    It does not lie in a folder that other users may write to, since it is loaded.
    """
    sources = [HERE / "device.h", HERE / "kernels.cpp"]
    text = b"".join(one.read_bytes() for one in sources) + torch.__version__.encode()
    path = HERE / "__pycache__" / f"gpu-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        include = [TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include"]
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            words = [
                "g++",
                "-std=c++20",
                "-O1",
                "-w",
                "-fPIC",
                "-shared",
                str(HERE / "kernels.cpp"),
            ]
            words += [*(f"-I{one}" for one in include), f"-L{TORCH / 'lib'}"]
            words += ["-ltorch", "-ltorch_cpu", "-lc10", "-o", str(made)]
            subprocess.run(words, check=True)
            made.rename(path)
    return path


def index(device: Any = None) -> int:
    """Return the number of a device that is given in any form; None is the current one."""
    number = device if isinstance(device, int) else device and torch.device(device).index
    return kernels.current_device() if number is None else number


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0) -> Stream:
        return super().__new__(cls, device=torch.device("cuda", index(device)))


class Event(torch.Event):
    def __new__(cls, enable_timing: bool = False, **more: Any) -> Event:
        return super().__new__(cls, device="cuda", enable_timing=enable_timing)


class Device:
    """The context manager `torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.index = index(device)

    def __enter__(self) -> None:
        self.before = kernels.current_device()
        kernels.set_device(self.index)

    def __exit__(self, *_: object) -> None:
        kernels.set_device(self.before)


class Graph:
    """A CUDA graph: the operations of a recording, which computes nothing by itself."""

    def replay(self) -> None:
        kernels.replay(self.number)


@contextlib.contextmanager
def graph(graph: Graph, **more: Any) -> Iterator[None]:
    """Record a graph."""
    graph.number = kernels.begin_graph()
    try:
        yield
    finally:
        kernels.end_graph()


def cuda() -> dict[str, Any]:
    """Return what the names of `torch.cuda` are."""
    name = "emulated GPU"
    properties = SimpleNamespace(name=name, total_memory=MEMORY, major=9, minor=0)
    properties.multi_processor_count, properties.warp_size = 8, 32
    modes = {"default": 0, "warn": 1, "error": 2}

    def seed_all(seed: int) -> None:
        for number in range(COUNT):
            kernels.seed(number, seed)

    return {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "_DeviceGuard": Device,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: kernels.current_device(),
        "current_stream": Stream,
        "default_stream": Stream,
        "device": Device,
        "device_count": lambda: COUNT,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: name,
        "get_device_properties": lambda device=None: properties,
        "get_rng_state": lambda device=None: kernels.get_rng_state(index(device)),
        "graph": graph,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: kernels.seed(kernels.current_device(), seed),
        "manual_seed_all": seed_all,
        "max_memory_allocated": lambda device=None: kernels.memory()[1],
        "mem_get_info": lambda device=None: (MEMORY - kernels.memory()[0], MEMORY),
        "memory_allocated": lambda device=None: kernels.memory()[0],
        "memory_reserved": lambda device=None: kernels.memory()[0],
        "reset_peak_memory_stats": lambda device=None: kernels.reset_peak(),
        "set_device": lambda device: kernels.set_device(index(device)),
        "set_rng_state": lambda state, device=None: kernels.set_rng_state(state, index(device)),
        "set_stream": lambda stream: None,
        "set_sync_debug_mode": lambda mode: kernels.sync_mode(modes.get(mode, mode)) and None,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: kernels.waits("torch.cuda.synchronize"),
    }


def scores(
    q: Tensor, k: Tensor, ends: tuple[Tensor, Tensor], causal: bool, scale: float, more: dict
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the tokens of each document as queries and keys, and the scores [N, q, k] of both."""
    for one in (q, k, *ends):
        assert one.is_cuda, "a kernel takes tensors of its device"
    assert q.dtype in (torch.float16, torch.bfloat16) and q.size(-1) % 8 == 0 and q.size(-1) <= 256
    q, k, (ends_q, ends_k) = q.cpu().float(), k.cpu().float(), (one.tolist() for one in ends)
    k = k.repeat_interleave(q.size(1) // k.size(1), 1)
    left, right = (more.get(f"window_size_{side}") for side in ("left", "right"))
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        behind = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        hidden = torch.zeros_like(behind, dtype=torch.bool)
        hidden |= (behind < 0) if causal else hidden
        hidden |= (behind > left) if left is not None and left >= 0 else hidden
        hidden |= (behind < -right) if right is not None and right >= 0 else hidden
        found = torch.einsum("qnh,knh->nqk", q[a:b], k[c:d]) * scale
        yield slice(a, b), slice(c, d), found.masked_fill(hidden, float("-inf"))


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """The body is a kernel: nobody waits in it."""
    before = kernels.sync_mode(0)
    yield
    kernels.sync_mode(before)


def flash_forward(q, k, v, ends_q, ends_k, max_q, max_k, dropout, causal, debug, **more):
    """`aten::_flash_attention_forward` of packed documents."""
    scale = more.get("scale") or q.size(-1) ** -0.5
    with unobserved():
        out, lse = torch.zeros(*q.shape[:2], v.size(-1)), torch.zeros(q.size(1), q.size(0))
        values = v.cpu().float().repeat_interleave(q.size(1) // v.size(1), 1)
        for a, c, found in scores(q, k, (ends_q, ends_k), causal, scale, more):
            assert a.stop - a.start <= max_q and c.stop - c.start <= max_k
            lse[:, a] = found.logsumexp(-1)
            out[a] = torch.einsum("nqk,knh->qnh", found.softmax(-1).nan_to_num(), values[c])
        none = torch.empty(0, device=q.device)
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        return out.to(q), lse.to(q.device), state, none, none


def flash_backward(grad, q, k, v, out, lse, ends_q, ends_k, *rest, **more):
    """`aten::_flash_attention_backward` of packed documents."""
    scale, causal = more.get("scale") or q.size(-1) ** -0.5, rest[3]
    with unobserved():
        group = q.size(1) // k.size(1)
        grad, out, queries, lse = (one.cpu().float() for one in (grad, out, q, lse))
        keys, values = (one.cpu().float().repeat_interleave(group, 1) for one in (k, v))
        dq, dk, dv = (torch.zeros_like(one) for one in (queries, keys, values))
        for a, c, found in scores(q, k, (ends_q, ends_k), causal, scale, more):
            p = (found - lse[:, a, None]).exp().nan_to_num()
            dp = torch.einsum("qnh,knh->nqk", grad[a], values[c])
            ds = p * (dp - (grad[a] * out[a]).sum(-1).T[..., None]) * scale
            dv[c] += torch.einsum("nqk,qnh->knh", p, grad[a])
            dq[a] += torch.einsum("nqk,knh->qnh", ds, keys[c])
            dk[c] += torch.einsum("nqk,qnh->knh", ds, queries[a])
        dk, dv = (one.unflatten(1, (-1, group)).sum(2) for one in (dk, dv))
        return tuple(one.to(q) for one in (dq, dk, dv))

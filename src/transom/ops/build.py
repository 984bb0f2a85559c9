"""Compile the C++ files of this folder into the cache folder, and load the library. No torch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transom.base.errors import WorkError, expect, notice
from transom.base.files import cache_dir, writing
from transom.base.locks import FolderLock

UNITS = ("block.cpp", "products.cpp")  # every file that is compiled on its own
HEADERS = tuple(sorted(path.name for path in Path(__file__).parent.glob("*.h")))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
SWITCH = "TRANSOM_OPS"  # an environment variable; 0 turns the ops off
_SECONDS = 300  # for one run of the compiler
_PLAIN = "few rows take the slower path of PyTorch"


def library() -> ctypes.CDLL | None:
    """Return the library, compiled at the first call on a machine; None if there is none.

    A notice says why there is none, and where a new library is.

    Raises:
        RequestError: The environment variable TRANSOM_OPS is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    expect(switch in ("0", "1"), SWITCH, switch, "0 or 1")
    return loaded() if switch == "1" else None


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """Return the library whatever the switch says, or print why there is none. It tries once."""
    try:
        return ctypes.CDLL(str(built()))
    except (WorkError, OSError) as error:
        notice(f"ops: {' '.join(str(error).split())[:300]}; {_PLAIN}")
        return None


def built() -> Path:
    """Return the library in the cache folder, which is compiled if it isn't there.

    Its name depends on the C++ files, the compiler and its flags, and the instructions of this
    processor. Other processes that need it wait meanwhile.

    Raises:
        WorkError: There is no compiler, or it fails, or the cache folder can't be written.
    """
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise WorkError(f"found no C++ compiler on PATH ({', '.join(COMPILERS)})")
    here = Path(__file__).parent
    # The predefined macros name the version of the compiler and all instructions it may use.
    macros = _run(found, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    files = ((here / name).read_bytes() for name in UNITS + HEADERS)
    parts = [" ".join((found, *FLAGS)).encode(), macros, *files]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    path = cache_dir() / "ops" / f"{key}.so"
    if path.exists():
        return path
    start = time.perf_counter()
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=path.parent)
    with scratch as folder, FolderLock(path, wait=True):
        if path.exists():  # another process has compiled it
            return path
        made, *objects = [f"{folder}/{name}.o" for name in ("all", *UNITS)]

        def compiled(name: str, unit: str) -> None:
            _run(found, *FLAGS, "-c", str(here / unit), "-o", name)

        with ThreadPoolExecutor() as pool:
            list(pool.map(compiled, objects, UNITS))
        _run(found, *FLAGS, *objects, "-o", made)
        Path(made).replace(path)
    seconds = time.perf_counter() - start
    notice(f"ops: compiled C++ for decoding in {seconds:.0f} s: {path}")
    return path


def _run(compiler: str, *words: str) -> bytes:
    """Run the compiler and return its output; raise `WorkError` with its first line of errors."""
    try:
        done = subprocess.run([compiler, *words], capture_output=True, timeout=_SECONDS, check=True)
    except subprocess.CalledProcessError as failed:
        lines = failed.stderr.decode(errors="replace").splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise WorkError(f"{compiler} failed with exit code {failed.returncode}: {first}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkError(f"{compiler} could not run: {error}") from None
    return done.stdout

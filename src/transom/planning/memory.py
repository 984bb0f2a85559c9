"""The memory that this machine has left. No torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path


def host_bytes_left() -> int | None:
    """Return how many bytes can still be allocated on the host; None if that is unknown.

    It is what Linux reports as available, or what the limits of the control groups of the process
    leave, if that is less.
    """
    known: list[int] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        known += left_in_groups(Path("/sys/fs/cgroup"), groups)
    return min(known, default=None)


def left_in_groups(root: Path, groups: Sequence[str]) -> list[int]:
    """Return the bytes that the limits of control groups leave.

    Pages of files are counted as free, since Linux drops them first.

    Args:
        root: The folder of all groups. In a container it is that of the container.
        groups: The lines of /proc/self/cgroup: a number, controllers and a path. Version 2 has no
            controllers, version 1 has `memory` and a folder of that name.
    """
    left: list[int] = []
    paths = {
        one.rpartition(":")[2].strip("/") for one in groups if ":memory:" in one or "::" in one
    }
    for folder in {base / path for base in (root, root / "memory") for path in ("", *paths)}:
        for names in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                stat = (folder / "memory.stat").read_text(encoding="ascii")
                files = re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
                left.append(limit - used + max(map(int, files), default=0))
    return left

"""How ranks agree on what ended a run, so that one of them prints it once.

The ranks communicate through the store of the rendezvous, since a failed rank leaves the others in
the middle of a call. Every wait is bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from transom.base.errors import RequestError, WorkError
from transom.base.interrupts import STOPS, exit_code, handling
from transom.base.processes import RESTARTS, choose_to_print
from transom.base.runtime import is_out_of_memory

TIMEOUT = "TRANSOM_DIST_TIMEOUT"  # seconds of one call that waits for the other ranks
WAIT = 5.0  # seconds that the first failed rank waits for what the others report


@dataclass(frozen=True)
class End:
    """How one rank ended.

    Attributes:
        kind: `done`, `error`, `stop` by a signal, or `closed` or `timeout` of a call that waits for
            other ranks.
        message: What it would print alone.
        code: Exit code.
        seconds: When, on its clock.
        printed: Whether it has printed the message.
    """

    kind: str
    message: str = ""
    code: int = 0
    seconds: float = 0.0
    printed: bool = False

    @classmethod
    def of(cls, error: BaseException) -> End:
        """Return the end of a rank by an exception."""
        now = time.time()
        if isinstance(error, STOPS):
            return cls("stop", str(error), exit_code(error), now)
        if isinstance(error, SystemExit):
            return cls("stop", "", int(error.code or 0), now)
        if is_lost(error):
            text = str(error).lower()
            return cls(
                "timeout" if "timed out" in text or "timeout" in text else "closed", "", 1, now
            )
        known = isinstance(error, (RequestError, WorkError))
        message = str(error) if known else f"{type(error).__name__}: {error}"
        return cls("error", message, 2 if isinstance(error, RequestError) else 1, now)


@dataclass(frozen=True)
class Verdict:
    """What the ranks agree on.

    Attributes:
        rank: The rank that prints, or None if none does.
        code: Exit code of all ranks.
        alike: Whether all ranks have failed alike.
        missing: Ranks that did not report, if nothing else explains the end.
    """

    rank: int | None
    code: int
    alike: bool = False
    missing: tuple[int, ...] = ()


def limit() -> float:
    """Return the seconds that a call waits for other ranks.

    Raises:
        RequestError: If `TRANSOM_DIST_TIMEOUT` is not a positive number.
    """
    text = os.environ.get(TIMEOUT, "600")
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise RequestError(f"{TIMEOUT}: got {text!r}; expected a number of seconds")


def is_lost(error: BaseException) -> bool:
    """Return whether a call failed because another rank has ended or does not answer."""
    if isinstance(error, (RequestError, WorkError)):
        return False
    of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return of_gloo or isinstance(error, dist.DistError)


@contextlib.contextmanager
def shared_failures(store: dist.Store, rank: int, size: int) -> Iterator[None]:
    """Let one rank raise the exception that explains why a run ended, and all ranks end.

    Args:
        store: A store that all ranks have.
        rank: This rank.
        size: Number of ranks.

    Raises:
        RequestError, WorkError or another exception: On the rank that prints it. It names the rank,
            unless all ranks failed alike.
        SystemExit: On the other ranks, with the same exit code.
    """
    try:
        yield
    except BaseException as error:
        with handling(lambda *_: None):  # a launcher stops the other ranks of one that has ended
            end = End.of(error)
            _leave()
            record(end)
            verdict = _verdict(store, rank, size, end)
        _raise(verdict, rank, error)
    else:
        with contextlib.suppress(RuntimeError):  # the store has ended with rank 0
            store.set(f"end/{rank}", json.dumps(asdict(End("done"))))


def _leave() -> None:
    """Close the connections to other ranks, so that they need not wait for this one.

    Groups of NCCL could wait for unfinished calls; the end of the process closes them.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def record(end: End) -> None:
    """Write how this rank ended into the file that torchrun reads if its exit code is not 0."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        facts = {"message": end.message, "timestamp": int(end.seconds)}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({**facts, **asdict(end)}), encoding="utf-8")


def recorded_ends(folder: Path) -> list[End]:
    """Return how ranks have ended, except those that lost another rank."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("error.json")]
    ends = [End(**{field.name: one[field.name] for field in fields(End)}) for one in files]
    return [end for end in ends if end.kind != "closed"]


def _verdict(store: dist.Store, rank: int, size: int, end: End) -> Verdict:
    """Report how this rank ended, and return what the first failed rank concludes."""
    try:
        store.set(f"end/{rank}", json.dumps(asdict(end)))
        if store.add("failures", 1) > 1:
            _wait(store, ["verdict"], 2 * WAIT)
            if not store.check(["verdict"]):
                return Verdict(rank if end.kind == "error" else None, end.code)
            found = json.loads(store.get("verdict"))
            verdict = Verdict(**{**found, "missing": tuple(found["missing"])})
            _keep_store(store, rank)
            return verdict
        _wait(store, [f"end/{other}" for other in range(size)], WAIT)
        ends = {
            other: End(**json.loads(store.get(f"end/{other}")))
            for other in range(size)
            if store.check([f"end/{other}"])
        }
        verdict = conclude(ends, size)
        store.set("verdict", json.dumps(asdict(verdict)))
        _keep_store(store, rank)
    except (RuntimeError, OSError):  # the store has ended with the process that has it
        return Verdict(rank, end.code)
    return verdict


def conclude(ends: dict[int, End], size: int) -> Verdict:
    """Return what the ends of some ranks say about the end of a run of `size` ranks."""
    missing = tuple(rank for rank in range(size) if rank not in ends)
    launched = RESTARTS in os.environ and missing  # `launch` sees how those ended
    for kind in ("error", "stop"):
        found = {rank: end for rank, end in ends.items() if end.kind == kind}
        if found and not (kind == "stop" and launched):  # it may have stopped the others
            copies = {rank for rank, end in found.items() if end.message.startswith("rank 0: ")}
            own = set(found) - copies or copies  # `Ranks.on_first` repeats the error of rank 0
            first = min(own, key=lambda rank: (found[rank].seconds, rank))
            alike = len(found) == size and len({found[rank].message for rank in own}) == 1
            return Verdict(min(own) if alike else first, found[first].code, alike)
    hangs = [rank for rank, end in ends.items() if end.kind == "timeout"]
    return Verdict(None if launched and not hangs else min(hangs or ends), 1, missing=missing)


def _wait(store: dist.Store, keys: list[str], seconds: float) -> None:
    """Wait until the store has all keys, or the time is over."""
    end = time.monotonic() + seconds
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.05)


def _keep_store(store: dist.Store, rank: int) -> None:
    """Let rank 0, with which the store may end, wait until the others have read the verdict."""
    store.add("read", 1)
    end = time.monotonic() + WAIT
    while rank == 0 and store.add("read", 0) < store.add("failures", 0) and time.monotonic() < end:
        time.sleep(0.05)


def _raise(verdict: Verdict, rank: int, error: BaseException) -> NoReturn:
    """Raise what this rank ends with."""
    late = verdict.rank is None and rank in verdict.missing and End.of(error).kind == "error"
    if rank != verdict.rank and not late:
        raise SystemExit(verdict.code) from None
    choose_to_print()
    record(replace(End.of(error), printed=True))
    if is_lost(error):
        numbers = ", ".join(map(str, verdict.missing))
        many = len(verdict.missing) > 1
        who = f"rank{'s' * many} {numbers}" if numbers else "another rank"
        hangs = f"not answered for {limit():g} seconds ({TIMEOUT})"
        how = hangs if End.of(error).kind == "timeout" else "ended without a message"
        raise WorkError(f"{who} {'have' if many else 'has'} {how}") from None
    if verdict.alike or isinstance(error, STOPS):
        raise error
    if isinstance(error, (RequestError, WorkError)):  # of this rank alone
        raise type(error)(f"rank {rank}: {error}") from None
    if is_out_of_memory(error):
        details = " ".join(str(error).split())[:160]
        raise WorkError(f"rank {rank}: out of memory: {details}".rstrip(": ")) from None
    error.add_note(f"rank {rank}")
    raise error

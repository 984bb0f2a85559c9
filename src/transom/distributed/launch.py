"""How processes become the ranks of one run: started here, or by torchrun."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from transom.base.errors import RequestError, WorkError, expect, notice
from transom.base.interrupts import STOP_SIGNALS, Background, handling, raise_stop
from transom.base.processes import RESTARTS, local_world_size, restarts, world_size
from transom.base.runtime import pick_device
from transom.config.parallel_args import ParallelArgs
from transom.distributed.failures import TIMEOUT, End, limit, recorded_ends, shared_failures
from transom.distributed.mesh import Meshes

JOINING = 50.0  # seconds that a rank waits for the rendezvous, without TRANSOM_DIST_TIMEOUT
SAVING = "600"  # seconds that ranks have for their checkpoint after a signal


@contextlib.contextmanager
def joined(args: ParallelArgs, device: str = "auto") -> Iterator[Meshes | None]:
    """Join the process group that the environment of torchrun describes.

    Whatever ends the block on some ranks ends it on all of them, see `shared_failures`.

    Args:
        args: How the ranks share the model.
        device: Device of all ranks, `auto`, `cuda` or `cpu`; each has a GPU of its own.

    Yields:
        The ranks, or None if this process was started alone.

    Raises:
        RequestError: If the degrees do not multiply out to the number of ranks.
        WorkError: If the rendezvous does not answer, or another rank ends or hangs.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name)
        expect(not text or text.isdecimal(), name, text, "a number, as torchrun sets")
    if world_size() == 1:
        args.resolved(1)
        yield None
        return
    seconds = limit()
    _end_with_agent()
    store, rank = _rendezvous(args, seconds if TIMEOUT in os.environ else JOINING)
    with shared_failures(store, rank, world_size()):
        _check_degrees(store)
        place = pick_device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // local_world_size()))
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=rank,
            world_size=world_size(),
            timeout=timedelta(seconds=seconds),
        )
        meshes = Meshes.make(args, place.type)
        meshes.set_timeout(timedelta(seconds=seconds))
        yield meshes
        dist.destroy_process_group()


def _rendezvous(args: ParallelArgs, seconds: float) -> tuple[dist.Store, int]:
    """Return a store that all ranks have, and the number of this one."""
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    expect(not missing, ", ".join(missing), None, "a value beside WORLD_SIZE, as torchrun sets")
    rank, host, port = (os.environ[name] for name in names)
    expect(int(rank) < world_size(), "RANK", int(rank), f"less than WORLD_SIZE = {world_size()}")
    expect(int(port) < 1 << 16, "MASTER_PORT", int(port), "less than 65536")
    if host in ("localhost", "127.0.0.1"):  # else gloo looks up the name of the machine
        loopback = "lo" if sys.platform == "linux" else "lo0"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    join = dist.rendezvous("env://", timeout=timedelta(seconds=seconds))
    try:  # torch waits without a limit for a program that accepts the connection and is no store
        store, number, size = Background(lambda: next(join)).result(seconds + 2)
        seconds = limit()
        store.set_timeout(timedelta(seconds=seconds))
        return Background(lambda: _attempt_store(store, number, size, args)).result(), number
    except WorkError:
        raise
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        who = f"{host}:{port}" if int(rank) else f"the other ranks at {host}:{port}"
        what = f"got no answer from {who} within {seconds:g} seconds ({TIMEOUT})"
        expected = f"the store of {world_size()} ranks at MASTER_ADDR:MASTER_PORT"
        if "EADDRINUSE" in str(error):
            what, expected = f"got port {port}, which another program uses", "a free MASTER_PORT"
        raise WorkError(f"rank {rank}: rendezvous: {what}; expected {expected}") from None


def _attempt_store(store: dist.Store, rank: int, size: int, args: ParallelArgs) -> dist.Store:
    """Return a store for the ranks of one attempt, which were started together.

    The agents of torchrun keep their store when they start all ranks again, and each agent counts
    its own restarts. Therefore rank 0 numbers the attempts. Its answer to a name that a rank has
    just chosen is not from an earlier attempt. `restarts` returns the same on all ranks afterwards.
    """
    if rank:
        greeting = uuid.uuid4().hex
        store.set(f"greeting/{rank}", greeting)
        attempt = int(store.get(f"answer/{greeting}"))
    else:
        attempt = store.add("attempts", 1)
    part = dist.PrefixStore(f"attempt {attempt}", store)
    part.add("restarts", restarts())
    mine, end = vars(args), time.monotonic() + limit()
    part.set(f"joined/{rank}", json.dumps(mine))
    different = (0, mine)
    for other in range(1, 1 if rank else size):
        while not part.check([f"joined/{other}"]):
            if store.check([f"greeting/{other}"]):
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", str(attempt))
            if time.monotonic() > end:
                what = f"rank {other} has not joined within {limit():g} seconds ({TIMEOUT})"
                raise WorkError(f"rendezvous: {what}")
            time.sleep(0.005)
        degrees = json.loads(part.get(f"joined/{other}"))
        different = different if degrees == mine else (other, degrees)
    if rank == 0:
        part.set("degrees", json.dumps([mine, *different]))
    part.wait(["degrees"])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt - 1 + part.add("restarts", 0))
    return part


def _check_degrees(store: dist.Store) -> None:
    """Refuse, on every rank, ranks that would arrange themselves differently."""
    first, rank, other = json.loads(store.get("degrees"))
    for name in first:
        found = f"{first[name]} on rank 0 and {other[name]} on rank {rank}"
        if first[name] != other[name]:
            raise RequestError(f"parallel.{name}: got {found}; expected the same on all ranks")


def _end_with_agent() -> None:
    """Stop this rank by SIGTERM when the process that has started it is killed."""
    agent = os.getppid()

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    if "TORCHELASTIC_RUN_ID" in os.environ:  # the shell of ranks started by hand may end
        threading.Thread(target=watch, daemon=True).start()


def launch(words: Sequence[str], ranks: int, *, max_restarts: int = 0) -> int:
    """Run `transom WORDS` in several processes of this machine, which are the ranks of one run.

    The agent of torchrun starts them, and ends all of them when one ends with an error. SIGINT,
    SIGTERM and SIGHUP reach every rank, which then has TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds
    (default: `SAVING`; with torch 2.11 always 30) before it is killed.

    Args:
        words: A verb that trains, and its arguments.
        ranks: Number of processes.
        max_restarts: How often all ranks start again after one has ended with an error. They
            continue from the latest checkpoint.

    Returns:
        The exit code of the command.

    Raises:
        WorkError: If a rank has ended without a message, with the number of the rank and how.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING)
    name = uuid.uuid4().hex
    for attempt in range(max_restarts + 1):
        code, reason = _attempt(words, ranks, attempt, name)
        if code > 128 and reason is not None:
            notice(reason)
        if code == 0 or code == 2 or code > 128:
            return code
        if attempt < max_restarts:
            notice(f"{reason or 'a rank failed'}; restart {attempt + 1} of {max_restarts}")
    if reason is None:
        return code
    raise WorkError(reason)


def _attempt(words: Sequence[str], ranks: int, attempt: int, name: str) -> tuple[int, str | None]:
    """Return the exit code of all ranks, and how one of them ended, if it did so silently."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    heard = [one for one in STOP_SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    quiet = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as folder, handling(raise_stop):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(signal.Signals(one).name for one in heard),
        )
        os.environ[RESTARTS] = str(attempt)
        logging.disable(logging.CRITICAL)  # the agent logs every step of it as a warning
        try:
            elastic_launch(config, sys.executable)("-m", "transom", *words)
        except ChildFailedError as error:
            silent = {
                rank: one.exitcode
                for rank, one in error.failures.items()
                if not Path(one.error_file).exists()
            }
            return _outcome(recorded_ends(Path(folder)), silent, min(error.failures))
        except SignalException as stop:
            codes = [end.code for end in recorded_ends(Path(folder))]
            return max(codes, default=128 + stop.sigval), None
        finally:
            logging.disable(quiet)
            os.environ.pop(RESTARTS)
    return 0, None


def _outcome(
    recorded: Sequence[End], silent: Mapping[int, int], first: int
) -> tuple[int, str | None]:
    """Return what `_attempt` returns.

    Args:
        recorded: The ends of ranks that did not lose another one. One rank prints an error.
        silent: Exit codes of ranks that recorded nothing, the first one first; -N for signal N.
        first: A rank that ended before the agent ended the others.
    """
    failed, stops = (
        [end.code for end in recorded if (end.kind == "stop") == is_stop]
        for is_stop in (False, True)
    )
    if failed:
        return max(failed), None
    # The agent ends the other ranks with SIGTERM.
    stopped = (-signal.SIGTERM, 128 + signal.SIGTERM)
    found = next((rank for rank, code in silent.items() if code not in stopped), None)
    if found is None:
        code = max(stops, default=128 + signal.SIGTERM if silent else 1)
        # Rank 0 prints why it ended before it joined the others.
        told = any(end.printed for end in recorded) or silent.get(0, 0) > 0
        if told or code - 128 not in STOP_SIGNALS:
            return code, None
        return code, f"rank {first} was ended by {signal.Signals(code - 128).name}"
    code = silent[found]
    if code in (1, 2):  # before the ranks joined; Python or the command has printed why
        return code, None
    how = (
        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )
    return 1, f"rank {found} {how}"

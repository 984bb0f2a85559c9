"""Checkpoints of a divided model: every rank writes its part while training goes on.

DCP (`torch.distributed.checkpoint`) decides which rank writes what, and reads what was saved in one
layout into any other. Its own format has a pickle, so files are safetensors with the offsets of
each part in the header, as its `HuggingFaceStorageReader` reads them. The weights are then joined
into the files of an ordinary model folder. All ranks must see the same folders.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.futures import Future

from transom.base.errors import RequestError, WorkError, explained
from transom.base.files import sync, write_text
from transom.checkpoints.files.checksums import (
    TRAINER_PARTS,
    TRAINER_STATE,
    TRAINER_TENSORS,
    sums_of,
    write_checksums,
)
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.safetensors_files import open_safetensors, write_tensors
from transom.distributed.failures import is_lost, limit
from transom.distributed.parts import copy_full
from transom.distributed.ranks import Ranks

T = TypeVar("T")
WEIGHT_PARTS = "weights"  # folder of the parts of the weights, until they are joined
ENDING = 30.0  # seconds that a run which has failed waits for its last checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """What is written at one step of a divided run.

    Attributes:
        new_step: Yields the folder to write to, or None if only pointers change. Rank 0 enters it,
            and leaves it when all ranks have written.
        write_model: Writes the files of the model into a folder, given its weights.
        weights: The weights that it writes, or this rank's parts of them.
        tensors: What else a resumed run needs.
        state: The same, as JSON.
    """

    new_step: AbstractContextManager[Path | None]
    write_model: Callable[[Path, LazyTensors], None]
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    state: str


class Saver:
    """Writes the checkpoints of a divided run in a thread, one at a time.

    All ranks must call each method in the same order.

    Args:
        ranks: The ranks. They get a process group for the thread.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit()))
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(self, checkpoint: Checkpoint) -> None:
        """Copy this rank's part of a checkpoint to host memory, and begin to write it.

        Raises:
            Exception: See `wait`.
        """
        self.wait()
        weights, tensors = (
            {name: one.detach().to("cpu", copy=True) for name, one in part.items()}
            for part in (checkpoint.weights, checkpoint.tensors)
        )
        copied = replace(checkpoint, weights=weights, tensors=tensors)
        self._thread = threading.Thread(target=self._run, args=(copied,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            WorkError: If it could not be written, on every rank.
            RuntimeError: If another rank was lost meanwhile, see `failures.is_lost`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def end(self) -> None:
        """Wait for a while until the last checkpoint is written; a lost rank may prevent it."""
        if self._thread is not None:
            self._thread.join(ENDING)

    def _run(self, checkpoint: Checkpoint) -> None:
        try:
            self._write(checkpoint)
        except Exception as error:
            self._failure = error
            if not isinstance(error, (WorkError, RequestError)) and not is_lost(error):
                kind = type(error).__name__
                self._failure = WorkError(f"checkpoint: could not be written ({kind}: {error})")

    def _write(self, checkpoint: Checkpoint) -> None:
        with contextlib.ExitStack() as stack:

            def finish() -> None:
                if folder is not None:
                    write_checksums(folder, sums)
                stack.close()

            folder = self.ranks.on_first(
                lambda: stack.enter_context(checkpoint.new_step), self._group
            )
            if folder is not None:
                self._save(folder / TRAINER_PARTS, checkpoint.tensors)
                self._save(folder / WEIGHT_PARTS, checkpoint.weights)
                made = self._together(lambda: self._complete(checkpoint, folder))
                sums = {name: one for part in made for name, one in part.items()}
            self.ranks.on_first(finish, self._group)

    def _complete(self, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
        """Let rank 0 write the files of the model; return hashes of the files of this rank."""
        parts = folder / TRAINER_PARTS
        own = parts / _file_of(self.ranks.rank)
        sync(own)
        if self.ranks.rank:
            return sums_of(folder, [own])
        weights = folder / WEIGHT_PARTS
        checkpoint.write_model(folder, _Reader(weights).lazy())
        shutil.rmtree(weights)
        write_text(folder / TRAINER_STATE, checkpoint.state)
        others = {*parts.iterdir()} - {own}
        return sums_of(folder, {path for path in folder.rglob("*") if path.is_file()} - others)

    def _save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the parts of all ranks."""
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        writer = _Writer(folder, self.ranks.rank)
        try:
            dcp.save(
                dict(tensors), storage_writer=writer, planner=planner, process_group=self._group
            )
        except CheckpointException as error:  # of all ranks, on every rank
            rank, (failure, _) = next(iter(error.failures.items()))
            raise WorkError(f"rank {rank}: {failure}") from None

    def _together(self, call: Callable[[], T]) -> list[T]:
        return self.ranks.together(call, self._group)


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writes the part of this rank to one file, straight from where it is in memory."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._file = folder / _file_of(rank)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the file, and return no results, since headers say what is where."""
        tensors, offsets = {}, {}
        for item in plan.items:
            name, tensor = item.index.fqn, planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None
            tensors[name] = tensor
            offsets[name] = {"saved_offsets": [*item.tensor_data.chunk.offsets]}
        write_tensors(self._file, tensors, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the files of a folder, and their headers once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        broken = SafetensorError, LookupError, ValueError
        with explained(f"{folder}: not complete files of DCP", *broken):
            self._metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        """Return what is in the folder."""
        return self._metadata

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors by their names, and DTensors with this rank's part."""
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        with warnings.catch_warnings(action="ignore"):  # that ranks do not communicate
            dcp.load(dict(tensors), storage_reader=self, planner=planner, no_dist=True)

    def lazy(self) -> dict[str, LazyTensor]:
        """Return all tensors of the folder, not read yet."""
        found = self._metadata.state_dict_metadata.items()
        return {
            name: LazyTensor(
                tuple(one.size), one.properties.dtype, functools.partial(self._full, name, one)
            )
            for name, one in found
            if isinstance(one, TensorStorageMetadata)
        }

    def _full(self, name: str, one: TensorStorageMetadata) -> Tensor:
        full = torch.empty(one.size, dtype=one.properties.dtype)
        self.read_into({name: full})
        return full


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def read_state(step: Path, like: Mapping[str, Tensor], known: Set[str]) -> dict[str, Tensor]:
    """Return the tensors that a resumed run needs beside the model, saved in any layout.

    Args:
        step: A step folder.
        like: The present tensors. What is returned is on the CPU, with this rank's part of each
            DTensor. A tensor of another shape or dtype is returned on the meta device, and one of
            another name complete.
        known: The names of such tensors on all ranks. Those of other stages of a pipeline are left
            out.

    Raises:
        RequestError: If a file is missing or damaged.
    """
    parts = step / TRAINER_PARTS
    reader = _Reader(parts) if parts.is_dir() else None
    lazy = reader.lazy() if reader else open_safetensors(step, [TRAINER_TENSORS])
    tensors: dict[str, Tensor] = {}
    for name, one in lazy.items():
        if name in known and name not in like:
            continue
        own = like.get(name, one.meta)
        if (own.shape, own.dtype) != (one.shape, one.dtype):
            tensors[name] = one.meta
        elif reader or isinstance(own, DTensor):
            tensors[name] = torch.empty_like(own, device="cpu")
            if reader is None:
                copy_full(tensors[name], one.read())
        else:
            tensors[name] = one.read()
    if reader:
        reader.read_into({name: one for name, one in tensors.items() if not one.is_meta})
    return tensors


def between_steps(model: nn.Module) -> nn.Module:
    """Return a model, whose ranks have nothing but their parts of its parameters.

    FSDP2 leaves those of the last modules complete after a forward pass without a backward pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model

"""Offloading: models larger than memory, whose blocks are read again in every forward call.

A thread reads the next block into a buffer of two blocks while one computes. Hooks of the blocks
do the rest, so every call of the model works, and no other code knows of it. Between the calls,
streamed parameters are on the meta device: whatever reads them fails, where an old buffer would
give wrong numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, expect, notice
from transom.base.runtime import large_pages
from transom.checkpoints.files.file_pieces import PAGE, FilePiece
from transom.checkpoints.files.lazy_tensors import TensorGroup
from transom.checkpoints.files.safetensors_files import ALIGNMENT, alignment_of, parse_size
from transom.checkpoints.load import BeforeWeights, Blocks, LoadPlan
from transom.inference.room import bytes_left, least_of
from transom.layers.linear import GroupedLinear
from transom.models.llm import LLM
from transom.planning import placement
from transom.planning.memory import Workload, host_bytes_left, memory_plan
from transom.planning.placement import READ_AHEAD, BlockPlacement


class Offload:
    """Where blocks of a model are that do not fit into memory; see `open_model` and `load`.

    Args:
        source: `disk`, or `cpu` for a model on a GPU.
        max_memory: Memory of the device for weights, KV cache and computation, such as `6GiB` or a
            number of bytes. None takes what is left.
        tokens: Tokens of the largest call, if the caller of `load` does not say what it needs.

    Attributes:
        placement: Where the blocks are, after `place`.
    """

    placement: BlockPlacement

    def __init__(
        self, source: str, max_memory: str | int | None = None, *, tokens: int = 512
    ) -> None:
        expect(source in ("cpu", "disk"), "offload", source, "cpu or disk")
        if isinstance(max_memory, str):
            max_memory = parse_size(max_memory, "max_memory")
        self.max_memory: int | None = max_memory
        self.source, self.tokens = source, tokens

    def place(
        self, plan: LoadPlan, blocks: Blocks, before_weights: BeforeWeights | None
    ) -> tuple[int, ...]:
        """Return the blocks to stream, and say so in a notice; see `Offloader`.

        Raises:
            RequestError: The memory is too small for the smallest placement, or this kind of
                offloading is not for this device.
        """
        kind, room = plan.device.type, least_of(bytes_left(plan.device), self.max_memory)
        fits = kind == "cuda" or (kind == "cpu" and self.source == "disk")
        expect(fits, "offload", self.source, f"disk on the CPU or a GPU, not on {kind}")
        sizes = [sum(group.nbytes for group in blocks[index]) for index in sorted(blocks)]
        others = plan.weight_bytes - sum(sizes)
        # What is converted is in memory three times more at most, one tensor at a time.
        computed = [
            group.nbytes for block in blocks.values() for group in block if not group.pieces
        ]
        others += 3 * max(computed, default=0) if kind == "cpu" else 0
        fewest = placement.place(sizes, others, 0).memory_bytes
        needed = None
        if before_weights is not None:
            weights = {"weights that stay in memory": fewest}
            needed = before_weights(
                replace(plan, weights=weights, mapped_bytes=0, max_memory=self.max_memory)
            )
        if needed is None:
            work = Workload(1, self.tokens, plan.dtype.itemsize, step=self.tokens)
            needed = memory_plan(plan.args, work, {}).total
        self.placement = made = placement.place(sizes, others, room - needed)
        if made.memory_bytes + needed > room:
            raise RequestError(
                f"max_memory: got {_mb(room)}; expected {_mb(fewest)} for the weights that stay in "
                f"memory and a buffer of {READ_AHEAD} layers, and {_mb(needed)} to compute with"
            )
        host = sum(_pinned_bytes(blocks[index]) for index in made.streamed)
        spare = host_bytes_left()
        if self.source == "cpu" and spare is not None and host > spare:
            raise RequestError(
                f"offload: got 'cpu' for {_mb(host)} with {_mb(spare)} left; expected disk"
            )
        self._tell(made, blocks)
        return made.streamed

    def attach(self, model: LLM, blocks: Blocks) -> None:
        """Stream blocks whose weights were not read; see `Offloader`."""
        self.stream = WeightStream(model, blocks, self.source)

    def _tell(self, made: BlockPlacement, blocks: Blocks) -> None:
        count, layers = len(made.streamed), len(blocks)
        kept = f"{layers - count} of {layers} layers and all else, {_mb(made.resident_bytes)}"
        line = f"offload: {kept}, stay in memory"
        if count:
            line += f"; {_mb(made.streamed_bytes)} per call are streamed from {self.source} "
            line += f"through a buffer of {_mb(made.buffer_bytes)}"
        groups = [group for index in made.streamed for group in blocks[index]]
        converted = sum(group.nbytes for group in groups if not group.pieces)
        if converted and self.source == "disk":
            line += f"; {_mb(converted)} of them are converted each time, which weights in this "
            line += "dtype in safetensors files do not need"
        notice(line)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _pinned_bytes(groups: Sequence[TensorGroup]) -> int:
    """Return the bytes of a block in pinned memory, which torch rounds up to a power of two."""
    return 1 << (sum(group.nbytes for group in groups) - 1).bit_length()


class _Place(NamedTuple):
    """A streamed parameter and its place in the buffer of its block."""

    module: nn.Module
    name: str
    absent: nn.Parameter
    start: int

    def view(self, buffer: Tensor) -> Tensor:
        part = buffer[self.start : self.start + self.absent.nbytes]
        return part.view(self.absent.dtype).view(self.absent.shape)


class _Block:
    """The parameters of a streamed block, and where they come from.

    Args:
        model: The model.
        groups: The weights of the block.
        later: Whether experts are left out, of which those that are chosen are read.

    Attributes:
        nbytes: The bytes of its buffer.
        read_bytes: The bytes that `read_into` reads.
        experts: The matrices of experts that are left out.
        stored: All of it in the memory of the host, if it is there.
    """

    def __init__(self, model: LLM, groups: Sequence[TensorGroup], later: bool) -> None:
        self.nbytes, self.read_bytes = 0, 0
        self.experts: list[tuple[TensorGroup, _Place]] = []
        self.stored: Tensor | None = None
        self._pieces: list[tuple[FilePiece, int]] = []  # of files, with places in the buffer
        self._computed: list[tuple[TensorGroup, list[_Place]]] = []
        self._all, self._present = list[_Place](), list[_Place]()
        for group in sorted(groups, key=_place_in_file):
            places = [self._place(model, key, group.pieces) for key in group.keys]
            self._all += places
            if later and _is_experts(group, places):
                self.experts.append((group, places[0]))
                continue
            self.read_bytes += group.nbytes
            start = places[0].start
            for piece in group.pieces:
                self._add(piece, start)
                start += piece.nbytes
            if not group.pieces:
                self._computed.append((group, places))

    def _place(self, model: LLM, key: str, pieces: Sequence[FilePiece]) -> _Place:
        """Return the place of a parameter: in a page it begins where it does in its file."""
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        absent = module.get_parameter(name)
        absent.requires_grad_(False)
        alignment, start = alignment_of(absent.dtype), self.nbytes
        if pieces and pieces[0].offset % alignment == 0:
            start += (pieces[0].offset - start) % PAGE
        else:
            start += -start % ALIGNMENT
        self.nbytes = start + absent.nbytes
        return _Place(module, name, absent, start)

    def _add(self, piece: FilePiece, start: int) -> None:
        """Add a piece. Neighbours in a file that are neighbours in the buffer become one."""
        (file, offset, size), first = self._pieces[-1] if self._pieces else (piece, -1)
        if (file, offset + size, first + size) == (piece.file, piece.offset, start):
            piece, start = FilePiece(file, offset, size + piece.nbytes), first
            self._pieces.pop()
        self._pieces.append((piece, start))

    def read_into(self, buffer: Tensor) -> None:
        """Read the block from its files."""
        for (file, offset, size), start in self._pieces:
            file.read_into(buffer[start : start + size], offset)
        for group, places in self._computed:
            for place, tensor in zip(places, group.read(), strict=True):
                place.view(buffer).copy_(tensor)

    def put(self, buffer: Tensor) -> None:
        """Let the parameters be views of a buffer. One that an adapter replaces stays replaced."""
        for place in self._all:
            if place.module._parameters[place.name] is place.absent:
                made = nn.Parameter(place.view(buffer), requires_grad=False)
                place.module._parameters[place.name] = made
                self._present.append(place)

    def take(self) -> None:
        """Put the parameters on meta again."""
        for place in self._present:
            place.module._parameters[place.name] = place.absent
        self._present.clear()


def _place_in_file(group: TensorGroup) -> tuple[str, int]:
    return (str(group.pieces[0].file.path), group.pieces[0].offset) if group.pieces else ("", 0)


def _is_experts(group: TensorGroup, places: Sequence[_Place]) -> bool:
    shape = places[0].absent.shape
    grouped = isinstance(places[0].module, GroupedLinear) and len(shape) == 3
    return grouped and len(group.pieces) in (1, shape[0])


class _Buffer:
    """Memory for one block on a device."""

    def __init__(self, size: int, device: torch.device, staged: bool) -> None:
        made = large_pages(torch.empty(size + PAGE, dtype=torch.uint8, device=device))
        self.content = made[-made.data_ptr() % PAGE :]
        self.host, self.filled, self.used = self.content, None, None
        if device.type == "cuda":
            self.filled, self.used = torch.cuda.Event(), torch.cuda.Event()
            self.host = torch.empty(size if staged else 0, dtype=torch.uint8, pin_memory=True)


class WeightStream:
    """The streamed blocks of a model, whose hooks keep this object.

    Args:
        model: The model. The parameters of `blocks` are on meta.
        blocks: The weights of the blocks, three or more.
        source: `disk`, or `cpu` to read them into memory of the host now.

    Attributes:
        bytes_read: Bytes that calls have read so far.
    """

    def __init__(self, model: LLM, blocks: Blocks, source: str) -> None:
        self._device, self.bytes_read = model.device, 0
        self._order = sorted(blocks)
        cuda = self._device.type == "cuda"
        later = source == "disk" and not cuda
        self._blocks = {index: _Block(model, blocks[index], later) for index in self._order}
        if source == "cpu":
            for block in self._blocks.values():
                stored = torch.empty(block.nbytes, dtype=torch.uint8, pin_memory=cuda)
                block.read_into(stored)
                block.stored = stored
        size = max(block.nbytes for block in self._blocks.values())
        self._free = [_Buffer(size, self._device, source == "disk") for _ in range(READ_AHEAD)]
        self._copies = torch.cuda.Stream(self._device) if cuda else None
        self._pending: dict[int, tuple[Future[int], _Buffer]] = {}
        self._running: tuple[int, _Buffer] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        for index, block in self._blocks.items():
            model.layers[index].register_forward_pre_hook(partial(self._enter, index))
            model.layers[index].register_forward_hook(self._leave)
            for group, place in block.experts:
                place.module.register_forward_pre_hook(partial(self._read_chosen, group, place))

    def _enter(self, index: int, *_: Any) -> None:
        """Wait for the weights of a block, and give them to it."""
        if torch.is_grad_enabled():
            raise RequestError(
                "offload: got a call that records gradients; expected torch.no_grad() around it, "
                "since weights that are streamed cannot train"
            )
        self._leave()  # a call that was interrupted has not left its block
        if index not in self._pending:
            for future, buffer in self._pending.values():
                future.exception()  # waits
                self._free.append(buffer)
            self._pending.clear()
            self._start(index)
        future, buffer = self._pending[index]
        error = future.exception()
        del self._pending[index]
        if error is not None:
            self._free.append(buffer)
            raise error
        self.bytes_read += future.result()
        self._running = index, buffer
        if buffer.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(buffer.filled)
        self._blocks[index].put(buffer.content)
        self._read_ahead(index)

    def _leave(self, *_: Any) -> None:
        """Take the weights from the block that has run, and read the next one in their place."""
        if self._running is None:
            return
        index, buffer = self._running
        self._running = None
        self._blocks[index].take()
        if buffer.used is not None:
            buffer.used.record(torch.cuda.current_stream(self._device))
        self._free.append(buffer)
        self._read_ahead(index)

    def _read_ahead(self, index: int) -> None:
        """Read the blocks after this one, as far as there are buffers. The last one is followed by
        the first.
        """
        place = self._order.index(index)
        for following in (*self._order[place + 1 :], *self._order[:place]):
            if self._free and following not in self._pending:
                self._start(following)

    def _start(self, index: int) -> None:
        buffer = self._free.pop()
        self._pending[index] = self._reader.submit(self._fill, self._blocks[index], buffer), buffer

    def _fill(self, block: _Block, buffer: _Buffer) -> int:
        """Fill a buffer in the thread of the reader; return the bytes that were read."""
        host = block.stored
        if host is None:
            if buffer.filled is not None:
                buffer.filled.synchronize()  # the device has copied what was read before
            host = buffer.host
            block.read_into(host)
        if host is buffer.content:
            return block.read_bytes
        with torch.cuda.stream(self._copies):  # nothing without a GPU
            if self._copies is not None and buffer.used is not None:
                self._copies.wait_event(buffer.used)  # the block before has run
            buffer.content[: block.nbytes].copy_(host[: block.nbytes], non_blocking=True)
            if buffer.filled is not None:
                buffer.filled.record(self._copies)
        return block.read_bytes

    def _read_chosen(self, group: TensorGroup, place: _Place, leaf: nn.Module, inputs: Any) -> None:
        """Read the experts that have rows. The others keep the numbers of another block, which
        nothing multiplies.
        """
        experts = leaf._parameters[place.name]
        assert experts is not None, "its block has been entered"
        pieces, size = group.pieces, experts[0].nbytes
        if len(pieces) == 1:
            file, start, _ = pieces[0]
            pieces = tuple(FilePiece(file, start + e * size, size) for e in range(len(experts)))
        for e, (start, end) in enumerate(pairwise([0, *inputs[1].tolist()])):
            if end > start:
                file, start, _ = pieces[e]
                file.read_into(experts[e].reshape(-1).view(torch.uint8), start)
                self.bytes_read += size

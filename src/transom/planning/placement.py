"""Which blocks of a model stay in memory, and which are streamed into a buffer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

READ_AHEAD = 2  # blocks in the buffer: one computes while the next one is read


@dataclass(frozen=True)
class BlockPlacement:
    """Where the blocks of a model are.

    Attributes:
        streamed: The indices of the blocks that are read in every call, spread evenly, so that
            blocks are read while those between them compute.
        resident_bytes: Bytes of all weights that stay in memory.
        buffer_bytes: Bytes of the buffer of the streamed blocks.
        streamed_bytes: Bytes that are read in every call.
    """

    streamed: tuple[int, ...]
    resident_bytes: int
    buffer_bytes: int
    streamed_bytes: int

    @classmethod
    def of(cls, blocks: Sequence[int], others: int, count: int) -> BlockPlacement:
        """Return the placement with `count` streamed blocks; the sizes are those of `place`."""
        layers = len(blocks)
        streamed = tuple((2 * i + 1) * layers // (2 * count) for i in range(count))
        sizes = [blocks[index] for index in streamed]
        buffer = READ_AHEAD * max(sizes, default=0)
        return cls(streamed, others + sum(blocks) - sum(sizes), buffer, sum(sizes))

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights in memory."""
        return self.resident_bytes + self.buffer_bytes


def place(blocks: Sequence[int], others: int, room: int) -> BlockPlacement:
    """Return the placement with the fewest streamed blocks that fits, or the smallest one.

    Args:
        blocks: Bytes of the weights of each block.
        others: Bytes of all other weights, which are never streamed.
        room: Bytes for weights.
    """
    counts = (0, *range(READ_AHEAD + 1, len(blocks) + 1))
    every = [BlockPlacement.of(blocks, others, count) for count in counts]
    fitting = (one for one in every if one.memory_bytes <= room)
    return next(fitting, min(every, key=lambda one: one.memory_bytes))

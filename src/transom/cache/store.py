"""One layer's cached states.

Every slot stores its absolute position (-1 = empty), so windows, chunks, ring order, padding and
rollback are all one rule applied later by attention; softmax does not care about key order, and a
ring is never unrotated. One spare slot behind the last takes the writes of padding tokens; no view
shows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from transom.attention.view import CacheView
from transom.base.errors import RequestError

BUCKET = (
    256  # static views are cut to a multiple of this, so short contexts do not pay for long ones
)


class LayerCache(ABC):
    """Slots for `capacity` tokens per row; tensors are allocated at the first update, from its
    shapes.

    `span` is the window or chunk length of a rotating store, None for a static one. `bound` is a
    host-side upper bound of the tokens of any row, `peak` the highest it has been: they decide
    shapes and whether a ring has forgotten anything; the device tensors decide everything else.
    """

    def __init__(self, batch_size: int, capacity: int, span: int | None = None) -> None:
        self.batch_size, self.capacity, self.span = batch_size, capacity, span
        self.states: tuple[Tensor, ...] = ()
        self.positions_BS = torch.empty(0)
        self.bound = self.peak = 0
        self.context: CacheView | None = None  # keys and values of a context, made once per request

    def keep_context(self, states: tuple[Tensor, ...], positions_BS: Tensor) -> CacheView:
        """Hold what cross-attention reads, until `reset`."""
        # Copies: states made under inference mode could not be written or forked outside it.
        with torch.inference_mode(False):
            self.context = CacheView(
                tuple(x.detach().clone() for x in states), positions_BS.clone()
            )
        return self.context

    def update(self, states: tuple[Tensor, ...], positions_BT: Tensor) -> CacheView:
        """Store this call's states [B, T, ...] at their positions; returns all that its queries may
        see.

        Positions run on without gaps within a row, padding (-1) only behind the real tokens.
        """
        if not self.states:
            self._allocate(states, positions_BT)
        positions_BT = positions_BT.expand(self.batch_size, -1)
        fresh, self.bound = self.bound == 0, self.bound + positions_BT.size(1)
        self.peak = max(self.peak, self.bound)
        return self._update(states, positions_BT, fresh)

    @abstractmethod
    def _update(self, states: tuple[Tensor, ...], positions_BT: Tensor, fresh: bool) -> CacheView:
        """Store the states and show what their queries may see; `fresh` where nothing was there
        before.
        """

    @torch.inference_mode(
        False
    )  # tensors made under inference mode could not be written outside it
    def _allocate(self, states: tuple[Tensor, ...], positions_BT: Tensor) -> None:
        rows = states[0].size(0)
        if rows != self.batch_size:
            raise RequestError(
                f"tokens have {rows} rows: this cache was built for {self.batch_size}"
            )
        shape = (self.batch_size, self.capacity + 1)
        # zeros, not empty: a slot that is hidden by its position must not leak NaN through 0 * NaN.
        self.states = tuple(x.new_zeros(*shape, *x.shape[2:]) for x in states)
        self.positions_BS = torch.full(shape, -1, dtype=torch.int64, device=positions_BT.device)

    def _write(self, states: tuple[Tensor, ...], positions_BT: Tensor, keep_BT: Tensor) -> None:
        slots_BT = torch.where(keep_BT, positions_BT % self.capacity, self.capacity)
        rows_B1 = torch.arange(self.batch_size, device=slots_BT.device).unsqueeze(1)
        for stored, new in zip(self.states, states, strict=True):
            stored[rows_B1, slots_BT] = new.detach()
        self.positions_BS[rows_B1, slots_BT] = torch.where(keep_BT, positions_BT, -1)

    def can_rollback(self, depth: int) -> bool:
        """Whether a row may fall `depth` tokens below the longest it has been and still see all it
        needs.
        """
        if self.span is None or self.peak <= self.capacity:
            return True
        return depth <= self.capacity - self.span + 1

    def rollback(self, lengths_B: Tensor, bound: int) -> None:
        """Forget every token at or behind position `lengths_B` of its row."""
        self.bound = bound
        if self.states:
            gone = self.positions_BS >= lengths_B.unsqueeze(1)
            self.positions_BS.masked_fill_(gone, -1)

    def reset(self) -> None:
        """Forget everything and keep the memory."""
        self.bound = self.peak = 0
        self.context = None
        if self.states:
            self.positions_BS.fill_(-1)
            for x in self.states:  # what stood there may have been NaN
                x.zero_()

    @torch.inference_mode(False)
    def fork(self, rows: Tensor) -> LayerCache:
        """A copy whose row i is this cache's row `rows[i]`."""
        other = type(self)(rows.numel(), self.capacity, self.span)
        other.bound, other.peak = self.bound, self.peak
        other.states = tuple(x.index_select(0, rows) for x in self.states)
        other.positions_BS = (
            self.positions_BS.index_select(0, rows) if self.states else self.positions_BS
        )
        if self.context is not None:
            states = tuple(x.index_select(0, rows) for x in self.context.states)
            other.context = CacheView(states, self.context.positions_BS.index_select(0, rows))
        return other

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all tensors, to be given back to `restore`."""
        tensors = {f"state{i}": x.clone() for i, x in enumerate(self.states)}
        if self.states:
            tensors["positions"] = self.positions_BS.clone()
        if self.context is not None:
            tensors |= {f"context{i}": x.clone() for i, x in enumerate(self.context.states)}
            tensors["context_positions"] = self.context.positions_BS.clone()
        return tensors

    @torch.inference_mode(False)
    def restore(self, tensors: dict[str, Tensor], bound: int, peak: int) -> None:
        """Back to what `snapshot` saw."""
        if "positions" not in tensors:
            self.reset()
        else:
            self.bound, self.peak = bound, peak
            self.states = _numbered(tensors, "state")
            self.positions_BS = tensors["positions"].clone()
        if "context_positions" in tensors:
            self.context = CacheView(
                _numbered(tensors, "context"), tensors["context_positions"].clone()
            )
        else:
            self.context = None

    @property
    def bytes(self) -> int:
        """Memory held now."""
        context = () if self.context is None else (*self.context.states, self.context.positions_BS)
        return sum(
            x.numel() * x.element_size() for x in (*self.states, self.positions_BS, *context)
        )


def _numbered(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    count = sum(key.removeprefix(name).isdecimal() for key in tensors if key.startswith(name))
    return tuple(tensors[f"{name}{i}"].clone() for i in range(count))


class StaticCache(LayerCache):
    """Slot p holds position p; for layers that see everything before them."""

    def _update(self, states: tuple[Tensor, ...], positions_BT: Tensor, fresh: bool) -> CacheView:
        self._write(states, positions_BT, positions_BT >= 0)
        if (
            fresh
        ):  # nothing was there: the new tokens are all there is to see, and their layout is known
            return CacheView(states, positions_BT, new_at=0)
        shown = min(self.capacity, -(-self.bound // BUCKET) * BUCKET)
        return CacheView(tuple(x[:, :shown] for x in self.states), self.positions_BS[:, :shown])


class RotatingBufferCache(LayerCache):
    """A ring: position p lives in slot p % capacity; capacity = span + slack.

    A call of at most slack + 1 tokens overwrites nothing its own queries need, so it writes, then
    reads; a longer call reads ring and new tokens side by side, then writes the last `capacity`
    tokens of each row.
    """

    def _update(self, states: tuple[Tensor, ...], positions_BT: Tensor, fresh: bool) -> CacheView:
        assert self.span is not None, "a ring has a span"
        count, valid_BT = positions_BT.size(1), positions_BT >= 0
        if not fresh and count <= self.capacity - self.span + 1:
            self._write(states, positions_BT, valid_BT)
            return CacheView(tuple(x[:, :-1] for x in self.states), self.positions_BS[:, :-1])
        view = CacheView(states, positions_BT, new_at=0)
        if not fresh:
            both = tuple(
                torch.cat((x[:, :-1], new), 1) for x, new in zip(self.states, states, strict=True)
            )
            positions = torch.cat((self.positions_BS[:, :-1], positions_BT), 1)
            view = CacheView(both, positions, new_at=self.capacity)
        last_B1 = positions_BT.amax(1, keepdim=True)
        if (
            count > self.capacity
        ):  # no row keeps more: skip the rest on the host, at equal row lengths too
            keep_BT = valid_BT & (positions_BT > last_B1 - self.capacity)
            self._write(states, positions_BT, keep_BT)
        else:
            self._write(states, positions_BT, valid_BT)
        return view

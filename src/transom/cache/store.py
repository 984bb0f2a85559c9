"""Stores of cached attention states: a static one, and a ring for layers with a window or chunks.

A store records the absolute position of every slot, -1 where a slot is empty. All layers of the
same kind share one store, so positions are computed and written once per call. Windows, chunks, the
order of a ring, padding and rollback are then one mask rule, which attention applies later
(`attention.mask`). Softmax does not depend on the order of keys, so a ring never has to be
unrotated. One spare slot after the last one takes the states of padding tokens. No view shows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from transom.attention.view import CacheView
from transom.base.errors import expect
from transom.cache.codes import from_codes, to_codes

BUCKET = 256  # static views are cut to a multiple of this, so that short contexts stay cheap


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one call are written, and what their queries read.

    Attributes:
        rows_B1: int64 [B, 1], the row indices that go with `slots_BT`.
        slots_BT: int64 [B, T], the slot of each token. Padding and tokens that a ring does not keep
            have the spare slot.
        positions_BS: int64 [B, S], the positions of the slots that queries read.
        new_at: None where queries read the store after the write. Otherwise queries read the first
            `new_at` slots as they were before the write, followed by the states of the call itself.
    """

    rows_B1: Tensor
    slots_BT: Tensor
    positions_BS: Tensor
    new_at: int | None = None


class SlotStore(ABC):
    """The positions of `capacity` slots per row, shared by all layers that store the same tokens.

    Args:
        batch_size: Rows.
        capacity: Slots per row, in tokens.
        span: Window or chunk length of a ring in tokens; None for a static store.
        device: Device of the positions.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        span: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch_size, self.capacity, self.span = batch_size, capacity, span
        # A tensor that is made under inference mode could not be written outside it.
        with torch.inference_mode(False):
            self.positions_BS = torch.full((batch_size, capacity + 1), -1, device=device)
            self._rows_B1 = torch.arange(batch_size, device=device).unsqueeze(1)
        self.placement: Placement | None = None  # of the current call

    @abstractmethod
    def begin_call(self, positions_BT: Tensor, bound: int, *, first: bool) -> None:
        """Write the positions of a call and set `placement` for its layers.

        Args:
            positions_BT: int64 [B, T]. Positions continue each row without gaps; padding (-1) may
                only follow the real tokens.
            bound: Upper bound of the tokens of any row after this call.
            first: Whether the store was empty before.
        """

    def _write(self, positions_BT: Tensor, keep_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Write the positions of the tokens to keep; return (rows, slots) of all tokens."""
        slots_BT = torch.where(keep_BT, positions_BT % self.capacity, self.capacity)
        self.positions_BS[self._rows_B1, slots_BT] = torch.where(keep_BT, positions_BT, -1)
        return self._rows_B1, slots_BT

    def can_rollback(self, depth: int, peak: int) -> bool:
        """Return whether a row can fall `depth` tokens below the longest it has been without losing
        keys.

        `peak` is the largest number of tokens that any row has had.
        """
        if self.span is None or peak <= self.capacity:
            return True
        return depth <= self.capacity - self.span + 1

    def rollback(self, lengths_B: Tensor) -> None:
        """Empty every slot whose position is `lengths_B` or more in its row."""
        self.positions_BS.masked_fill_(self.positions_BS >= lengths_B.unsqueeze(1), -1)

    def slots(self, start: int, end: int) -> Tensor:
        """Return the slots [T] of the positions `start` to `end` - 1."""
        return torch.arange(start, end, device=self.positions_BS.device) % self.capacity

    def mark(self, row: int, start: int, end: int) -> None:
        """Write the positions `start` to `end` - 1 of an empty row; a ring keeps the last ones."""
        start = max(start, end - self.capacity)
        positions_T = torch.arange(start, end, device=self.positions_BS.device)
        self.positions_BS[row, self.slots(start, end)] = positions_T

    def fork(self, rows: Tensor) -> Self:
        """Return a copy whose row i is this store's row `rows[i]`."""
        other = type(self)(rows.numel(), self.capacity, self.span, rows.device)
        other.positions_BS.copy_(self.positions_BS.index_select(0, rows))
        return other


class StaticCache(SlotStore):
    """A store in which slot p has position p, for layers that attend to all earlier tokens."""

    def begin_call(self, positions_BT: Tensor, bound: int, *, first: bool) -> None:
        """Write the positions; queries read the store up to a multiple of `BUCKET` slots."""
        index = self._write(positions_BT, positions_BT >= 0)
        if first:  # queries read the new tokens alone, whose layout is known
            self.placement = Placement(*index, positions_BT, new_at=0)
            return
        shown = min(self.capacity, -(-bound // BUCKET) * BUCKET)
        self.placement = Placement(*index, self.positions_BS[:, :shown])


class RotatingBufferCache(SlotStore):
    """A ring: position p is in slot p % capacity, and capacity = span + slack.

    A call of at most slack + 1 tokens overwrites nothing that its own queries need, so queries read
    the ring after the write. In a longer call queries read the ring as it was, followed by the new
    tokens; then the last `capacity` tokens of each row are written.
    """

    def begin_call(self, positions_BT: Tensor, bound: int, *, first: bool) -> None:
        """Write the positions that the ring keeps, before or after queries read it."""
        assert self.span is not None, "a ring has a span"
        count, keep_BT = positions_BT.size(1), positions_BT >= 0
        if not first and count <= self.capacity - self.span + 1:
            index = self._write(positions_BT, keep_BT)
            self.placement = Placement(*index, self.positions_BS[:, :-1])
            return
        seen, new_at = positions_BT, 0
        if not first:
            seen, new_at = torch.cat((self.positions_BS[:, :-1], positions_BT), 1), self.capacity
        # Without a branch on the length, which an exported program may not have.
        keep_BT = keep_BT & (positions_BT > positions_BT.amax(1, keepdim=True) - self.capacity)
        self.placement = Placement(*self._write(positions_BT, keep_BT), seen, new_at)


class LayerCache:
    """The cached states of one layer, in the slots of a store that it may share with other layers.

    With `kv_bits` = 8, every query reads rounded states, also those of its own call: the result
    then does not depend on how the tokens were divided into calls.

    Attributes:
        store: The positions of the slots.
        kv_bits: 8 for states in 8-bit codes, 16 for the dtype of the call.
        states: Allocated at the first update, from its shapes: (keys, values) each [B, capacity +
            1, K, H], or one tensor of latents [B, capacity + 1, 1, R] for latent attention. int8
            with 8 bits.
        scales: With 8 bits, float32 [B, capacity + 1, K, 1] for each of the `states`.
        context: The keys and values of cross-attention, which are computed once per request and
            never rounded.
    """

    def __init__(self, store: SlotStore, kv_bits: int = 16) -> None:
        self.store, self.kv_bits = store, kv_bits
        self.states: tuple[Tensor, ...] = ()
        self.scales: tuple[Tensor, ...] = ()
        self.context: CacheView | None = None

    def update(self, states: tuple[Tensor, ...]) -> CacheView:
        """Store the states of the call that the store has begun.

        Args:
            states: Tensors [B, T, ...] of the new tokens.

        Returns:
            Everything that the queries of this call may attend to, the new tokens included, in the
            dtype of `states`.
        """
        call = self.store.placement
        assert call is not None, "the store begins a call before its layers update"
        parts, dtype = self._parts(states), states[0].dtype
        if not self.states:
            self._allocate(parts, states[0].size(0))
        stored = (*self.states, *self.scales)
        if call.new_at is None:
            self._write(parts, call)
            shown = call.positions_BS.size(1)
            view = self._dense(tuple(x[:, :shown] for x in stored), dtype)
            return CacheView(view, call.positions_BS)
        seen = parts
        if call.new_at:
            pairs = zip(stored, parts, strict=True)
            seen = tuple(torch.cat((old[:, : call.new_at], new), 1) for old, new in pairs)
        self._write(parts, call)
        return CacheView(self._dense(seen, dtype), call.positions_BS, new_at=call.new_at)

    def _parts(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what is stored of states: themselves, or their codes and then their scales."""
        if self.kv_bits == 16:
            return states
        codes, scales = zip(*map(to_codes, states), strict=True)
        return (*codes, *scales)

    def _dense(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the states of stored parts."""
        if self.kv_bits == 16:
            return parts
        count = len(self.states)
        pairs = zip(parts[:count], parts[count:], strict=True)
        return tuple(from_codes(codes, scales, dtype) for codes, scales in pairs)

    def _write(self, parts: tuple[Tensor, ...], call: Placement) -> None:
        for stored, new in zip((*self.states, *self.scales), parts, strict=True):
            stored[call.rows_B1, call.slots_BT] = new.detach()

    @torch.inference_mode(False)
    def _allocate(self, parts: tuple[Tensor, ...], rows: int) -> None:
        """Make room for what is stored of states, of which `parts` [..., K, H] are examples."""
        expected, device = self.store.batch_size, self.store.positions_BS.device
        expect(rows == expected, "tokens", f"{rows} rows", f"the cache's {expected} rows")
        # Zeros, since 0 * NaN is NaN: a hidden slot of `torch.empty` could leak into the output.
        shape = (rows, self.store.capacity + 1)
        made = tuple(x.new_zeros(*shape, *x.shape[-2:], device=device) for x in parts)
        count = len(made) // (2 if self.kv_bits == 8 else 1)
        self.states, self.scales = made[:count], made[count:]

    @torch.inference_mode(False)
    def keep_context(self, states: tuple[Tensor, ...], positions_BS: Tensor) -> CacheView:
        """Store the keys and values of cross-attention until `reset`, and return them as a view."""
        self.context = CacheView(tuple(x.detach().clone() for x in states), positions_BS.clone())
        return self.context

    def read(self, row: int, start: int, end: int) -> tuple[Tensor, ...]:
        """Return copies [T, K, H] of what is stored of the positions `start` to `end` - 1."""
        slots_T = self.store.slots(start, end)
        return tuple(x[row, slots_T] for x in (*self.states, *self.scales))

    def write(self, row: int, start: int, parts: Sequence[Tensor]) -> None:
        """Store what `read` returned, from the position `start` on."""
        if not self.states:
            self._allocate(tuple(parts), self.store.batch_size)
        slots_T = self.store.slots(start, start + parts[0].size(0))
        for stored, part in zip((*self.states, *self.scales), parts, strict=True):
            stored[row, slots_T] = part.to(stored.device)

    def reset(self) -> None:
        """Clear all states and keep their memory."""
        self.context = None
        for x in (*self.states, *self.scales):  # they may have been NaN
            x.zero_()

    @torch.inference_mode(False)
    def fork(self, rows: Tensor, store: SlotStore) -> LayerCache:
        """Return a copy whose row i is this cache's row `rows[i]`, in the slots of `store`."""
        other = LayerCache(store, self.kv_bits)
        other.states = tuple(x.index_select(0, rows) for x in self.states)
        other.scales = tuple(x.index_select(0, rows) for x in self.scales)
        if self.context is not None:
            states = tuple(x.index_select(0, rows) for x in self.context.states)
            other.context = CacheView(states, self.context.positions_BS.index_select(0, rows))
        return other

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of all tensors, for `restore`."""
        tensors = {f"state{i}": x.clone() for i, x in enumerate(self.states)}
        tensors |= {f"scale{i}": x.clone() for i, x in enumerate(self.scales)}
        if self.context is not None:
            tensors |= {f"context{i}": x.clone() for i, x in enumerate(self.context.states)}
            tensors["context_positions"] = self.context.positions_BS.clone()
        return tensors

    @torch.inference_mode(False)
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Replace all tensors by copies of those of a `snapshot`."""
        self.states, self.context = _numbered(tensors, "state"), None
        self.scales = _numbered(tensors, "scale")
        if "context_positions" in tensors:
            positions_BS = tensors["context_positions"].clone()
            self.context = CacheView(_numbered(tensors, "context"), positions_BS)

    @property
    def bytes(self) -> int:
        """Allocated memory of the states and the context, in bytes."""
        context = () if self.context is None else (*self.context.states, self.context.positions_BS)
        return sum(x.nbytes for x in (*self.states, *self.scales, *context))


def _numbered(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    count = sum(key.removeprefix(name).isdecimal() for key in tensors if key.startswith(name))
    return tuple(tensors[f"{name}{i}"].clone() for i in range(count))

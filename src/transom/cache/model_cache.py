"""The caches of all layers of a model, and the number of tokens in each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from transom.base.errors import RequestError, expect
from transom.cache.store import LayerCache, RotatingBufferCache, SlotStore, StaticCache
from transom.config.layer_args import RopeArgs
from transom.config.model_args import ModelArgs
from transom.planning.counts import ring_slots
from transom.planning.memory import SLACK

UNLIMITED = 1 << 62  # tokens


class ModelCache:
    """One `LayerCache` per layer. A call adds tokens to all rows, which may differ in length.

    Build one with `LLM.make_cache` or `ModelCache.build`.

    Attributes:
        layers: The cache of each layer. Layers of one kind share their `store`.
        capacity: Tokens per row that fit.
        bounded: Whether `capacity` is a limit: some layer keeps every token, or rotary frequencies
            were chosen from it. Without a limit, rings forget what is out of reach.
        slack: Slots of the smallest ring beyond its window or chunk; `SLACK` without rings.
        lengths_B: int64 [B] on the device, tokens of each row.
        bound: Upper bound of `lengths_B` on the host. It decides shapes and overflow without
            waiting for the device.
        peak: The largest `bound` so far; rings are full beyond their capacity.
        rolled_back: Tokens that were rolled back and not yet refilled, an upper bound over the
            rows. Rings have overwritten what lies further back.
        frequencies: Rotary frequencies, which depend on the capacity at most.
        deepest: Tokens that a row may fall below the longest it has been, a lower bound over the
            rows. A restored prefix lacks the states that a longer rollback would need.
        on_prefill: Called by `prefill` after every forward call with this cache and the number of
            prompt tokens that each row has run so far.
    """

    def __init__(
        self,
        layers: list[LayerCache],
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        bounded: bool | None = None,
    ) -> None:
        self.layers, self.capacity = layers, capacity
        self.stores = list(dict.fromkeys(layer.store for layer in layers))
        spans = [(store.capacity, store.span) for store in self.stores]
        self.slack = min((slots - span for slots, span in spans if span), default=SLACK)
        static = any(isinstance(store, StaticCache) for store in self.stores)
        self.bounded = static if bounded is None else bounded
        self.batch_size = self.stores[0].batch_size
        # A tensor that is made under inference mode could not be written outside it.
        with torch.inference_mode(False):
            self.lengths_B = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        self.bound = self.peak = self.rolled_back = 0
        self.deepest = UNLIMITED
        self.on_prefill: Callable[[ModelCache, list[int]], None] | None = None
        self.frequencies: dict[RopeArgs, Tensor] = {}
        self._first_call = True  # whether the call that was reserved last began with empty rows

    @classmethod
    def build(
        cls,
        args: ModelArgs,
        batch_size: int | None = None,
        capacity: int | None = None,
        *,
        slack: int = SLACK,
        kv_bits: int = 16,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Return an empty cache for a model of these arguments.

        Args:
            args: Arguments of the model.
            batch_size: Rows; `args.max_batch_size` by default.
            capacity: Tokens per row; `args.max_seq_len` by default.
            slack: Slots of a ring beyond its window or chunk. Up to `slack` + 1 tokens can be
                rolled back.
            kv_bits: 8 stores keys and values as 8-bit codes with a scale per token and head. 16
                stores them in the dtype of the model.
            device: Device of the cache.

        Raises:
            RequestError: A number is too small, or a layer attends to later tokens and can't be
                cached.
        """
        rows = args.max_batch_size if batch_size is None else batch_size
        tokens = args.max_seq_len if capacity is None else capacity
        expect(rows >= 1, "batch_size", rows, "an integer of 1 or more")
        expect(tokens >= 1, "capacity", tokens, "an integer of 1 or more")
        expect(slack >= 0, "slack", slack, "an integer of 0 or more")
        expect(kv_bits in (8, 16), "kv_bits", kv_bits, "8, or 16 for the model's dtype")
        scalings = [layer.rope.scaling for layer in args.layers if layer.rope is not None]
        by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
        stores: dict[int | None, SlotStore] = {}  # by span
        layers: list[LayerCache] = []
        for layer in args.layers:
            if layer.rule.kind == "full":
                raise RequestError(
                    f"layer {layer.index}: got pattern B, which attends to later tokens; "
                    "expected a causal layer"
                )
            ring = ring_slots(layer.rule, tokens, slack)
            span = None if ring is None else layer.rule.size
            if span not in stores and ring is None:
                stores[span] = StaticCache(rows, tokens, device=device)
            elif span not in stores and ring is not None:
                stores[span] = RotatingBufferCache(rows, ring, span, device)
            layers.append(LayerCache(stores[span], kv_bits))
        return cls(layers, tokens, device, bounded=True if by_length else None)

    @property
    def kv_bits(self) -> int:
        """8 for keys and values in 8-bit codes, 16 for the dtype of the model."""
        return self.layers[0].kv_bits

    @property
    def has_context(self) -> bool:
        """Whether the keys and values of cross-attention are stored."""
        return self.layers[0].context is not None

    def reserve(self, count: int, lengths_B: Tensor | None = None) -> bool:
        """Make room for a call of `count` tokens per row.

        Args:
            count: Tokens per row, padding included.
            lengths_B: [B] real tokens of each row, where rows are padded.

        Returns:
            Whether the rows were empty before.

        Raises:
            RequestError: The tokens do not fit.
        """
        needed = self.bound + count
        if self.bounded and needed > self.capacity:
            # rollbacks and padding leave the bound loose; only now it is worth the wait
            self.sync_length()
            needed = self.bound + count
            if lengths_B is not None:  # the row that gets the most tokens may not be the longest
                needed = int((self.lengths_B + lengths_B.to(self.lengths_B.device)).max())
            if needed > self.capacity:
                raise RequestError(
                    f"cache: got {self.bound} + {count} tokens; expected at most its capacity "
                    f"of {self.capacity}"
                )
        self._first_call = self.bound == 0
        self.bound = needed
        return self._first_call

    def begin_after(self, counts: Sequence[int], deepest: int) -> None:
        """Continue after `counts` tokens of each row, whose states were just written."""
        self.lengths_B.copy_(torch.tensor(counts))
        self.bound = self.peak = max(counts)
        self.deepest = deepest

    def sync_length(self) -> None:
        """Set `bound` to the length of the longest row. This waits for the device."""
        self.bound = int(self.lengths_B.max())

    def begin_call(self, positions_BT: Tensor) -> None:
        """Write the positions [B, T] of the call that was reserved last; -1 is padding after the
        real tokens.
        """
        self.peak = max(self.peak, self.bound)
        for store in self.stores:
            store.begin_call(positions_BT, self.bound, first=self._first_call)

    def end_call(self, positions_BT: Tensor, *, padded: bool) -> None:
        """Count the tokens of a call after all layers have stored them."""
        if not padded:  # every row has grown by all of them
            self.deepest += max(0, positions_BT.size(1) - self.rolled_back)
            self.rolled_back = max(0, self.rolled_back - positions_BT.size(1))
            self.lengths_B += positions_BT.size(1)
            return
        self.lengths_B.copy_(torch.maximum(self.lengths_B, positions_BT.amax(1) + 1))

    def rollback(self, count_B: Tensor | int, at_most: int) -> bool:
        """Remove the last tokens of each row.

        Args:
            count_B: Tokens to remove, one number for all rows or int64 [B].
            at_most: Upper bound of `count_B`, known on the host.

        Returns:
            False, and nothing has changed, if a ring has already overwritten keys that a row would
            need.

        Raises:
            RequestError: An integer `count_B` is not between 0 and `at_most`.
        """
        if isinstance(count_B, int):
            expect(0 <= count_B <= at_most, "rollback", count_B, f"0 to at_most = {at_most}")
        depth = self.rolled_back + at_most
        if depth > self.deepest or not all(
            store.can_rollback(depth, self.peak) for store in self.stores
        ):
            return False
        self.rolled_back = depth
        self.lengths_B.copy_((self.lengths_B - count_B).clamp(min=0))
        if isinstance(count_B, int):
            self.bound = max(0, self.bound - count_B)
        for store in self.stores:
            store.rollback(self.lengths_B)
        return True

    def fork(self, rows: Tensor | list[int]) -> ModelCache:
        """Return a copy whose row i continues this cache's row `rows[i]`."""
        index = torch.as_tensor(rows, device=self.lengths_B.device)
        copies = {store: store.fork(index) for store in self.stores}
        layers = [layer.fork(index, copies[layer.store]) for layer in self.layers]
        other = ModelCache(layers, self.capacity, index.device, bounded=self.bounded)
        other.lengths_B.copy_(self.lengths_B.index_select(0, index))
        other.bound, other.peak, other.rolled_back = self.bound, self.peak, self.rolled_back
        other.deepest = self.deepest
        return other

    def reset(self) -> None:
        """Remove all tokens of all rows and keep the memory."""
        self.bound = self.peak = self.rolled_back = 0
        self.deepest = UNLIMITED
        self.lengths_B.zero_()
        for store in self.stores:
            store.positions_BS.fill_(-1)
        for layer in self.layers:
            layer.reset()

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of all tensors and counts, for `restore`."""
        host = torch.tensor([self.bound, self.peak, self.rolled_back, self.deepest])
        out = {"lengths": self.lengths_B.clone(), "host": host}
        out |= {f"positions{i}": store.positions_BS.clone() for i, store in enumerate(self.stores)}
        for index, layer in enumerate(self.layers):
            out |= {f"{index}/{name}": tensor for name, tensor in layer.snapshot().items()}
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Return to the state of a `snapshot` of this cache, or of one that was built alike."""
        self.lengths_B.copy_(tensors["lengths"])
        self.bound, self.peak, self.rolled_back, self.deepest = tensors["host"].tolist()
        for index, store in enumerate(self.stores):
            store.positions_BS.copy_(tensors[f"positions{index}"])
        for index, layer in enumerate(self.layers):
            prefix = f"{index}/"
            layer.restore(
                {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
            )

    @property
    def bytes(self) -> int:
        """Allocated memory in bytes: states, positions and contexts."""
        return sum(part.bytes for part in self.layers) + sum(
            s.positions_BS.nbytes for s in self.stores
        )

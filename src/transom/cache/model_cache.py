"""The caches of all layers of a model, and how many tokens each row has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.base.errors import RequestError, require
from transom.cache.store import LayerCache, RotatingBufferCache, StaticCache
from transom.config.model_args import ModelArgs


class ModelCache:
    """One `LayerCache` per layer; rows advance together in calls but may differ in length.

    `lengths_B` lives on the device; `bound` is a host-side upper bound of it that decides shapes
    and overflow, `debt` an upper bound of how far any row stands below the longest it has been
    (rings have forgotten by then).
    """

    def __init__(
        self,
        layers: list[LayerCache],
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        bounded: bool | None = None,
    ) -> None:
        self.layers = layers
        self.capacity = capacity
        # Whether `capacity` is a limit: some layer keeps every token, or rotary frequencies were
        # chosen by it.
        static = any(isinstance(layer, StaticCache) for layer in layers)
        self.bounded = static if bounded is None else bounded
        self.batch_size = layers[0].batch_size
        with torch.inference_mode(False):  # or nothing outside inference mode could write it
            self.lengths_B = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        self.bound = self.debt = 0

    @classmethod
    def build(
        cls,
        args: ModelArgs,
        batch_size: int | None = None,
        capacity: int | None = None,
        *,
        slack: int = 32,
        device: torch.device | str = "cpu",
    ) -> ModelCache:
        """Static stores of `capacity` tokens, rings of window or chunk + `slack`; both default to
        `args`.
        """
        rows = args.max_batch_size if batch_size is None else batch_size
        tokens = args.max_seq_len if capacity is None else capacity
        if rows < 1 or tokens < 1:
            raise RequestError(
                f"cache of {rows} rows and {tokens} tokens: expected 1 or more of both"
            )
        require(slack >= 0, "slack", slack, "expected 0 or more")
        by_length = any(
            one.rope and one.rope.scaling and one.rope.scaling.by_length for one in args.layers
        )
        layers: list[LayerCache] = []
        for layer in args.layers:
            if layer.rule.kind == "full":
                raise RequestError(
                    f"layer {layer.index} sees later tokens (pattern B): it cannot be cached"
                )
            ring = layer.rule.size + slack
            if layer.rule.size and ring < tokens:
                layers.append(RotatingBufferCache(rows, ring, layer.rule.size))
            else:
                layers.append(StaticCache(rows, tokens))
        return cls(layers, tokens, device, bounded=True if by_length else None)

    @property
    def has_context(self) -> bool:
        """Whether cross-attention's keys and values have been stored."""
        return self.layers[0].context is not None

    def claim(self, count: int, lengths_B: Tensor | None = None) -> bool:
        """Make room for `count` more tokens per row, or refuse; returns whether the cache was
        empty.

        `lengths_B` are the real tokens among them, where rows are padded.
        """
        needed = self.bound + count
        if self.bounded and needed > self.capacity:
            # rollbacks leave the bound loose; only now is it worth asking the device
            self.tighten()
            needed = self.bound + count
            if lengths_B is not None:  # the row that gets most may not be the one that holds most
                needed = int((self.lengths_B + lengths_B.to(self.lengths_B.device)).max())
            if needed > self.capacity:
                raise RequestError(
                    f"{self.bound} + {count} tokens: this cache holds {self.capacity}; build it "
                    f"with more capacity"
                )
        fresh, self.bound = self.bound == 0, needed
        return fresh

    def tighten(self) -> None:
        """Set the host's bound to the longest row, at the price of one device synchronisation."""
        self.bound = int(self.lengths_B.max())
        for layer in self.layers:
            layer.bound = min(layer.bound, self.bound)

    def advance(self, positions_BT: Tensor, *, padded: bool) -> None:
        """Note the tokens a forward has stored."""
        if not padded:  # every row has grown by all of them
            self.debt = max(0, self.debt - positions_BT.size(1))
        self.lengths_B.copy_(torch.maximum(self.lengths_B, positions_BT.amax(1) + 1))

    def rollback(self, count_B: Tensor | int, at_most: int) -> bool:
        """Forget the last `count_B` tokens of each row; False, and nothing done, where a ring lost
        what is needed.

        `at_most` is the largest count, known on the host.
        """
        if isinstance(count_B, int):
            require(
                0 <= count_B <= at_most,
                "rollback",
                count_B,
                f"expected 0 to at_most = {at_most}",
            )
        if not all(layer.can_rollback(self.debt + at_most) for layer in self.layers):
            return False
        self.debt += at_most
        self.lengths_B.copy_((self.lengths_B - count_B).clamp(min=0))
        if isinstance(count_B, int):
            self.bound = max(0, self.bound - count_B)
        for layer in self.layers:
            layer.rollback(self.lengths_B, self.bound)
        return True

    def fork(self, rows: Tensor | list[int]) -> ModelCache:
        """A copy whose row i continues this cache's row `rows[i]`."""
        index = torch.as_tensor(rows, device=self.lengths_B.device)
        layers = [layer.fork(index) for layer in self.layers]
        other = ModelCache(layers, self.capacity, index.device, bounded=self.bounded)
        other.lengths_B.copy_(self.lengths_B.index_select(0, index))
        other.bound, other.debt = self.bound, self.debt
        return other

    def reset(self) -> None:
        """Forget all tokens of all rows and keep the memory."""
        self.bound = self.debt = 0
        self.lengths_B.zero_()
        for layer in self.layers:
            layer.reset()

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of everything, keyed `layer/tensor`; what `restore` takes."""
        host = torch.tensor([self.bound, self.debt, max(layer.peak for layer in self.layers)])
        out = {"lengths": self.lengths_B.clone(), "host": host}
        for index, layer in enumerate(self.layers):
            out |= {f"{index}/{name}": tensor for name, tensor in layer.snapshot().items()}
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Back to what `snapshot` saw."""
        self.lengths_B.copy_(tensors["lengths"])
        self.bound, self.debt, peak = tensors["host"].tolist()
        for index, layer in enumerate(self.layers):
            mine = {
                key.partition("/")[2]: x
                for key, x in tensors.items()
                if key.startswith(f"{index}/")
            }
            layer.restore(mine, self.bound, peak)

    @property
    def bytes(self) -> int:
        """Memory held now."""
        return sum(layer.bytes for layer in self.layers)

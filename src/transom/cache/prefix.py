"""States of the beginnings of prompts, which later prompts with the same beginning reuse.

The prefixes form a tree. A node has the tokens of one run and their states in every layer. A layer
that attends to all earlier tokens stores the states of all tokens of the run, so that nodes share
what is in front of them. A layer with a window or chunks stores its last tokens only, as a
snapshot: nothing after the node can reach further back. Nodes end where prefill calls end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice
from transom.cache.model_cache import UNLIMITED, ModelCache
from transom.config.model_args import ModelArgs
from transom.planning.memory import PREFIX_BYTES


@dataclass(eq=False)
class PrefixNode:
    """A run of tokens after those of its parent.

    Attributes:
        tokens: The ids of the run. The root has none.
        parent: The node in front of it; None for the root.
        parts: For each layer, its stored tensors [T, ...] of the last T positions of the run.
        end: Tokens from the beginning to the end of the run.
        children: The nodes that continue it.
    """

    tokens: tuple[int, ...] = ()
    parent: PrefixNode | None = None
    parts: tuple[tuple[Tensor, ...], ...] = ()
    end: int = 0
    children: list[PrefixNode] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Memory of the parts in bytes."""
        return sum(x.nbytes for layer in self.parts for x in layer)

    @property
    def path(self) -> list[PrefixNode]:
        """The nodes from this one up to the first one after the root."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes


class PrefixCache:
    """States of token prefixes under a byte limit; those that were used longest ago go first.

    It belongs to one model. After its weights have changed, `clear` it.

    Args:
        args: The arguments of the model.
        max_bytes: Limit of the stored states, in bytes.
        slack: Tokens that can be rolled back after a prefix was restored; at most that of the
            caches.

    Attributes:
        variant: What the states depend on beside the tokens, such as the adapters in use. States
            of one variant are never used under another.

    Raises:
        RequestError: The states of this model depend on more than its tokens.
    """

    def __init__(self, args: ModelArgs, *, max_bytes: int = PREFIX_BYTES, slack: int = 32) -> None:
        if args.context_dim is not None:
            raise RequestError("context: got a model that reads one; expected states of tokens")
        self.args, self.max_bytes, self.slack = args, max_bytes, slack
        self.variant: Hashable = None
        # Tokens of a run that each layer stores at most: the mask hides all before them.
        sizes = [layer.rule.size for layer in args.layers]
        self.kept = [size + slack if size else UNLIMITED for size in sizes]
        self.clear()

    def clear(self) -> None:
        """Remove everything."""
        self.roots: dict[Hashable, PrefixNode] = {}
        # Used longest ago first. A node is never older than its children, so the first is a leaf.
        self._order: OrderedDict[PrefixNode, None] = OrderedDict()
        self.bytes = 0

    def match(self, tokens: Sequence[int], cache: ModelCache) -> tuple[PrefixNode, int]:
        """Return the node where the longest usable prefix of `tokens` ends, and its length.

        A prefix may end inside a node if every layer has what the next token can reach.
        """
        wanted = tuple(tokens)
        root = self.roots.setdefault(self._key(cache), PrefixNode())
        best, waiting = (root, 0), [root]
        while waiting:
            node = waiting.pop()
            for child in node.children:
                same = _same(child.tokens, wanted[node.end : child.end])
                if same == len(child.tokens):
                    waiting.append(child)
                elif not self._complete(child) and same < len(child.tokens) - self.slack:
                    continue
                if node.end + same > best[1]:
                    best = child, node.end + same
        return best

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, cache: ModelCache, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Fill an empty cache with the longest usable prefix of each prompt, except its last token.

        The rest of the prompts is stored while `prefill` runs it; see `watch`.

        Returns:
            The number of tokens restored in each row.
        """
        assert cache.bound == 0, "the cache is empty"
        counts, slack = [], self.slack
        for row, prompt in enumerate(prompts):
            node, count = self.match(prompt[:-1], cache)
            self._touch(node)
            inside = 0 if self._complete(node) else node.end - count
            slack = min(slack, self.slack - inside)
            self._fill(cache, row, node, count, count + inside)
            counts.append(count)
        windowed = min(self.kept) < UNLIMITED
        cache.begin_after(counts, slack + 1 if windowed and any(counts) else UNLIMITED)
        self.watch(cache, prompts, counts)
        return counts

    def watch(
        self, cache: ModelCache, prompts: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> None:
        """Store the prompts while `prefill` runs what follows their first `counts` tokens."""

        def store(cache: ModelCache, ran: list[int]) -> None:
            done = [count + more for count, more in zip(counts, ran, strict=True)]
            for row, (prompt, end) in enumerate(zip(prompts, done, strict=True)):
                self.add(cache, row, prompt[:end])
            if done == [len(prompt) for prompt in prompts]:
                cache.on_prefill = None
                self.completed()

        cache.on_prefill = store

    def completed(self) -> None:
        """Do what follows after all prompts of a cache were stored: nothing here."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, cache: ModelCache, row: int, tokens: Sequence[int]) -> None:
        """Store the states of `tokens`, which are all the tokens of a row of the cache."""
        assert self.slack <= cache.slack, "the slack is of the cache"
        if cache.rolled_back and min(self.kept) < UNLIMITED:
            return  # the rings lack the oldest tokens of a snapshot
        node, count = self.match(tokens, cache)
        if count < len(tokens):
            parent = node if count == node.end or node.parent is None else node.parent
            node = self._read(cache, row, tokens, parent)
            self.insert(node)
        self._touch(node)
        while self.bytes > self.max_bytes:
            leaf, _ = self._order.popitem(last=False)
            assert leaf.parent is not None, "the root is not in the order"
            if leaf is node:
                notice(f"states beyond {self.max_bytes:,} bytes of one prompt are not stored")
            leaf.parent.children.remove(leaf)
            self.bytes -= leaf.bytes

    def insert(self, node: PrefixNode) -> None:
        """Add a node to its parent."""
        assert node.parent is not None, "a node has a parent"
        node.parent.children.append(node)
        self._order[node] = None
        self.bytes += node.bytes

    def nodes(self) -> Iterator[tuple[Hashable, PrefixNode]]:
        """Yield the key and the node of everything stored, parents before their children."""
        waiting = [(key, node) for key, root in self.roots.items() for node in root.children]
        while waiting:
            key, node = waiting.pop()
            yield key, node
            waiting += [(key, child) for child in node.children]

    def _key(self, cache: ModelCache) -> Hashable:
        """Return what the states of a cache depend on beside the tokens."""
        scalings = [layer.rope.scaling for layer in self.args.layers if layer.rope is not None]
        chosen = {s.chosen_by(cache.capacity) for s in scalings if s is not None and s.by_length}
        return self.variant, cache.kv_bits, tuple(sorted(chosen))

    def _complete(self, node: PrefixNode) -> bool:
        """Return whether every layer has the states of all tokens of a node."""
        return len(node.tokens) <= min(self.kept)

    def _touch(self, node: PrefixNode) -> None:
        for one in node.path:
            self._order.move_to_end(one)

    def _read(
        self, cache: ModelCache, row: int, tokens: Sequence[int], parent: PrefixNode
    ) -> PrefixNode:
        """Return a node with the states of the tokens after those of its parent."""
        end = len(tokens)
        starts = [max(parent.end, end - kept) for kept in self.kept]
        pairs = zip(cache.layers, starts, strict=True)
        parts = tuple(layer.read(row, start, end) for layer, start in pairs)
        return PrefixNode(tuple(tokens[parent.end :]), parent, parts, end)

    def _fill(self, cache: ModelCache, row: int, node: PrefixNode, count: int, reach: int) -> None:
        """Write the first `count` tokens up to a node; a window begins at most its size and the
        slack before position `reach`.
        """
        starts = [max(0, reach - kept) for kept in self.kept]
        for store, start in {x.store: i for x, i in zip(cache.layers, starts, strict=True)}.items():
            store.mark(row, 0 if store.span is None else start, count)
        for one in node.path:
            for layer, start, tensors in zip(cache.layers, starts, one.parts, strict=True):
                begin = one.end - tensors[0].size(0)
                first = max(begin, start, count - layer.store.capacity)
                last = min(one.end, count)
                if first < last:
                    layer.write(row, first, tuple(x[first - begin : last - begin] for x in tensors))


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning."""
    if one == other:
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

"""What attention is asked to do: every rule, cache phase, packing, head count and size, as inputs
for a backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from transom.attention.mask import Layout, MaskSpec, positions_from_sizes, segments_from_sizes
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule

Phase = Literal[
    "prefill",
    "at a start",
    "padded",
    "packed",
    "behind a cache",
    "decode",
    "ring",
    "scattered",
    "blind",
]
Scoring = Literal["plain", "scaled", "softcap", "sinks", "softcap and sinks"]

RULES = (
    LayerRule(),
    LayerRule("full"),
    LayerRule("window", 7),
    LayerRule("window", 30),
    LayerRule("chunk", 16),
    LayerRule("chunk", 25),
)
CACHED: tuple[Phase, ...] = ("behind a cache", "decode", "ring")
PHASES: tuple[Phase, ...] = ("prefill", "at a start", "padded", "packed", *CACHED, "scattered")
HEADS = ((4, 4), (4, 2), (4, 1))  # query heads, kv heads
DIMS = (
    (8, 8),
    (64, 64),
    (80, 80),
    (128, 128),
    (48, 32),
    (32, 48),
)  # features of queries and keys, of values
LENGTHS = (
    1,
    2,
    127,
    128,
    129,
    300,
    513,
)  # tokens, around the blocks of all kernels and no multiple of any
LONG_PHASES: tuple[Phase, ...] = ("packed", "behind a cache", "scattered")
BOTH: tuple[Phase, ...] = ("prefill", "decode")
SCORED: tuple[Phase, ...] = ("prefill", "packed", "behind a cache", "decode")
TRAINED: tuple[Phase, ...] = ("prefill", "padded", "packed", "scattered")
SEEN = 37  # tokens in the cache before a call that has one


@dataclass(frozen=True)
class Job:
    """One call of attention; `group` is the column of the support matrix that it belongs to."""

    group: str
    rule: LayerRule = LayerRule()  # noqa: RUF009 - frozen
    phase: Phase = "prefill"
    length: int = 40
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    scoring: Scoring = "plain"
    gradients: bool = False

    def __str__(self) -> str:
        rule = f"{self.rule.kind} {self.rule.size}" if self.rule.size else self.rule.kind
        heads, dims = (f"{a}/{b}" for a, b in (self.heads, self.dims))
        scoring = "" if self.scoring == "plain" else f", {self.scoring}"
        return f"{rule}, {self.phase}, {self.length} tokens, heads {heads}, dims {dims}{scoring}"


def jobs() -> Iterator[Job]:
    """All rules in all phases, then one thing varied at a time."""
    for rule, phase, heads in product(RULES, PHASES, HEADS):
        if rule.kind != "full" or phase not in CACHED:  # such layers have no cache
            yield Job("masks", rule, phase, heads=heads)
    few = (LayerRule(), LayerRule("window", 30), LayerRule("chunk", 25))
    for length, rule in product(LENGTHS, (*few, LayerRule("window", 200), LayerRule("chunk", 200))):
        yield Job("lengths", rule, length=length)
    for length, rule, phase in product(LENGTHS, few, LONG_PHASES):
        yield Job("lengths", rule, phase, length=length)
    for dims, phase in product(DIMS, BOTH):
        yield Job("head dims", phase=phase, dims=dims)
    scorings: tuple[Scoring, ...] = ("scaled", "softcap", "sinks", "softcap and sinks")
    for scoring, phase in product(scorings, SCORED):
        group = (
            "softcap" if "softcap" in scoring else "sinks" if "sinks" in scoring else "head dims"
        )
        yield Job(group, LayerRule("window", 30), phase, scoring=scoring)
    for rule in (LayerRule(), LayerRule("window", 7), LayerRule("chunk", 16)):
        yield Job("masked rows", rule, "blind", length=5, gradients=True)
    for rule, phase in product(few, TRAINED):
        yield Job("gradients", rule, phase, gradients=True)
    for scoring, dims in product(scorings[1:], ((16, 16), (48, 32))):
        yield Job("gradients", LayerRule("window", 30), scoring=scoring, dims=dims, gradients=True)


@dataclass(frozen=True)
class Inputs:
    """A job as tensors: q [B, T, N, H], k, v [B, S, K, H], sinks [N] or none, and what describes
    them.
    """

    tensors: tuple[Tensor, ...]
    view: CacheView
    spec: MaskSpec
    scale: float | None
    softcap: float | None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as leaves of a new graph."""
        tensors = tuple(x.detach().to(dtype).requires_grad_() for x in self.tensors)
        view = CacheView(
            tensors[1:3], self.view.positions_BS, self.view.segments_BS, self.view.new_at
        )
        return Inputs(tensors, view, self.spec, self.scale, self.softcap)

    @property
    def score(self) -> ScoreArgs:
        """How products become scores."""
        return ScoreArgs(
            self.scale, self.softcap, self.tensors[3] if len(self.tensors) > 3 else None
        )


def build(job: Job, device: torch.device) -> Inputs:
    """Random tensors in float64 and the positions of the job, always the same."""
    generator = torch.Generator().manual_seed(0)
    q_positions, segments, layout, k_positions, new_at = place(job, generator)
    (rows, count), slots = q_positions.shape, k_positions.size(1)
    shapes: list[tuple[int, ...]] = [
        (rows, count, job.heads[0], job.dims[0]),
        (rows, slots, job.heads[1], job.dims[0]),
        (rows, slots, job.heads[1], job.dims[1]),
    ]
    if "sinks" in job.scoring:
        shapes.append((job.heads[0],))
    tensors = tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for shape in shapes
    )
    q_positions, k_positions = q_positions.to(device), k_positions.to(device)
    segments = None if segments is None else segments.to(device)
    return Inputs(
        tensors,
        CacheView(tensors[1:3], k_positions, segments, new_at),
        MaskSpec(job.rule, q_positions, segments, layout),
        0.3 if job.scoring == "scaled" else None,
        2.0 if "softcap" in job.scoring else None,
    )


def place(
    job: Job, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Layout | None, Tensor, int | None]:
    """Positions of the queries [B, T], segments, layout, positions of the slots [B, S], and
    `new_at`.
    """
    length = job.length
    row = torch.arange(length)
    if job.phase == "prefill":
        return row.expand(2, -1), None, Layout((length,) * 2), row.expand(2, -1), 0
    if job.phase == "at a start":
        shifted = (row + SEEN).expand(2, -1)
        return shifted, None, Layout((length,) * 2, start=SEEN), shifted, 0
    if job.phase == "padded":
        lengths = torch.tensor([[length], [max(1, length // 3)], [0]])
        positions = torch.where(row < lengths, row, -1)
        return positions, None, Layout((length,) * 3, padded=True), positions, 0
    if job.phase == "packed":
        cuts = (
            [[length // 2, length - length // 2 - 1, 1], [length]]
            if length > 3
            else [[length], [length]]
        )
        positions = torch.stack([positions_from_sizes(sizes) for sizes in cuts])
        segments = torch.stack([segments_from_sizes(sizes) for sizes in cuts])
        return (
            positions,
            segments,
            Layout(tuple(size for sizes in cuts for size in sizes)),
            positions,
            0,
        )
    if job.phase == "behind a cache":
        return behind_a_cache(job, generator)
    if job.phase in ("decode", "ring"):
        return decoding(job, generator)
    if (
        job.phase == "blind"
    ):  # no query sees a key: padding, empty slots, and keys that are out of reach
        queries, slots = torch.tensor([[90, -1, 40, -1, 5]]), torch.tensor([[-1, 96, 97, -1]])
        return queries, None, None, slots, None
    positions = torch.randint(-1, max(1, length // 2), (2, length), generator=generator)
    return positions, torch.randint(0, 2, (2, length), generator=generator), None, positions, None


def behind_a_cache(job: Job, generator: torch.Generator) -> tuple[Tensor, None, None, Tensor, int]:
    """New tokens in order behind the slots of a store in any order, where two rows have seen
    unequally many.
    """
    seen = torch.tensor([[SEEN], [SEEN // 2]])
    queries = seen + torch.arange(job.length)
    capacity = (job.rule.size or SEEN) + 3
    slots = (seen - 1 - torch.arange(capacity)).clamp(min=-1)
    slots = slots[:, torch.randperm(capacity, generator=generator)]
    return queries, None, None, torch.cat((slots, queries), 1), capacity


def decoding(job: Job, generator: torch.Generator) -> tuple[Tensor, None, None, Tensor, None]:
    """One token per row among what a static store shows, or two among the slots of a ring."""
    count = 1 if job.phase == "decode" else 2
    queries = torch.tensor([[SEEN], [SEEN // 2]]) + torch.arange(count)
    last = queries[:, -1:]
    if job.phase == "decode":
        slots = torch.arange(job.length + SEEN).expand(2, -1)
        return queries, None, None, torch.where(slots <= last, slots, -1), None
    capacity = (job.rule.size or SEEN) + 1
    slots = (last - torch.arange(capacity)).clamp(min=-1)
    return queries, None, None, slots[:, torch.randperm(capacity, generator=generator)], None

"""The calls that attention backends are compared on.

They cover every mask rule, phase of a cache, packing, number of heads, head size and length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from transom.attention.mask import Layout, MaskSpec, positions_from_sizes, segments_from_sizes
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule

Phase = Literal[
    "prefill",  # a batch of rows from position 0
    "from an offset",  # rows from a later position, without the tokens before
    "padded",  # rows of unequal length
    "packed",  # several documents in a row
    "with a cache",  # a long call that reads cached and new tokens side by side
    "decode",  # one token, read from a static cache
    "ring",  # two tokens, read from a rotating cache
    "random positions",
    "no visible key",  # no query may attend to any key
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
FEW_RULES = (RULES[0], RULES[3], RULES[5])
LONG_RULES = (*FEW_RULES, LayerRule("window", 200), LayerRule("chunk", 200))
CACHED: tuple[Phase, ...] = ("with a cache", "decode", "ring")
PHASES: tuple[Phase, ...] = (
    *("prefill", "from an offset", "padded", "packed"),
    *CACHED,
    "random positions",
)
LONG_PHASES: tuple[Phase, ...] = ("packed", "with a cache", "random positions")
SCORED_PHASES: tuple[Phase, ...] = ("prefill", "packed", "with a cache", "decode")
TRAINED_PHASES: tuple[Phase, ...] = ("prefill", "padded", "packed", "random positions")
SCORINGS: dict[Scoring, str] = {  # and the group that each belongs to
    "scaled": "head dims",
    "softcap": "softcap",
    "sinks": "sinks",
    "softcap and sinks": "softcap",
}
HEADS = ((4, 4), (4, 2), (4, 1))  # query heads, key/value heads
# Head sizes of queries and keys, and of values.
DIMS = ((8, 8), (64, 64), (80, 80), (128, 128), (48, 32), (32, 48))
# Tokens: around the block sizes of all kernels, and not a multiple of any.
LENGTHS = (1, 2, 127, 128, 129, 300, 513)
SEEN = 37  # tokens before the call, in phases that have some


@dataclass(frozen=True)
class Job:
    """One call of attention; `group` is its column in the support matrix."""

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
    """Yield all rules in all phases, then jobs in which one property varies at a time."""
    window = RULES[3]
    for rule, phase, heads in product(RULES, PHASES, HEADS):
        if rule.kind != "full" or phase not in CACHED:  # such layers have no cache
            yield Job("masks", rule, phase, heads=heads)
    for length, rule in product(LENGTHS, LONG_RULES):
        yield Job("lengths", rule, length=length)
    for length, rule, phase in product(LENGTHS, FEW_RULES, LONG_PHASES):
        yield Job("lengths", rule, phase, length=length)
    for dims in DIMS:
        yield Job("head dims", phase="prefill", dims=dims)
        yield Job("head dims", phase="decode", dims=dims)
    for (scoring, group), phase in product(SCORINGS.items(), SCORED_PHASES):
        yield Job(group, window, phase, scoring=scoring)
    for rule in (RULES[0], RULES[2], RULES[4]):
        yield Job("masked rows", rule, "no visible key", length=5, gradients=True)
    for rule, phase in product(FEW_RULES, TRAINED_PHASES):
        yield Job("gradients", rule, phase, gradients=True)
    for scoring, dims in product(list(SCORINGS)[1:], ((16, 16), (48, 32))):
        yield Job("gradients", window, scoring=scoring, dims=dims, gradients=True)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a job: q [B, T, N, H], k and v [B, S, K, H], and sinks [N] or none."""

    tensors: tuple[Tensor, ...]
    view: CacheView
    spec: MaskSpec
    score: ScoreArgs

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the same numbers in another dtype, as leaves of a new autograd graph."""
        tensors = tuple(x.detach().to(dtype).requires_grad_() for x in self.tensors)
        view, score = replace(self.view, states=tensors[1:3]), self.score
        if score.sinks_N is not None:
            score = replace(score, sinks_N=tensors[3])
        return Inputs(tensors, view, self.spec, score)


def build(job: Job, device: torch.device) -> Inputs:
    """Return random tensors in float64 and the positions of a job, equal in every call."""
    generator = torch.Generator().manual_seed(0)
    q_positions, segments, layout, k_positions, new_at = _place(job, generator)
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
        ScoreArgs(
            0.3 if job.scoring == "scaled" else None,
            2.0 if "softcap" in job.scoring else None,
            tensors[3] if "sinks" in job.scoring else None,
        ),
    )


# Positions of the queries [B, T], segments, layout, positions of the slots [B, S], and the slot
# from which on the keys are new (None: all are cached).
Place = tuple[Tensor, Tensor | None, Layout | None, Tensor, int | None]


def _place(job: Job, generator: torch.Generator) -> Place:
    """Return where the tokens of a job are."""
    length, phase = job.length, job.phase
    row = torch.arange(length)
    if phase in ("prefill", "from an offset"):
        start = 0 if phase == "prefill" else SEEN
        positions = (row + start).expand(2, -1)
        return positions, None, Layout((length,) * 2, start=start), positions, 0
    if phase == "padded":
        lengths = torch.tensor([[length], [max(1, length // 3)], [0]])
        positions = torch.where(row < lengths, row, -1)
        return positions, None, Layout((length,) * 3, padded=True), positions, 0
    if phase == "packed":
        first = [length // 2, length - length // 2 - 1, 1] if length > 3 else [length]
        documents = [first, [length]]
        positions = torch.stack([positions_from_sizes(sizes) for sizes in documents])
        segments = torch.stack([segments_from_sizes(sizes) for sizes in documents])
        return positions, segments, Layout((*first, length)), positions, 0
    if phase == "no visible key":  # padding, empty slots, and keys out of reach of the rules
        queries, slots = torch.tensor([[90, -1, 40, -1, 5]]), torch.tensor([[-1, 96, 97, -1]])
        return queries, None, None, slots, None
    if phase == "random positions":
        positions = torch.randint(-1, max(1, length // 2), (2, length), generator=generator)
        segments = torch.randint(0, 2, (2, length), generator=generator)
        return positions, segments, None, positions, None
    return _place_in_cache(job, generator)


def _place_in_cache(job: Job, generator: torch.Generator) -> Place:
    """Return new tokens after cached ones, where the two rows have unequally many of those."""
    seen = torch.tensor([[SEEN], [SEEN // 2]])
    count = {"with a cache": job.length, "decode": 1, "ring": 2}[job.phase]
    queries = seen + torch.arange(count)
    last = queries[:, -1:]
    if job.phase == "decode":  # a static cache: slot i has position i
        slots = torch.arange(job.length + SEEN).expand(2, -1)
        return queries, None, None, torch.where(slots <= last, slots, -1), None
    spare, newest = (3, seen - 1) if job.phase == "with a cache" else (1, last)
    capacity = (job.rule.size or SEEN) + spare
    slots = (newest - torch.arange(capacity)).clamp(min=-1)
    slots = slots[:, torch.randperm(capacity, generator=generator)]
    if job.phase == "with a cache":
        return queries, None, None, torch.cat((slots, queries), 1), capacity
    return queries, None, None, slots, None

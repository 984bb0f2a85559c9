"""However the tokens arrive, logits are those of one uncached forward of the whole sequence.

Calls are cut around every edge at which stores behave differently: windows, chunks, the capacity of
a ring, the longest call that is written through it, and the bucket that the view of a static store
is cut to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from transom.base.errors import notice, require
from transom.cache import store
from transom.cache.model_cache import ModelCache
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.verify.findings import TOLERANCES, Finding, difference
from transom.verify.sample_models import SAMPLES, random_context, random_tokens, sample_model

SMALL_BUCKET = (
    8  # slots: what the static view is cut to in small runs, so that a few dozen tokens cross it
)
SLACKS = (0, 3)  # ring slots beyond the span in small runs
UNEVEN = (3, 7, 1, 1, 12, 2)
UNEVEN_LARGE = (3, 70, 1, 200, 13)
REAL_SLACK, REAL_DECODED = (
    32,
    4,
)  # of a real model: spare ring slots, tokens decoded behind each prefill


@dataclass(frozen=True)
class Plan:
    """How far to go: sequence length, spare ring slots, the bucket in force, tokens decoded behind
    a prefill.
    """

    length: int
    slacks: tuple[int, ...]
    bucket: int
    decoded: int
    tolerance: float


@dataclass(frozen=True)
class Trace:
    """What a sequence of calls gave: the states behind every block, then the logits, each [B, T,
    ...].
    """

    states: list[Tensor]

    def rows(self, row: int, count: int, start: int = 0) -> Trace:
        """One row's tokens from `start`, `count` of them."""
        return Trace([x[row : row + 1, start : start + count] for x in self.states])


def check_cache() -> Iterator[Finding]:
    """Models with every rule, in float64, cut around every edge."""
    for name in ("mixed", "llama4", "deepseek"):
        args = ModelArgs.from_dict(SAMPLES[name])
        yield from compare_small(sample_model(args), name)


def compare_small(model: LLM, name: str) -> Iterator[Finding]:
    """A shrunken model, with buckets shrunken too."""
    args = model.args
    longest = max((layer.rule.size for layer in args.layers), default=0)
    length = 2 * max(longest + max(SLACKS), SMALL_BUCKET) + 3
    tolerance = TOLERANCES[model.dtype]
    with small_buckets():
        for total in lengths_by_rope(args, length):
            yield from compare(model, name, Plan(total, SLACKS, SMALL_BUCKET, total, tolerance))


def compare_whole(model: LLM, name: str, length: int | None = None) -> Iterator[Finding]:
    """A real model as it is, over `length` tokens (default: two buckets and a little, if it takes
    as many).
    """
    head, longest = model.args.head, model.args.max_seq_len
    require(
        head is None,
        "head",
        None if head is None else head.kind,
        "a model with a head has no cache to verify",
    )
    length = min(longest, 2 * store.BUCKET + 16) if length is None else length
    require(2 <= length <= longest, "--length", length, f"expected 2 to max_seq_len = {longest}")
    spans = sorted({layer.rule.size for layer in model.args.layers if layer.rule.size >= length})
    for span in spans:
        notice(f"{name}: windows or chunks of {span} tokens are not crossed by --length {length}")
    tolerance = TOLERANCES[model.dtype]
    yield from compare(
        model, name, Plan(length, (REAL_SLACK,), store.BUCKET, REAL_DECODED, tolerance)
    )


def lengths_by_rope(args: ModelArgs, length: int) -> list[int]:
    """`length`, or, where rotary frequencies depend on it, one length below the switch and one
    above.
    """
    scaling = args.scaling
    if scaling is None or not scaling.by_length:
        return [length]
    return [scaling.original_max_seq_len - 2, scaling.original_max_seq_len + 8]


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """Static views cut at multiples of a few slots inside the `with`."""
    before = store.BUCKET
    store.BUCKET = SMALL_BUCKET
    try:
        yield
    finally:
        store.BUCKET = before


@torch.no_grad()
def compare(model: LLM, name: str, plan: Plan) -> Iterator[Finding]:
    """All comparisons for one model, against one forward of `plan.length` tokens."""
    args = model.args
    tokens = random_tokens(args, 2, plan.length).to(model.device)
    whole = run(model, [TransformerInput(tokens)])
    ahead = any(layer.rule.kind == "full" for layer in args.layers)
    scaling = args.scaling
    by_length = (
        scaling is not None and scaling.by_length and plan.length > scaling.original_max_seq_len
    )
    if ahead:
        notice(
            f"{name}: a layer sees later tokens, so nothing is cached and only padded and packed "
            f"calls compared"
        )
    if by_length:
        notice(
            f"{name}: at {plan.length} tokens frequencies depend on the length, only equal "
            f"lengths are compared"
        )
    cases = Cases(model, name, plan, tokens, whole)
    if not ahead:
        if not by_length:
            yield from cases.shorter()
        yield from cases.cached()
        yield from cases.rotating()
        yield from cases.after_rollback()
    if not by_length:
        yield from cases.padded(cached=not ahead)
        yield from cases.packed()


def edges(args: ModelArgs, plan: Plan) -> list[int]:
    """Lengths around every window, chunk, ring and bucket edge that fit in the sequence,
    ascending.
    """
    spans = {layer.rule.size for layer in args.layers if layer.rule.size}
    marks = {plan.bucket, 2 * plan.bucket, *spans, *(2 * span for span in spans)}
    marks |= {times * (span + slack) for span in spans for slack in plan.slacks for times in (1, 2)}
    marks |= {
        slack + 1 for slack in plan.slacks if spans
    }  # the longest call written through a ring
    around = {mark + offset for mark in marks for offset in (-1, 0, 1)} | {1, plan.length - 1}
    return sorted(n for n in around if 1 <= n < plan.length)


@dataclass(frozen=True)
class Cases:
    """The comparisons of one model; `whole` is what every one of them must equal."""

    model: LLM
    name: str
    plan: Plan
    tokens: Tensor
    whole: Trace

    def shorter(self) -> Iterator[Finding]:
        """A forward of fewer tokens gives the same numbers for them: nothing looks ahead."""
        for count in edges(self.model.args, self.plan):
            mine = run(self.model, [TransformerInput(self.tokens[:, :count])])
            yield self.judge("full forward of fewer tokens", f"{count} tokens", mine)

    def cached(self) -> Iterator[Finding]:
        """Prefill and decode, then prefill in chunks, at every edge and for every slack."""
        plan, total = self.plan, self.plan.length
        for slack in plan.slacks:
            said = f", slack {slack}" if len(plan.slacks) > 1 else ""
            for count in edges(self.model.args, plan):
                stop = min(total, count + plan.decoded)
                mine = self.feed([count] + [1] * (stop - count), slack)
                yield self.judge(
                    "prefill + decode", f"{count} + {stop - count} x 1 tokens{said}", mine
                )
            for size in edges(self.model.args, plan):
                if (
                    plan.decoded < total and size < 16
                ):  # of a real model, calls this small take too long
                    continue
                yield self.judge(
                    "chunked prefill",
                    f"chunks of {size}{said}",
                    self.feed(cut(total, [size]), slack),
                )
            calls = cut(total, UNEVEN if plan.decoded >= total else UNEVEN_LARGE)
            yield self.judge("chunked prefill", f"uneven chunks{said}", self.feed(calls, slack))

    def rotating(self) -> Iterator[Finding]:
        """Rings against stores that keep every token: the same calls, with so much slack that
        nothing rotates.
        """
        spans = [layer.rule.size for layer in self.model.args.layers if layer.rule.size]
        if not spans or min(spans) >= self.plan.length:
            return
        calls = cut(self.plan.length, (max(1, min(spans) - 1), 1, 1))
        static = self.feed(calls, slack=self.plan.length)
        for slack in self.plan.slacks:
            where = f"rings of {min(spans) + slack} slots and more, {self.plan.length} tokens"
            yield self.judge("rotating = static stores", where, self.feed(calls, slack), static)

    def after_rollback(self) -> Iterator[Finding]:
        """Tokens taken back and fed again leave no trace."""
        total = self.plan.length
        wrong = random_tokens(self.model.args, 2, total, seed=1).to(self.tokens.device)
        for slack in self.plan.slacks:
            back, cache = min(slack + 1, total - 1), self.model.make_cache(2, total, slack=slack)
            start = max(1, total - back - 2)
            run(
                self.model,
                [TransformerInput(part) for part in (self.tokens[:, :start], wrong[:, :back])],
                cache,
            )
            assert cache.rollback(back, at_most=back), "a ring takes back slack + 1 tokens"
            mine = run(
                self.model,
                [TransformerInput(part) for part in self.tokens[:, start:].split(1, 1)],
                cache,
            )
            expected = Trace([x[:, start:] for x in self.whole.states])
            yield self.judge(
                "after a rollback", f"{back} tokens taken back at {start}", mine, expected, start
            )

    def padded(self, *, cached: bool) -> Iterator[Finding]:
        """Rows of unequal length in one batch, padded behind or in front, against each row
        alone.
        """
        args, total = self.model.args, self.plan.length
        for short in edges(args, self.plan):
            lengths = torch.tensor([total, short], device=self.tokens.device)
            alone = run(self.model, [TransformerInput(self.tokens[1:, :short])])
            mine = run(self.model, [TransformerInput(self.tokens, lengths=lengths)])
            yield self.judge("padded batch", f"{short} of {total}", mine.rows(1, short), alone)
            front = (
                torch.arange(total, device=self.tokens.device).expand(2, -1)
                - (total - lengths)[:, None]
            )
            shifted = torch.stack([self.tokens[0], self.tokens[1].roll(total - short)])
            mine = run(self.model, [TransformerInput(shifted, tokens_position=front.clamp(min=-1))])
            yield self.judge(
                "padded in front", f"{short} of {total}", mine.rows(1, short, total - short), alone
            )
            if not cached or short + 2 >= total:
                continue
            calls = [
                TransformerInput(
                    self.tokens[:, : total - 2], lengths=lengths - torch.tensor([2, 0]).to(lengths)
                )
            ]
            ends = torch.stack([self.tokens[0, -2:], self.tokens[1, short : short + 2]])
            calls += [TransformerInput(part) for part in ends.split(1, 1)]
            mine = run(
                self.model, calls, self.model.make_cache(2, total, slack=self.plan.slacks[-1])
            )
            expected = self.whole.rows(1, 2, short)
            where = f"{short} of {total - 2} prefilled, 2 decoded"
            yield self.judge(
                "padded batch, cached", where, mine.rows(1, 2, total - 2), expected, short
            )

    def packed(self) -> Iterator[Finding]:
        """Documents packed in one row against each document alone."""
        total = self.plan.length
        for first in edges(self.model.args, self.plan):
            if first + 1 >= total:
                continue
            sizes = [first, 1, total - first - 1] if first + 2 < total else [first, total - first]
            row = self.tokens[:1]
            mine = run(self.model, [TransformerInput(row, sizes=sizes)])
            alone = [run(self.model, [TransformerInput(part)]) for part in row.split(sizes, 1)]
            expected = Trace(
                [torch.cat(parts, 1) for parts in zip(*(one.states for one in alone), strict=True)]
            )
            yield self.judge(
                "packed", f"documents of {', '.join(map(str, sizes))} tokens", mine, expected
            )

    def feed(self, calls: Sequence[int], slack: int) -> Trace:
        """The sequence through a new cache in calls of these sizes."""
        cache = self.model.make_cache(2, self.plan.length, slack=slack)
        parts = self.tokens[:, : sum(calls)].split(list(calls), 1)
        return run(self.model, [TransformerInput(part) for part in parts], cache)

    def judge(
        self,
        comparison: str,
        where: str,
        mine: Trace,
        expected: Trace | None = None,
        start: int = 0,
    ) -> Finding:
        """All layers and logits compared; and where they first differ, if they do (positions from
        `start`).
        """
        if expected is None:
            count = mine.states[-1].size(1)
            expected = Trace([x[:, :count] for x in self.whole.states])
        tolerance = self.plan.tolerance
        # All layers, not the logits alone: an output that is still zero would equal anything.
        error = max(difference(x, y) for x, y in zip(mine.states, expected.states, strict=True))
        detail = ""
        if not error <= tolerance:
            detail = first_bad(mine, expected, tolerance, start)
        return Finding(comparison, f"{self.name}, {where}", error, tolerance, detail)


def first_bad(mine: Trace, expected: Trace, tolerance: float, start: int) -> str:
    """Where two traces part: the lowest layer that differs anywhere, and the first position that
    does there.
    """
    last = len(expected.states) - 1
    for layer, (x, y) in enumerate(zip(mine.states, expected.states, strict=True)):
        if difference(x, y) <= tolerance:
            continue
        columns = range(min(x.size(1), y.size(1)))
        bad = next(
            (t for t in columns if not difference(x[:, t], y[:, t]) <= tolerance), len(columns)
        )
        return (
            f"first at position {start + bad}, "
            f"{f'layer {layer}' if layer < last else 'behind the last layer'}"
        )
    return ""


def run(model: LLM, calls: Sequence[TransformerInput], cache: ModelCache | None = None) -> Trace:
    """The calls in order, with what came out behind every block joined over them."""
    seen: list[list[Tensor]] = [[] for _ in range(len(model.layers) + 1)]

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: object, output: tuple[Tensor, object]) -> None:
            seen[index].append(output[0])

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(model.layers)]
    try:
        with torch.no_grad():
            for call in calls:
                if model.args.context_dim is not None and (cache is None or not cache.has_context):
                    context = random_context(model.args, call.tokens.size(0))
                    call = replace(call, context=context.to(model.tok_embeddings.weight))
                logits = model(call, cache=cache).logits
                assert logits is not None, "all logits are the default"
                seen[-1].append(logits)
    finally:
        for handle in handles:
            handle.remove()
    return Trace([torch.cat(parts, 1) for parts in seen])


def cut(total: int, sizes: Sequence[int]) -> list[int]:
    """`sizes` repeated until they make `total`, the last one shortened."""
    out: list[int] = []
    at = 0
    while at < total:
        out.append(min(sizes[len(out) % len(sizes)], total - at))
        at += out[-1]
    return out

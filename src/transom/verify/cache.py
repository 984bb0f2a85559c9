"""However tokens are passed to a model, its outputs equal those of one forward of all tokens.

Calls are split around every length at which a cache behaves differently: windows, chunks, the
capacity of a ring, the longest call that is written through a ring, and the bucket to which the
view of a static cache is cut.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from transom.base.errors import expect, notice
from transom.base.runtime import attached, replaced
from transom.cache import store
from transom.cache.model_cache import ModelCache
from transom.cache.prefix import PrefixCache
from transom.checkpoints.load import load
from transom.config.model_args import ModelArgs
from transom.inference.decode_args import DecodeArgs
from transom.inference.forward import prefill
from transom.inference.loop import check_language_model
from transom.inference.prompt_cache import PromptCache
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.verify import endless
from transom.verify.findings import TOLERANCES, Finding, difference, first_difference
from transom.verify.sample_models import random_context, random_tokens, sample_model
from transom.verify.speculate import speculated
from transom.verify.targets import has_weights, small_models

SMALL_BUCKET = 8  # slots of a static view in small models, so that a few dozen tokens cross it
SLACKS = (0, 3)  # slots of a ring beyond its window, in small models
UNEVEN, UNEVEN_LARGE = (3, 7, 1, 1, 12, 2), (3, 70, 1, 200, 13)  # tokens of the calls of a prefill
# Rounding changes codes of 8 bits in all dtypes but float64: in SmolLM2 by 0.013 in float32.
IN_8_BITS = {**dict.fromkeys(TOLERANCES, 0.1), torch.float64: TOLERANCES[torch.float64]}
REAL_SLACK, REAL_DECODED = 32, 4  # of a full-size model: slack, tokens decoded after each prefill

States = list[Tensor]  # the output of every block, then the logits, each [B, T, ...]


@dataclass(frozen=True)
class Plan:
    """The sizes of a comparison, in tokens and slots."""

    length: int
    slacks: tuple[int, ...]
    bucket: int
    decoded: int


def check(
    model: str | None = None,
    *,
    full: bool = False,
    length: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    tokens: int | None = None,
) -> Iterator[Finding]:
    """Compare a small copy of a model, or samples with every mask rule without one.

    Args:
        model: The name of a model, see `targets.model_args`.
        full: Compare the model itself with its own weights, and not a small copy.
        length: The length of the sequence with `full`, in tokens.
        device: Where a `full` model runs.
        dtype: The dtype of the weights of a `full` model.
        tokens: Run that many tokens through a model with windows instead; see `endless.check`.
    """
    if tokens is not None:
        expect(model is None, "model", model, "none with --tokens")
        yield from endless.check(tokens)
        return
    if full and model is not None:
        expect(has_weights(model), "--full", model, "a model folder or hub id")
        yield from compare_full_size(load(model, device=device, dtype=dtype), model, length)
        return
    for name, args in small_models(model, ("mixed", "llama4", "deepseek"), context=True):
        yield from compare_small(sample_model(args), name)


def compare_small(model: LLM, name: str) -> Iterator[Finding]:
    """Compare a small model, with small buckets, at every length around an edge."""
    args, scaling = model.args, model.args.scaling
    longest = max((layer.rule.size for layer in args.layers), default=0)
    lengths = [2 * max(longest + max(SLACKS), SMALL_BUCKET) + 3]
    if scaling is not None and scaling.by_length:  # below and above the length of the switch
        lengths = [scaling.original_max_seq_len - 2, scaling.original_max_seq_len + 8]
    with replaced(store, "BUCKET", SMALL_BUCKET):
        for length in lengths:
            yield from compare(model, name, Plan(length, SLACKS, SMALL_BUCKET, length))
        yield from speculated(model, name)


def compare_full_size(model: LLM, name: str, length: int | None = None) -> Iterator[Finding]:
    """Compare a model as it is over `length` tokens, by default two buckets and a few tokens.

    Raises:
        RequestError: If the model has a head in place of logits, or takes fewer tokens.
    """
    check_language_model(model.args)
    longest = model.args.max_seq_len
    length = min(longest, 2 * store.BUCKET + 16) if length is None else length
    expect(2 <= length <= longest, "--length", length, f"2 to max_seq_len = {longest}")
    for span in sorted({layer.rule.size for layer in model.args.layers}):
        if span >= length:
            notice(f"{name}: --length {length} does not exceed windows or chunks of {span} tokens")
    plan = Plan(length, (REAL_SLACK,), store.BUCKET, REAL_DECODED)
    yield from compare(model, name, plan)
    yield from speculated(model, name)


def compare(model: LLM, name: str, plan: Plan) -> Iterator[Finding]:
    """Make all comparisons of one model with one forward of `plan.length` tokens."""
    args, scaling = model.args, model.args.scaling
    tokens = random_tokens(args, 2, plan.length).to(model.device)
    calls = Calls(model, name, plan, tokens, run(model, [TransformerInput(tokens)]))
    causal = all(layer.rule.kind != "full" for layer in args.layers)
    rescaled = False
    if scaling is not None and scaling.by_length:
        rescaled = plan.length > scaling.original_max_seq_len
    if not causal:
        notice(
            f"{name}: has no cache, since a layer attends to later tokens; only padded and packed "
            "calls are compared"
        )
    if rescaled:
        notice(
            f"{name}: RoPE frequencies depend on the length at {plan.length} tokens; only calls of "
            "equal length are compared"
        )
    if causal and not rescaled:
        yield from calls.shorter()
    if causal:
        yield from calls.cached()
        yield from calls.in_8_bits()
        yield from calls.after_rollback()
    if causal and args.context_dim is None:
        yield from calls.after_prefix()
    if not rescaled:
        yield from calls.padded(cached=causal)
        yield from calls.packed()


def edges(args: ModelArgs, plan: Plan) -> list[int]:
    """Return the lengths around every window, chunk, ring and bucket, ascending."""
    spans = {layer.rule.size for layer in args.layers if layer.rule.size}
    rings = {span + slack for span in spans for slack in (0, *plan.slacks)}
    marks = {times * size for size in (plan.bucket, *rings) for times in (1, 2)}
    marks |= {slack + 1 for slack in plan.slacks if spans}  # the longest call through a ring
    around = {mark + offset for mark in marks for offset in (-1, 0, 1)} | {1, plan.length - 1}
    return sorted(count for count in around if 1 <= count < plan.length)


@dataclass(frozen=True)
class Calls:
    """The comparisons of one model with `full`, the states of one forward of all tokens."""

    model: LLM
    name: str
    plan: Plan
    tokens: Tensor
    full: States

    @property
    def edges(self) -> list[int]:
        """The lengths at which calls are split."""
        return edges(self.model.args, self.plan)

    def shorter(self) -> Iterator[Finding]:
        """Compare forwards of fewer tokens: no token depends on later ones."""
        for count in self.edges:
            states = run(self.model, [TransformerInput(self.tokens[:, :count])])
            yield self.finding("full forward of fewer tokens", f"{count} tokens", states)

    def cached(self) -> Iterator[Finding]:
        """Compare prefill and decode, then prefill in chunks, for every slack."""
        plan, total = self.plan, self.plan.length
        small = plan.decoded >= total
        for slack in plan.slacks:
            with_slack = f", slack {slack}" if len(plan.slacks) > 1 else ""
            for count in self.edges:
                decoded = min(total - count, plan.decoded)
                case = f"{count} + {decoded} x 1 tokens{with_slack}"
                states = self.feed([count, *[1] * decoded], slack)
                yield self.finding("prefill + decode", case, states)
            chunks = {f"chunks of {size}": [size] for size in self.edges if small or size >= 16}
            chunks["uneven chunks"] = list(UNEVEN if small else UNEVEN_LARGE)
            for case, sizes in chunks.items():
                states = self.feed(_split(total, sizes), slack)
                yield self.finding("chunked prefill", f"{case}{with_slack}", states)

    def in_8_bits(self) -> Iterator[Finding]:
        """Compare calls that store keys and values in 8 bits with one such call of all tokens.

        The full forward is no reference, since it doesn't round. Rounding of the dtype can change a
        code, and so a value by 1/127 of the largest; float64 is precise enough that it doesn't.
        """
        plan, slack = self.plan, self.plan.slacks[-1]
        expected = self.feed([plan.length], slack, kv_bits=8)
        uneven = UNEVEN if plan.decoded >= plan.length else UNEVEN_LARGE
        for sizes in (*([count, 1] for count in self.edges[::2]), _split(plan.length, uneven)):
            states, same = (
                self.feed(sizes, slack, kv_bits=8),
                [x[:, : sum(sizes)] for x in expected],
            )
            case = f"calls of {', '.join(map(str, sizes[:4]))} tokens"
            yield self.finding("KV cache in 8 bits", case, states, same, tolerances=IN_8_BITS)

    def after_rollback(self) -> Iterator[Finding]:
        """Compare tokens that follow a rollback of other tokens."""
        total = self.plan.length
        others = random_tokens(self.model.args, 2, total, seed=1).to(self.tokens.device)
        for slack in self.plan.slacks:
            back, cache = min(slack + 1, total - 1), self.model.make_cache(2, total, slack=slack)
            start = max(1, total - back - 2)
            for part in (self.tokens[:, :start], others[:, :back]):
                run(self.model, [TransformerInput(part)], cache)
            assert cache.rollback(back, at_most=back), "a ring can roll back slack + 1 tokens"
            rest = [TransformerInput(part) for part in self.tokens[:, start:].split(1, 1)]
            states = run(self.model, rest, cache)
            yield self.finding("after a rollback", f"{back} tokens at {start}", states, start=start)

    def after_prefix(self) -> Iterator[Finding]:
        """Compare prompts that share their beginning with one whose states a file has."""
        total, row = self.plan.length, self.tokens[:1]
        others = random_tokens(self.model.args, 1, total, seed=1).to(row.device)
        for slack, step in itertools.product(self.plan.slacks, (total // 7 + 1, total // 2)):
            with tempfile.TemporaryDirectory() as folder:
                file = DecodeArgs(prompt_cache_file=str(Path(folder) / "prompt"))
                cache = self.model.make_cache(1, total, slack=slack)
                PromptCache(self.model, file, slack=slack).restore(cache, row.tolist())
                with torch.no_grad():
                    prefill(self.model, cache, row.tolist(), step)
                prefixes = PromptCache(self.model, file, slack=slack)
            for count in self.edges:
                prompt = torch.cat((row[:, :count], others[:, count:]), 1)
                full = run(self.model, [TransformerInput(prompt)])
                cache.reset()
                (start,) = PrefixCache.restore(prefixes, cache, prompt.tolist())  # no notice
                states = run(self.model, [TransformerInput(prompt[:, start:])], cache)
                case = f"{start} of {count} shared tokens, calls of {step}, slack {slack}"
                expected = [x[:, start:] for x in full]
                yield self.finding("after a stored prefix", case, states, expected, start=start)

    def padded(self, *, cached: bool) -> Iterator[Finding]:
        """Compare a short row in a padded batch with the same row alone."""
        total, tokens = self.plan.length, self.tokens
        for short in self.edges:
            lengths = torch.tensor([total, short], device=tokens.device)
            alone = run(self.model, [TransformerInput(tokens[1:, :short])])
            states = run(self.model, [TransformerInput(tokens, lengths=lengths)])
            case = f"{short} of {total}"
            yield self.finding("padded on the right", case, _row(states, short), alone)
            positions = torch.arange(total, device=tokens.device).expand(2, -1)
            positions = (positions - (total - lengths)[:, None]).clamp(min=-1)
            shifted = torch.stack([tokens[0], tokens[1].roll(total - short)])
            states = run(self.model, [TransformerInput(shifted, tokens_position=positions)])
            row = _row(states, short, total - short)
            yield self.finding("padded on the left", case, row, alone)
            if cached and short + 2 < total:
                prompt = lengths - torch.tensor([2, 0]).to(lengths)
                ends = torch.stack([tokens[0, -2:], tokens[1, short : short + 2]])
                calls = [TransformerInput(tokens[:, : total - 2], lengths=prompt)]
                calls += [TransformerInput(part) for part in ends.split(1, 1)]
                cache = self.model.make_cache(2, total, slack=self.plan.slacks[-1])
                row = _row(run(self.model, calls, cache), 2, total - 2)
                case = f"prompt of {short} padded to {total - 2}, 2 decoded"
                yield self.finding("padded prompt + decode", case, row, None, slice(1, 2), short)

    def packed(self) -> Iterator[Finding]:
        """Compare documents packed in one row with each document alone."""
        total, row = self.plan.length, self.tokens[:1]
        for first in self.edges:
            if first + 1 >= total:
                continue
            sizes = [first, 1, total - first - 1] if first + 2 < total else [first, total - first]
            states = run(self.model, [TransformerInput(row, sizes=sizes)])
            alone = [run(self.model, [TransformerInput(part)]) for part in row.split(sizes, 1)]
            expected = [torch.cat(parts, 1) for parts in zip(*alone, strict=True)]
            case = f"documents of {', '.join(map(str, sizes))} tokens"
            yield self.finding("packed documents", case, states, expected)

    def feed(self, calls: Sequence[int], slack: int, kv_bits: int = 16) -> States:
        """Return the states of the sequence passed to a new cache in calls of these sizes."""
        cache = self.model.make_cache(2, self.plan.length, slack=slack, kv_bits=kv_bits)
        parts = self.tokens[:, : sum(calls)].split(list(calls), 1)
        return run(self.model, [TransformerInput(part) for part in parts], cache)

    def finding(
        self,
        comparison: str,
        case: str,
        states: States,
        expected: States | None = None,
        rows: slice = slice(None),
        start: int = 0,
        tolerances: Mapping[torch.dtype, float] = TOLERANCES,
    ) -> Finding:
        """Compare the states of all blocks; by default with those of the full forward.

        The logits alone are not enough: an output matrix of zeros would equal any other.
        """
        if expected is None:
            stop = start + states[-1].size(1)
            expected = [x[rows, start:stop] for x in self.full]
        error = max(difference(x, y) for x, y in zip(states, expected, strict=True))
        tolerance = tolerances[self.model.dtype]
        detail = "" if error <= tolerance else first_failure(states, expected, tolerance, start)
        return Finding(comparison, f"{self.name}, {case}", error, tolerance, detail)


def first_failure(states: States, expected: States, tolerance: float, start: int) -> str:
    """Return the lowest layer with different states, and the first position that differs there."""
    for layer, (x, y) in enumerate(zip(states, expected, strict=True)):
        if not difference(x, y) <= tolerance:
            position = start + first_difference(x, y, tolerance, 1)
            place = f"layer {layer}" if layer < len(states) - 1 else "logits"
            return f"first at position {position}, {place}"
    return ""


def run(model: LLM, calls: Sequence[TransformerInput], cache: ModelCache | None = None) -> States:
    """Pass the calls to a model in order and return its states, joined over the calls."""
    states: list[list[Tensor]] = [[] for _ in range(len(model.layers) + 1)]
    hooks = [
        block.register_forward_hook(lambda _, args, out, kept=kept: kept.append(out[0]))
        for block, kept in zip(model.layers, states, strict=False)
    ]
    with attached(hooks), torch.no_grad():
        for call in calls:
            if model.args.context_dim is not None and (cache is None or not cache.has_context):
                context = random_context(model.args, call.tokens.size(0))
                call = replace(call, context=context.to(model.tok_embeddings.weight))
            states[-1].append(model(call, cache=cache).logits)
    return [torch.cat(parts, 1) for parts in states]


def _row(states: States, count: int, start: int = 0) -> States:
    """Return `count` tokens of the second row."""
    return [x[1:2, start : start + count] for x in states]


def _split(total: int, sizes: Sequence[int]) -> list[int]:
    """Return `sizes`, repeated until their sum is `total`, with a shorter last one."""
    calls: list[int] = []
    while sum(calls) < total:
        calls.append(min(sizes[len(calls) % len(sizes)], total - sum(calls)))
    return calls

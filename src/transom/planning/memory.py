"""The memory that a model needs, by category, and the memory that this machine has left. No torch.

The check before a model is loaded and `transom inspect --memory` use the same numbers.
"""

from __future__ import annotations

import bisect
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transom.config.layer_args import LayerArgs
from transom.config.model_args import ModelArgs
from transom.planning import counts

PREFIX_BYTES = 1 << 30  # limit of the stored states of the beginnings of prompts
SLACK = 32  # slots of a ring beyond its window or chunk by default
# Bytes that Python and PyTorch take on the host before a model is loaded: 0.25 to 0.35 GB.
PROGRAM_BYTES = 300_000_000
_QUERIES, _PAIRS = 256, 32_768  # queries of a block of a mask, pairs of a block of scores


@dataclass(frozen=True)
class Workload:
    """What a model has to do, as far as its memory depends on it.

    Attributes:
        rows: Sequences that are generated together.
        tokens: Tokens of each at most, those of the prompt included.
        value_bytes: Bytes of one number in the dtype of the model.
        kv_bits: As in `DecodeArgs`.
        step: Prompt tokens per forward call.
        native: Whether decode steps run in C++, which reads codes and masks nothing.
        joined: Whether weights of one input are brought side by side first, as on GPUs.
    """

    rows: int
    tokens: int
    value_bytes: int
    kv_bits: int = 16
    step: int = 512
    native: bool = True
    joined: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of everything that is in memory while a model generates.

    Attributes:
        weights: The weights, by kind.
        mapped: The share of the weights that stays in memory maps of their files. The system may
            drop these pages and read them again, so they do not have to fit.
        cache: The KV cache as it is allocated, by kind of layer.
        prefill: An estimate of the most that a forward call of the prompt allocates, or that
            weights take which are joined before it.
        decode: An estimate for a step of one token per row.
        logits: Logits of one token per row, and what sampling makes of them.
        more: What else there is, by name.
    """

    weights: Mapping[str, int]
    mapped: int
    cache: Mapping[str, int]
    prefill: int
    decode: int
    logits: int
    more: Mapping[str, int] = field(default_factory=dict)

    @property
    def working(self) -> int:
        """What forward calls compute with. Prefill and decode steps follow each other."""
        return max(self.prefill, self.decode) + self.logits

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.weights, self.cache, self.more)
        return sum(sum(part.values()) for part in parts) + self.working

    @property
    def needed(self) -> int:
        """What must fit into memory: all but mapped weights."""
        return self.total - self.mapped


def memory_plan(
    args: ModelArgs,
    work: Workload,
    weights: Mapping[str, int],
    *,
    mapped: int = 0,
    more: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Return the memory that a model needs for a workload.

    Args:
        args: The model.
        work: The workload.
        weights: Bytes of the weights by kind; see `weight_counts`.
        mapped: Bytes of them that stay in memory maps of files.
        more: Bytes of anything else by name.
    """
    cache = cache_parts(args, work)
    step = min(work.step, work.tokens)
    prefill = call_bytes(args, work, step, 0)
    if work.tokens > step:  # the last piece of a prompt sees all of it
        prefill = max(prefill, call_bytes(args, work, step, work.tokens))
    if work.rows > 1:  # a beginning that the rows share runs as a row of its own, see `prefill`
        prefill += 2 * sum(cache.values()) // work.rows
    prefill = max(prefill, joined_bytes(args, work))
    decode = native_bytes(args, work) if work.native else call_bytes(args, work, 1, work.tokens)
    logits = work.rows * args.vocab_size * (work.value_bytes + 12)
    return MemoryPlan(weights, mapped, cache, prefill, decode, logits, more or {})


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 0 to `most` that fits, if all smaller ones do."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))


def largest_context(plan: Callable[[Workload], MemoryPlan], work: Workload, left: int) -> int:
    """Return the most tokens of each row with which a workload fits into `left` bytes."""
    return largest(lambda n: plan(replace(work, tokens=n)).needed <= left, work.tokens)


# Weights.


def weight_counts(args: ModelArgs) -> dict[str, int]:
    """Return the number of weights of a model by kind, without its files."""
    out: Counter[str] = Counter({"embeddings": args.vocab_size * args.dim})
    for layer in args.layers:
        attention = counts.attention_weights(layer) + counts.attention_vectors(layer)
        attention += counts.cross_attention_parameters(layer)
        hidden = counts.feed_forward_weights(layer) + counts.feed_forward_vectors(layer)
        out["attention"] += attention
        out["feed-forward" if layer.moe is None else "experts"] += hidden
        out["norms"] += counts.layer_parameters(layer) - attention - hidden
    out["norms"] += args.dim * (2 if args.norm == "layer" else 1)
    out["output"] = counts.output_parameters(args)
    out["image encoder"] = counts.vision_parameters(args)
    return {kind: count for kind, count in out.items() if count}


# The kind of a parameter is that of the first pattern with which its name begins.
_KINDS = {
    r".*\.lora\.": "adapter",
    r"vision\.": "image encoder",
    r"tok_embeddings\.": "embeddings",
    r"output\.": "output",
    r".*attention\.": "attention",
    r".*feed_forward\.(router|experts|shared_expert)\.": "experts",
    r".*feed_forward\.": "feed-forward",
    "": "norms",
}


def weight_kind(name: str) -> str:
    """Return the kind of a parameter by its name, as `weight_counts` has them.

    Parts of quantized weights are kinds of their own: `attention codes` and `attention scales`. All
    of an adapter is one kind.
    """
    kind = next(kind for pattern, kind in _KINDS.items() if re.match(pattern, name))
    part = name.rpartition(".")[2]
    whole = kind in ("adapter", "image encoder", "norms")
    if whole or part in ("weight", "bias", "sinks", "choice_bias"):
        return kind
    return f"{kind} {'codes' if part == 'codes' else 'scales'}"


# What is made while a model runs.


def cache_parts(args: ModelArgs, work: Workload, slack: int = SLACK) -> dict[str, int]:
    """Return the bytes of a KV cache as it is allocated, by kind of layer.

    All slots count, a spare one, and the positions, which layers of one kind share.
    """
    out: Counter[str] = Counter()
    size, stores = 1 if work.kv_bits == 8 else work.value_bytes, set()
    for layer in args.layers:
        ring = counts.ring_slots(layer.rule, work.tokens, slack)
        slots = (work.tokens if ring is None else ring) + 1
        kind = "all tokens" if ring is None else f"ring of a {layer.rule.kind}"
        latent = "" if layer.mla is None else ", latent"
        bytes_per_row = slots * counts.kv_bytes_per_token(layer, size)
        out[f"{kind}{latent}"] += work.rows * bytes_per_row
        stores.add(slots)
    out["positions"] = 8 * work.rows * sum(stores)
    return dict(out)


def joined_bytes(args: ModelArgs, work: Workload) -> int:
    """Estimate the weights of one input that are in memory twice while they are joined: those of
    gate and value, or of the attention, of the widest layer. 0 if nothing is joined.
    """
    layers = args.layers if work.joined else ()
    sizes = [counts.attention_weights(one) for one in layers]
    sizes += [2 * one.dim * one.hidden_dim for one in layers if one.moe is None and one.ffn_gated]
    return work.value_bytes * max(sizes, default=0)


def stored_bytes(args: ModelArgs, work: Workload) -> int:
    """Return the bytes of the states of a prompt file: all tokens, and rings after every call."""
    parts = cache_parts(args, work)
    calls = -(-min(work.tokens, args.max_seq_len) // work.step)
    return sum(size * (calls if name.startswith("ring") else 1) for name, size in parts.items())


def call_bytes(args: ModelArgs, work: Workload, queries: int, seen: int) -> int:
    """Estimate the most that PyTorch allocates in one forward call.

    Counted are the tensors that exist at once in the widest layer, and the masks of sdpa.

    Args:
        args: The model.
        work: The workload.
        queries: Tokens per row of the call.
        seen: Tokens per row after it; 0 for the first call of a cache, which reads no slots.
    """
    layers = (
        max(_attention_bytes(one, work, queries, seen), _feed_forward_bytes(one, work, queries))
        for one in args.layers
    )
    return work.rows * max(layers) * 9 // 8  # an eighth more for small tensors


def _attention_bytes(layer: LayerArgs, work: Workload, queries: int, seen: int) -> int:
    """Estimate the attention of a layer on one row: the residual stream and its norm, queries, keys
    and values, and the larger one of what rotary positions and attention itself allocate.
    """
    size, wide, mla = work.value_bytes, max(work.value_bytes, 4), layer.mla
    heads, values = layer.n_heads * layer.head_dim, layer.kv_values_per_token
    slots, per_slot, blocks = max(queries, seen), 0, 0  # per_slot: bytes of copies of one slot
    if seen and 0 < layer.rule.size < seen - SLACK:  # a ring
        slots = layer.rule.size + SLACK + queries
        if queries > SLACK + 1:  # it and the new tokens side by side
            per_slot += size * values
    if mla is not None:
        head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        heads = layer.n_heads * head
        if counts.absorbing_is_cheaper(mla, queries, slots):
            heads += 2 * layer.n_heads * values
        else:  # keys and values of all heads; the fused kernel wants them equally wide
            widths = [head, mla.qk_nope_head_dim, mla.v_head_dim]
            widths += [max(head, mla.v_head_dim)] if head != mla.v_head_dim else []
            per_slot += size * layer.n_heads * sum(widths)
    if seen and work.kv_bits == 8:  # dequantized
        per_slot += size * values
    if layer.attn_softcap is not None or layer.attn_sinks:  # blocks of scores, in float32
        per_slot += wide * values
        blocks = 2 * wide * layer.n_heads * min(_PAIRS, queries * slots)
    elif seen or layer.rule.kind == "window":  # blocks of masks
        blocks = (2 + size) * min(queries, _QUERIES) * slots
    halves = layer.rope is not None and layer.rope.layout == "halves"
    turning = (5 if halves else 3) * wide * heads * queries
    attending = size * heads * queries + per_slot * slots + blocks
    return size * queries * (2 * layer.dim + heads + values) + max(turning, attending)


def _feed_forward_bytes(layer: LayerArgs, work: Workload, queries: int) -> int:
    """Estimate the feed-forward of a layer on one row: its hidden states, or those of experts."""
    gated, moe = (3 if layer.ffn_gated else 2), layer.moe
    width = gated * layer.hidden_dim
    if moe is not None:
        hidden = moe.hidden_dim or 0  # LayerArgs resolves it
        shared = (moe.shared_hidden_dim or hidden) if moe.shared_expert else 0
        routed = moe.top_k * max((1 + gated) * hidden + layer.dim, 4 * layer.dim)
        width = max(gated * shared, routed)
    return queries * work.value_bytes * (width + 4 * layer.dim)


def native_bytes(args: ModelArgs, work: Workload) -> int:
    """Estimate the buffers of a decode step in C++: the rows in float32, and visible slots."""
    widths = []
    for layer in args.layers:
        active = 1 if layer.moe is None else layer.moe.top_k
        hidden = layer.hidden_dim if layer.moe is None else layer.moe.hidden_dim or 0
        heads = 3 * layer.n_heads * layer.head_dim + layer.kv_values_per_token
        widths.append(heads + 4 * layer.dim + active * (2 * hidden + 2 * layer.dim))
    rules = {layer.rule for layer in args.layers}
    seen = sum(min(work.tokens, rule.size or work.tokens) for rule in rules)
    return 4 * work.rows * (max(widths) + seen)


# What the machine has.


def host_bytes_left() -> int | None:
    """Return how many bytes can still be allocated on the host; None if that is unknown.

    It is what Linux reports as available, or what the limits of the control groups of the process
    leave, if that is less.
    """
    known: list[int] = []
    with contextlib.suppress(OSError):
        stated = Path("/proc/meminfo").read_text(encoding="ascii")
        known += [1024 * int(size) for size in re.findall(r"MemAvailable:\s*(\d+)", stated)]
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        known += left_in_groups(Path("/sys/fs/cgroup"), groups)
    return min(known, default=None)


def left_in_groups(root: Path, groups: Sequence[str]) -> list[int]:
    """Return the bytes that the limits of control groups leave.

    Pages of files are counted as free, since Linux drops them first.

    Args:
        root: The folder of all groups. In a container it is that of the container.
        groups: The lines of /proc/self/cgroup: a number, controllers and a path. Version 2 has no
            controllers, version 1 has `memory` and a folder of that name.
    """
    left: list[int] = []
    paths = {
        one.rpartition(":")[2].strip("/") for one in groups if ":memory:" in one or "::" in one
    }
    for folder in {base / path for base in (root, root / "memory") for path in ("", *paths)}:
        for names in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                stat = (folder / "memory.stat").read_text(encoding="ascii")
                files = re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
                left.append(limit - used + max(map(int, files), default=0))
    return left

"""What will be in memory when a model runs, and what would fit, before anything is loaded.

The arithmetic is that of `room.check_memory`. torch is imported for the weights of a folder and for
other devices than the CPU only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transom.base.errors import expect
from transom.checkpoints.describe_model import DescribedModel
from transom.checkpoints.files.layout import weight_files
from transom.inference.decode_args import DEFAULT, DecodeArgs
from transom.planning.layer_plan import BYTES_PER_VALUE
from transom.planning.memory import (
    PREFIX_BYTES,
    PROGRAM_BYTES,
    MemoryPlan,
    Workload,
    host_bytes_left,
    largest,
    largest_context,
    memory_plan,
    weight_counts,
)
from transom.planning.placement import BlockPlacement

if TYPE_CHECKING:
    from transom.checkpoints.load import BeforeWeights, LoadPlan
    from transom.inference.weight_streaming import Offload

MOST_ROWS = 1 << 20


@dataclass(frozen=True)
class MemoryAnswer:
    """The memory of one model and workload.

    Attributes:
        dtype: The dtype of activations, keys and values.
        device: Where the model runs.
        work: The workload.
        plan: Bytes by category.
        placement: Where the blocks are, with offloading.
        left: Bytes that can be allocated on the device now, or that `max_memory` allows; None if
            that is unknown.
        most_tokens: The most tokens per row that fit at this batch size, up to the model's maximum.
            None if `left` is.
        most_rows: The largest batch size that fits at this number of tokens.
        prefix_limit: Bytes that a chat may use beside it for the stored beginnings of prompts: it
            takes half of what is left at most, and models without windows and chunks store none.
    """

    dtype: str
    device: str
    work: Workload
    plan: MemoryPlan
    placement: BlockPlacement | None
    left: int | None
    most_tokens: int | None
    most_rows: int | None
    prefix_limit: int


def memory_answer(
    described: DescribedModel,
    context: int,
    batch: int = 1,
    *,
    decode: DecodeArgs = DEFAULT,
    device: str = "cpu",
    dtype: str | None = None,
    keep_quantized: bool | None = None,
    draft: DescribedModel | None = None,
    offload: Offload | None = None,
) -> MemoryAnswer:
    """Return what a model needs in memory to generate, without loading it.

    Args:
        described: The result of `describe_model`.
        context: Tokens of each row, those of the prompt included.
        batch: Rows that are generated together.
        decode: How the model runs; `kv_bits`, `prefill_step_size` and `compile` count.
        device: As for `load`.
        dtype: As for `load`; without files of weights, None is bfloat16.
        keep_quantized: As for `load`.
        draft: A draft model on the same device, in the dtype of its files.
        offload: As for `load`.

    Raises:
        RequestError: As for `load`, or `context` or `batch` is less than 1, or there is nothing to
            offload.
    """
    expect(context >= 1, "context", context, "1 or more tokens")
    expect(batch >= 1, "batch", batch, "1 or more rows")
    args, more = described.args, dict[str, int]()
    if draft is not None:
        own, _, _, width = _weights(draft, device, None, None)
        room = min(2 * context, draft.args.max_seq_len)
        work = Workload(1, room, width, step=decode.prefill_step_size)
        run = memory_plan(draft.args, work, {})
        more |= {"draft weights": sum(own.values()), "draft cache and buffers": run.total}
    least: dict[str, int] = {}  # weights in memory if as many layers as possible are streamed

    def beside(load: LoadPlan) -> int:
        least.update(load.weights)
        work = decode.workload(batch, context, load.dtype.itemsize, device)
        return memory_plan(args, work, {}, more=more).total

    opened = _weights(described, device, dtype, keep_quantized, beside, offload)
    (sizes, mapped, kind, width), left, made = opened, _left(device), None
    if offload is not None:
        made, mapped = offload.placement, 0
        sizes = {"in memory": made.resident_bytes, "buffer": made.buffer_bytes}
        left = min((n for n in (left, offload.max_memory) if n is not None), default=None)
    elif device == "cpu":
        more["Python and PyTorch"] = PROGRAM_BYTES

    def planned(work: Workload) -> MemoryPlan:
        return memory_plan(args, work, sizes if made is None else least, mapped=mapped, more=more)

    work, tokens, rows = decode.workload(batch, context, width, device), None, None
    if left is not None:
        longest, known = replace(work, tokens=args.max_seq_len), left
        tokens = largest_context(planned, longest, known)
        rows = largest(lambda n: planned(replace(work, rows=n)).needed <= known, MOST_ROWS)
    limit = PREFIX_BYTES if any(layer.rule.size for layer in args.layers) else 0
    plan = replace(planned(work), weights=sizes)
    return MemoryAnswer(kind, device, work, plan, made, left, tokens, rows, limit)


def _weights(
    described: DescribedModel,
    device: str,
    dtype: str | None,
    keep_quantized: bool | None,
    beside: BeforeWeights | None = None,
    offload: Offload | None = None,
) -> tuple[Mapping[str, int], int, str, int]:
    """Return bytes by kind, the mapped ones of them, the dtype, and the bytes of one number."""
    where = described.location
    if where is not None and any(
        (where.model / x).exists() for x in weight_files(where.model).files
    ):
        from transom.base.runtime import dtype_name
        from transom.checkpoints.load import load_plan

        plan = load_plan(where, device, dtype, keep_quantized, beside, offload)
        return plan.weights, plan.mapped_bytes, dtype_name(plan.dtype), plan.dtype.itemsize
    for name, value in (
        ("keep_quantized", keep_quantized),
        ("offload", offload and offload.source),
    ):
        expect(not value, name, value, f"files of weights, not {described.name}")
    kind, widths = dtype or "bfloat16", {**BYTES_PER_VALUE, "float16": 2, "float64": 8}
    expect(kind in widths, "dtype", dtype, ", ".join(widths))
    counts = weight_counts(described.args)
    return {one: n * widths[kind] for one, n in counts.items()}, 0, kind, widths[kind]


def _left(device: str) -> int | None:
    """Return how many bytes can still be allocated on a device; None if that is unknown."""
    if device == "cpu":
        return host_bytes_left()
    from transom.base.runtime import pick_device
    from transom.inference.room import bytes_left

    return bytes_left(pick_device(device))

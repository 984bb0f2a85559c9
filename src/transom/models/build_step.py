"""From the input of a call to the `Step` of its layers: checks, positions, tables, masks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transom.attention.backends import Attend
from transom.attention.mask import Layout, MaskSpec, place_documents
from transom.base.errors import RequestError, expect
from transom.cache.model_cache import ModelCache
from transom.config.layer_args import LayerRule, RopeScaling
from transom.config.model_args import ModelArgs
from transom.layers.attention import temperature_scale
from transom.layers.inputs import TransformerInput
from transom.layers.rope import rotary_table
from transom.layers.step import Context, Step


def build_step(
    args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None, attend: Attend
) -> Step:
    """Check the input of a call and derive everything that its layers share.

    With a cache, room for the tokens is reserved in it.

    Args:
        args: Arguments of the model.
        inputs: The input of the call.
        cache: The cache whose rows the tokens continue, if any.
        attend: The attention backend.

    Raises:
        RequestError: The model can't compute this input. The device has not been waited for.
    """
    check_input(args, inputs, cache)
    rows = inputs.tokens.size(0)
    place = place_tokens(inputs, cache)
    positions_BT = _mark_padding(place.positions_BT.expand(rows, -1), inputs.lengths)
    padded = inputs.lengths is not None or isinstance(inputs.tokens_position, Tensor)
    ropes = {layer.rope for layer in args.layers if layer.rope is not None}
    scalings = {rope.scaling for rope in ropes if rope.scaling and rope.scaling.by_length}
    length = rotary_length(place, inputs, cache, scalings) if scalings else None
    scales = {layer.temperature for layer in args.layers if layer.temperature is not None}
    rules: set[LayerRule] = {layer.rule for layer in args.layers}
    specs = {rule: MaskSpec(rule, positions_BT, place.segments_BT, place.layout) for rule in rules}
    crosses = args.context_dim is not None
    kept = None if cache is None else cache.frequencies
    return Step(
        positions_BT=positions_BT,
        valid_BT=positions_BT >= 0 if padded else None,
        # Tables from the positions before `expand`: where all rows agree, one row broadcasts.
        rope={rope: rotary_table(place.positions_BT, rope, length, kept) for rope in ropes},
        temperature={scale: temperature_scale(place.positions_BT, scale) for scale in scales},
        masks=specs,
        attend=attend,
        context=place_context(inputs),
        context_mask=MaskSpec(LayerRule("full"), positions_BT) if crosses else None,
    )


class Place(NamedTuple):
    """Positions [1 or B, T] of the tokens of a call, segments of packed rows, layout if known."""

    positions_BT: Tensor
    segments_BT: Tensor | None
    layout: Layout | None


def place_tokens(inputs: TransformerInput, cache: ModelCache | None) -> Place:
    """Return the positions that the cache, the packed sizes or the input itself define."""
    rows, count = inputs.tokens.shape
    device = inputs.tokens.device
    offsets_1T = torch.arange(count, device=device)[None]
    padded = inputs.lengths is not None
    if cache is not None:
        # Only in the first call of an empty cache, tokens attend to nothing but each other.
        first = cache.reserve(count, inputs.lengths)
        layout = Layout((count,) * rows, padded=padded) if first else None
        return Place(cache.lengths_B[:, None] + offsets_1T, None, layout)
    if inputs.sizes is not None:
        sizes = packed_sizes(inputs.sizes, rows, count)
        documents = tuple(size for row in sizes for size in row)
        return Place(*place_documents(sizes, device), Layout(documents))
    if isinstance(inputs.tokens_position, Tensor):
        return Place(torch.atleast_2d(inputs.tokens_position.to(device)), inputs.segments, None)
    start = inputs.tokens_position or 0
    return Place(offsets_1T + start, None, Layout((count,) * rows, start, padded))


def packed_sizes(
    sizes: Sequence[int] | Sequence[Sequence[int]], rows: int, count: int
) -> tuple[tuple[int, ...], ...]:
    """Return the document lengths of each row, checked to fill every row of `count` tokens."""
    nested = tuple((size,) if isinstance(size, int) else tuple(size) for size in sizes)
    if all(isinstance(size, int) for size in sizes):
        nested = (tuple(size[0] for size in nested),)
    for row in nested:
        fits = len(nested) == rows and sum(row) == count and min(row) >= 1
        expected = f"{rows} rows of lengths of 1 or more whose sum is {count}"
        expect(fits, "sizes", [list(row) for row in nested], expected)
    return nested


def place_context(inputs: TransformerInput) -> Context | None:
    """Return the context with a position for each of its states, -1 for padding."""
    if inputs.context is None:
        return None
    states_BSC, lengths = inputs.context, inputs.context_lengths
    rows, slots, _ = states_BSC.shape
    positions_BS = torch.arange(slots, device=states_BSC.device).expand(rows, -1)
    if lengths is not None:
        positions_BS = _mark_padding(positions_BS, lengths)
        # Padding may be NaN.
        states_BSC = states_BSC.masked_fill((positions_BS < 0).unsqueeze(-1), 0.0)
    return Context(states_BSC, positions_BS)


def rotary_length(
    place: Place,
    inputs: TransformerInput,
    cache: ModelCache | None,
    scalings: Collection[RopeScaling],
) -> int:
    """Return the sequence length from which `dynamic` and `longrope` choose frequencies.

    With a cache it is the capacity, since all keys of a cache must be rotated alike. Otherwise it
    is the longest sequence of the call.
    """
    if cache is not None:
        return cache.capacity
    if place.layout is None:
        return int(_mark_padding(place.positions_BT, inputs.lengths).max()) + 1
    if inputs.lengths is not None:
        return place.layout.start + int(inputs.lengths.max())
    lengths = {place.layout.start + size for size in place.layout.documents}
    for scaling in scalings if inputs.sizes is not None else ():
        if len({scaling.chosen_by(length) for length in lengths}) > 1:
            raise RequestError(
                f"sizes: got documents of up to {max(lengths)} tokens; expected at most "
                f"{scaling.original_max_seq_len} tokens in a packed call, since {scaling.kind} "
                f"scaling chooses frequencies from the length of a document"
            )
    return max(lengths)


def _mark_padding(positions_BT: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the positions with -1 from `lengths` [B] on in each row."""
    if lengths is None:
        return positions_BT
    offsets_T = torch.arange(positions_BT.size(-1), device=positions_BT.device)
    return positions_BT.masked_fill(offsets_T >= lengths.to(offsets_T.device)[:, None], -1)


def check_input(args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None) -> None:
    """Raise a `RequestError` for an input that can't be computed, without asking the device."""
    tokens, sizes, lengths = inputs.tokens, inputs.sizes, inputs.lengths
    fits = tokens.ndim == 2 and tokens.size(1) > 0
    expect(fits, "tokens", list(tokens.shape), "a shape [batch, tokens] with 1 token or more")
    replaced = lengths is not None or inputs.tokens_position is not None
    if sizes is not None and replaced:
        raise RequestError("sizes: got lengths or tokens_position too; expected sizes alone")
    if lengths is not None:
        fits = lengths.shape == tokens.shape[:1]
        expect(fits, "lengths", list(lengths.shape), f"a shape [{len(tokens)}]")
    expect(inputs.logits in ("all", "last", "none"), "logits", inputs.logits, "all, last or none")
    check_positions(inputs)
    check_segments(inputs)
    check_context(args, inputs, cache)
    if inputs.image_embedding is not None and args.vision_args is None:
        raise RequestError("image_embedding: got one; expected a model with vision_args")
    if args.head is not None and (cache is not None or sizes is not None):
        raise RequestError(
            f"head: got {args.head.kind!r} with a cache or sizes; expected one sequence per row"
        )
    if cache is None:
        count = tokens.size(1)
        if sizes is not None:
            flat = (size if isinstance(size, int) else max(size, default=0) for size in sizes)
            count = max(flat, default=0)
        most = args.max_seq_len
        expect(count <= most, "tokens", count, f"at most max_seq_len = {most} per sequence")
        return
    if sizes is not None:
        raise RequestError("sizes: got packed rows with a cache; expected one sequence per row")
    if inputs.tokens_position is not None:
        raise RequestError("tokens_position: got positions with a cache; expected it to count them")
    fits = tokens.size(0) == cache.batch_size
    expect(fits, "tokens", list(tokens.shape), f"the cache's {cache.batch_size} rows")


def check_positions(inputs: TransformerInput) -> None:
    """Raise a `RequestError` unless `tokens_position` is a start or one integer per token.

    Another shape would broadcast, and many tokens would get the same position.
    """
    given, (rows, count) = inputs.tokens_position, inputs.tokens.shape
    if isinstance(given, Tensor):
        fits = tuple(given.shape) in ((count,), (1, count), (rows, count))
        fits = fits and given.dtype in (torch.int64, torch.int32)
        found = f"{given.dtype} {list(given.shape)}"
        expect(fits, "tokens_position", found, f"integers [{count}] or [{rows}, {count}]")
    elif given is not None:
        expect(given >= 0, "tokens_position", given, "an integer of 0 or more")


def check_segments(inputs: TransformerInput) -> None:
    """Raise a `RequestError` unless `segments` has a document for each token with a position."""
    given, shape = inputs.segments, inputs.tokens.shape
    if given is None:
        return
    placed = isinstance(inputs.tokens_position, Tensor)
    fits = placed and given.shape == shape and given.dtype in (torch.int64, torch.int32)
    expected = f"integers {list(shape)} with a tensor tokens_position"
    expect(fits, "segments", f"{given.dtype} {list(given.shape)}", expected)


def check_context(args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None) -> None:
    """Raise a `RequestError` unless a context is given exactly where the model needs one."""
    given, lengths, rows = inputs.context, inputs.context_lengths, inputs.tokens.size(0)
    if lengths is not None and given is None:
        raise RequestError("context_lengths: got lengths without a context; expected both")
    if args.context_dim is None:
        if given is not None:
            raise RequestError("context: got one; expected a model with context_dim")
        return
    cached = cache is not None and cache.has_context
    if cached and given is not None:
        raise RequestError("context: got one again; expected it with the first tokens only")
    shape = f"[{rows}, states, {args.context_dim}]"
    if given is None:
        expect(cached, "context", None, f"{shape}, since the model reads a context")
        return
    fits = given.ndim == 3 and given.size(0) == rows and given.size(2) == args.context_dim
    expect(fits, "context", list(given.shape), f"a shape {shape}")
    if lengths is not None:
        fits = lengths.shape == (rows,)
        expect(fits, "context_lengths", list(lengths.shape), f"a shape [{rows}]")

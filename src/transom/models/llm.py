"""The model: embeddings, blocks, norm, output. One class for every family; `ModelArgs` says which.

Shape letters: B batch, T new tokens, S cached slots, D model dim, N query heads, K key/value heads,
H head dim, F hidden dim, E experts, A active experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.attention.backends import Attend, auto
from transom.attention.mask import Layout, MaskSpec, positions_from_sizes, segments_from_sizes
from transom.base.errors import RequestError
from transom.cache.model_cache import ModelCache
from transom.config.model_args import HeadArgs, LayerRule, ModelArgs, RopeScaling
from transom.layers.attention import temperature_scale
from transom.layers.block import TransformerBlock
from transom.layers.initial import init_weights, start_at_chance
from transom.layers.linear import Embedding, Linear
from transom.layers.moe import RouterStatistics
from transom.layers.norm import make_norm
from transom.layers.rope import rotary_table
from transom.layers.step import Context, MaskedEmbedding, Step
from transom.models.vision import VisionEmbeddings
from transom.names.load_hook import load_hook

__all__ = [
    "LLM",
    "MaskedEmbedding",
    "TransformerBlock",
    "TransformerInput",
    "TransformerOutput",
    "build_step",
]


@dataclass(frozen=True)
class TransformerInput:
    """One call: `tokens` [B, T], and optionally where they stand.

    `tokens_position` is a start (int), [T] or [B, T], -1 for padding; `sizes` the document lengths
    of packed rows (a flat list when B is 1, else one list per row); `lengths` [B] the real tokens
    of right-padded rows; `context` [B, S, context_dim] is what cross-attention looks at (all
    documents of a packed row share it), `context_lengths` [B] its real positions; with a cache it
    is given once, with the first tokens. `logits` says which positions get logits.
    """

    tokens: Tensor
    tokens_position: int | Tensor | None = None
    image_embedding: MaskedEmbedding | None = None
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None
    lengths: Tensor | None = None
    context: Tensor | None = None
    context_lengths: Tensor | None = None
    logits: Literal["all", "last", "none"] = "all"


@dataclass(frozen=True)
class TransformerOutput:
    """`logits` [B, T, V] ([B, 1, V] for "last", None for "none"), normed hidden states [B, T, D],
    routers.

    A model with a head has `pooled_BD`, one vector per row, and logits [B, labels] or None.
    """

    logits: Tensor | None
    hidden_BTD: Tensor
    router: tuple[RouterStatistics, ...] = ()
    pooled_BD: Tensor | None = None


class LLM(nn.Module):
    """Decoder-only language model; `attend` is the attention backend and may be replaced at any
    time.

    The constructor draws all weights from torch's generator, by the rules of `init_weights`. On the
    meta device it draws nothing.
    """

    attend: Attend = staticmethod(auto)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.generation_settings: dict[
            str, Any
        ] = {}  # of the folder it was loaded from; `save` writes them again
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.vision = (
            VisionEmbeddings(args.vision_args, args.dim) if args.vision_args is not None else None
        )
        self.layers = nn.ModuleList(TransformerBlock(layer) for layer in args.layers)
        self.norm = make_norm(args.norm, args.dim, args.norm_eps)
        outputs = args.vocab_size if args.head is None else args.head.outputs
        self.output = Linear(args.dim, outputs) if outputs and not args.tie_embeddings else None
        start_at_chance(self, tied=self.output is None)
        self.register_load_state_dict_pre_hook(partial(load_hook, args))

    def forward(
        self, inputs: TransformerInput, cache: ModelCache | None = None, inference: bool = False
    ) -> TransformerOutput:
        """Logits and hidden states; with `cache`, tokens continue its rows, and no gradient is
        recorded.

        `inference` records none either, and makes tensors that no later graph may use.
        """
        # Stored keys are detached: gradients through a cached call would silently lack their share.
        quiet = torch.no_grad() if cache is not None else contextlib.nullcontext()
        with torch.inference_mode() if inference else quiet:
            step = build_step(self.args, inputs, cache, self.attend)
            h_BTD = self.embed(inputs)
            if (
                step.valid_BT is not None
            ):  # a hidden key still meets a weight of 0, and 0 * NaN is NaN
                h_BTD = h_BTD.masked_fill(~step.valid_BT.unsqueeze(-1), 0.0)
            router = []
            for index, block in enumerate(self.layers):
                h_BTD, statistics = block(
                    h_BTD, step, cache.layers[index] if cache is not None else None
                )
                if statistics is not None:
                    router.append(statistics)
            if cache is not None:
                cache.advance(step.positions_BT, padded=inputs.lengths is not None)
            h_BTD = self.norm(h_BTD)
            if self.args.head is not None:
                return self._headed(h_BTD, step, self.args.head, tuple(router))
            return TransformerOutput(self.unembed(h_BTD, inputs, step), h_BTD, tuple(router))

    def _headed(
        self, h_BTD: Tensor, step: Step, head: HeadArgs, router: tuple[RouterStatistics, ...]
    ) -> TransformerOutput:
        pooled_BD = pool(h_BTD, step.positions_BT, head.pooling)
        if head.kind == "embedding" and head.normalize:
            pooled_BD = F.normalize(pooled_BD.float(), dim=-1).to(pooled_BD.dtype)
        logits = None if self.output is None else self.output(pooled_BD)
        return TransformerOutput(logits, h_BTD, router, pooled_BD)

    def embed(self, inputs: TransformerInput) -> Tensor:
        """Token embeddings [B, T, D], with masked rows replaced by what `image_embedding` holds."""
        h_BTD = self.tok_embeddings(inputs.tokens)
        if self.args.embedding_scale is not None:
            # Rounded to the weights' dtype first, as Gemma was trained: in bfloat16 it matters.
            h_BTD = h_BTD * float(
                torch.tensor(self.args.embedding_scale, dtype=h_BTD.dtype, device="cpu")
            )
        if inputs.image_embedding is None:
            return h_BTD
        rows, mask = inputs.image_embedding.embedding, inputs.image_embedding.mask
        if rows.shape != h_BTD.shape or mask.shape != h_BTD.shape[:2] or mask.dtype != torch.bool:
            raise RequestError(
                f"image_embedding {tuple(rows.shape)} with mask {mask.dtype} "
                f"{tuple(mask.shape)}: expected "
                f"{tuple(h_BTD.shape)} with bool {tuple(h_BTD.shape[:2])}"
            )
        return torch.where(mask.unsqueeze(-1), rows.to(h_BTD.dtype), h_BTD)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Rows [tiles, patches, D] of image tiles [tiles, C, S, S], ready to stand for their
        tokens.
        """
        if self.vision is None:
            raise RequestError("images: this is a text model; expected a model with vision_args")
        rows: Tensor = self.vision(pixels)
        return rows

    def unembed(self, h_BTD: Tensor, inputs: TransformerInput, step: Step) -> Tensor | None:
        """Logits of the positions asked for."""
        if inputs.logits == "none":
            return None
        if inputs.logits == "last":
            h_BTD = pool(h_BTD, step.positions_BT, "last").unsqueeze(1)
        return self.project(h_BTD)

    def project(self, h_D: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D]."""
        if self.output is None:
            # Embeddings trained beside frozen halves are wider than these.
            return self.finish_logits(F.linear(h_D, self.tok_embeddings.weight.to(h_D.dtype)))
        return self.finish_logits(
            self.output(h_D)
        )  # the leaf itself: it may carry an adapter or be quantized

    def finish_logits(self, raw_V: Tensor) -> Tensor:
        """The scale and the soft cap of logits [..., V], where the model has them."""
        scale, cap = self.args.logit_factor, self.args.logit_softcap
        if scale != 1.0:
            raw_V = raw_V * scale
        return raw_V if cap is None else torch.tanh(raw_V / cap) * cap

    def make_cache(
        self, batch_size: int | None = None, capacity: int | None = None, *, slack: int = 32
    ) -> ModelCache:
        """An empty cache for this model, on its device."""
        device = self.tok_embeddings.weight.device
        return ModelCache.build(self.args, batch_size, capacity, slack=slack, device=device)

    def init_weights(self, seed: int = 0) -> None:
        """Fill all weights in place, repeatably: the same seed gives the same model on every
        device.

        Matrices that write into the residual stream and an untied output start at zero, the others
        uniform with standard deviation 1 / (2 sqrt(fan in)): at step 0 every block is the identity,
        and the loss ln V. A tied output starts higher, since each token then predicts itself.
        """
        init_weights(
            self, seed, plus_one=self.args.norm == "rms_plus_one", tied=self.output is None
        )


def pool(h_BTD: Tensor, positions_BT: Tensor, kind: Literal["mean", "last"]) -> Tensor:
    """One vector [B, D] per row: the mean over its tokens, or its last one; padding may stand on
    either side.
    """
    valid_BT = positions_BT >= 0
    if kind == "mean":
        wide = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32)) * valid_BT.unsqueeze(-1)
        return (wide.sum(1) / valid_BT.sum(1, keepdim=True).clamp(min=1)).to(h_BTD.dtype)
    offsets_T = torch.arange(h_BTD.size(1), device=h_BTD.device)
    last_B = torch.where(valid_BT, offsets_T, 0).amax(1)
    return h_BTD.gather(1, last_B[:, None, None].expand(-1, 1, h_BTD.size(-1))).squeeze(1)


class Place(NamedTuple):
    """Where the tokens of a call stand: positions [1 or B, T], segments of packed rows, layout if
    known.
    """

    positions_BT: Tensor
    segments_BT: Tensor | None
    layout: Layout | None


def build_step(
    args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None, attend: Attend
) -> Step:
    """Positions, segments, rotary tables and mask specs of one call, from what the input says."""
    check_input(args, inputs, cache)
    rows, count = inputs.tokens.shape
    place = place_tokens(inputs, cache)
    positions_BT = place.positions_BT.expand(rows, -1)
    if inputs.lengths is not None:
        offsets_T = torch.arange(count, device=positions_BT.device)
        positions_BT = positions_BT.masked_fill(
            offsets_T >= inputs.lengths.to(offsets_T.device)[:, None], -1
        )
    padded = inputs.lengths is not None or isinstance(inputs.tokens_position, Tensor)
    ropes = {layer.rope for layer in args.layers if layer.rope is not None}
    rules: set[LayerRule] = {layer.rule for layer in args.layers}
    scalings = {
        rope.scaling for rope in ropes if rope.scaling is not None and rope.scaling.by_length
    }
    length = rotary_length(place, inputs, cache, scalings) if scalings else None
    scales = {layer.temperature for layer in args.layers if layer.temperature is not None}
    return Step(
        positions_BT=positions_BT,
        valid_BT=positions_BT >= 0 if padded else None,
        # Tables from the unexpanded positions: where all rows agree, one row broadcasts.
        rope={rope: rotary_table(place.positions_BT, rope, length) for rope in ropes},
        temperature={scale: temperature_scale(place.positions_BT, scale) for scale in scales},
        masks={
            rule: MaskSpec(rule, positions_BT, place.segments_BT, place.layout) for rule in rules
        },
        attend=attend,
        context=place_context(inputs),
        context_mask=None
        if args.context_dim is None
        else MaskSpec(LayerRule("full"), positions_BT),
    )


def place_context(inputs: TransformerInput) -> Context | None:
    """The context with a position for each of its rows, -1 behind `context_lengths`."""
    if inputs.context is None:
        return None
    rows, slots, _ = inputs.context.shape
    positions_BS = torch.arange(slots, device=inputs.context.device).expand(rows, -1)
    states_BSC = inputs.context
    if inputs.context_lengths is not None:
        positions_BS = positions_BS.masked_fill(positions_BS >= inputs.context_lengths[:, None], -1)
        states_BSC = states_BSC.masked_fill(
            (positions_BS < 0).unsqueeze(-1), 0.0
        )  # padding may be NaN
    return Context(states_BSC, positions_BS)


def rotary_length(
    place: Place,
    inputs: TransformerInput,
    cache: ModelCache | None,
    scalings: Collection[RopeScaling],
) -> int:
    """The length that `dynamic` and `longrope` frequencies are chosen by: a cache's capacity, else
    the longest.
    """
    if cache is not None:  # chosen once, or stored keys would be rotated otherwise than new ones
        return cache.capacity
    if place.layout is None:
        positions_BT = place.positions_BT
        if inputs.lengths is not None:
            offsets_T = torch.arange(positions_BT.size(-1), device=positions_BT.device)
            positions_BT = positions_BT.masked_fill(
                offsets_T >= inputs.lengths.to(offsets_T.device)[:, None], -1
            )
        return int(positions_BT.max()) + 1
    if inputs.lengths is not None:
        return place.layout.start + int(inputs.lengths.max())
    lengths = {place.layout.start + size for size in place.layout.documents}
    for scaling in scalings if inputs.sizes is not None else ():
        if len({scaling.chosen_by(length) for length in lengths}) > 1:
            raise RequestError(
                f"sizes up to {max(lengths)} tokens: {scaling.kind} scaling chooses frequencies "
                f"by a document's length; accepted in a packed call are documents of at most "
                f"{scaling.original_max_seq_len} tokens"
            )
    return max(lengths)


def place_tokens(inputs: TransformerInput, cache: ModelCache | None) -> Place:
    """Positions from the one that counts them: the cache, packed sizes, explicit positions, or a
    start.
    """
    rows, count = inputs.tokens.shape
    device = inputs.tokens.device
    offsets_1T = torch.arange(count, device=device)[None]
    padded = inputs.lengths is not None
    if cache is not None:
        fresh = cache.claim(
            count, inputs.lengths
        )  # only an empty cache's first call sees its own tokens alone
        layout = Layout((count,) * rows, padded=padded) if fresh else None
        return Place(cache.lengths_B[:, None] + offsets_1T, None, layout)
    if inputs.sizes is not None:
        sizes = packed_sizes(inputs.sizes, rows, count)
        positions_BT = torch.stack([positions_from_sizes(row, device) for row in sizes])
        segments_BT = torch.stack([segments_from_sizes(row, device) for row in sizes])
        return Place(
            positions_BT, segments_BT, Layout(tuple(size for row in sizes for size in row))
        )
    if isinstance(inputs.tokens_position, Tensor):
        return Place(torch.atleast_2d(inputs.tokens_position.to(device)), None, None)
    start = inputs.tokens_position or 0
    return Place(offsets_1T + start, None, Layout((count,) * rows, start, padded))


def check_input(args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None) -> None:
    """Refuse what cannot be computed, in one sentence, without asking the device."""
    if inputs.tokens.ndim != 2:
        raise RequestError(
            f"tokens of shape {tuple(inputs.tokens.shape)}: expected [batch, tokens]"
        )
    if inputs.tokens.size(1) == 0:
        raise RequestError("tokens: none given; expected one or more per row")
    if inputs.sizes is not None and (
        inputs.lengths is not None or inputs.tokens_position is not None
    ):
        raise RequestError(
            "sizes: valid only without lengths and tokens_position, which they replace"
        )
    if inputs.lengths is not None and inputs.lengths.shape != inputs.tokens.shape[:1]:
        raise RequestError(
            f"lengths of shape {tuple(inputs.lengths.shape)}: expected one per row of tokens"
        )
    if inputs.logits not in ("all", "last", "none"):
        raise RequestError(f"logits: got {inputs.logits!r}; expected all, last or none")
    check_positions(inputs)
    check_context(args, inputs, cache)
    if inputs.image_embedding is not None and args.vision_args is None:
        raise RequestError(
            "image_embedding: this is a text model; expected a model with vision_args"
        )
    if args.head is not None and (cache is not None or inputs.sizes is not None):
        raise RequestError(
            f"head: got {args.head.kind!r}; expected one whole sequence per row, no cache, no sizes"
        )
    if cache is None:
        count = inputs.tokens.size(1)
        if inputs.sizes is not None:
            flat = (
                size if isinstance(size, int) else max(size, default=0) for size in inputs.sizes
            )
            count = max(flat, default=0)
        if count > args.max_seq_len:
            raise RequestError(
                f"{count} tokens: max_seq_len = {args.max_seq_len} is the longest sequence accepted"
            )
        return
    if inputs.sizes is not None:
        raise RequestError(
            "sizes: packed rows are valid only without a cache, since one row is one sequence there"
        )
    if inputs.tokens_position is not None:
        raise RequestError(
            "tokens_position: valid only without a cache, which counts positions itself"
        )
    if inputs.tokens.size(0) != cache.batch_size:
        raise RequestError(
            f"tokens have {inputs.tokens.size(0)} rows: this cache was built for {cache.batch_size}"
        )


def check_positions(inputs: TransformerInput) -> None:
    """A start, or one whole number per token; another shape would broadcast to the same place for
    many tokens.
    """
    given, (rows, count) = inputs.tokens_position, inputs.tokens.shape
    if isinstance(given, Tensor):
        fits = tuple(given.shape) in ((count,), (1, count), (rows, count))
        if not fits or given.dtype not in (torch.int64, torch.int32):
            found = f"{given.dtype} of shape {tuple(given.shape)}"
            raise RequestError(
                f"tokens_position: {found}; expected whole numbers [{count}] or [{rows}, {count}]"
            )
    elif given is not None and given < 0:
        raise RequestError(f"tokens_position: got {given}; expected a start of 0 or more")


def check_context(args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None) -> None:
    """A context where the model attends to one and has none yet, and nowhere else."""
    given, held = inputs.context, cache is not None and cache.has_context
    if inputs.context_lengths is not None and given is None:
        raise RequestError("context_lengths: valid only together with a context")
    if args.context_dim is None:
        if given is not None:
            raise RequestError(
                "context: accepted by a model with context_dim, whose blocks attend to one"
            )
        return
    if held and given is not None:
        raise RequestError(
            "context: this cache holds one already; expected one, with a request's first tokens"
        )
    if not held and given is None:
        raise RequestError(
            f"context: absent; expected [batch, slots, {args.context_dim}], since blocks read it"
        )
    if given is not None:
        rows = inputs.tokens.size(0)
        if given.ndim != 3 or given.size(0) != rows or given.size(2) != args.context_dim:
            expected = f"expected [{rows}, slots, {args.context_dim}]"
            raise RequestError(f"context of shape {tuple(given.shape)}: {expected}")
        lengths = inputs.context_lengths
        if lengths is not None and lengths.shape != (rows,):
            raise RequestError(
                f"context_lengths of shape {tuple(lengths.shape)}: expected one per row"
            )


def packed_sizes(
    sizes: Sequence[int] | Sequence[Sequence[int]], rows: int, count: int
) -> tuple[tuple[int, ...], ...]:
    """Document lengths per row, checked to fill every row exactly."""
    nested = tuple((size,) if isinstance(size, int) else tuple(size) for size in sizes)
    if all(isinstance(size, int) for size in sizes):
        nested = (tuple(size[0] for size in nested),)
    for row in nested:
        if len(nested) != rows or sum(row) != count or min(row) < 1:
            raise RequestError(
                f"sizes: got {[list(row) for row in nested]}; expected {rows} rows of lengths "
                f"that sum to {count}"
            )
    return nested

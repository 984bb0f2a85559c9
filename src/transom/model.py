"""The model: embeddings, blocks, norm, output. One class for every family; `ModelArgs` says which.

Shape letters: B batch, T new tokens, S cached slots, D model dim, N query heads, K key/value heads, H head dim,
F hidden dim, E experts, A active experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.args import LayerArgs, LayerRule, ModelArgs
from transom.attend.attend import Attend
from transom.attend.mask import Layout, MaskSpec, positions_from_sizes, segments_from_sizes
from transom.attend.sdpa import sdpa
from transom.cache.model_cache import ModelCache
from transom.errors import RequestError
from transom.layers.attention import Attention, LayerCacheLike, temperature_scale
from transom.layers.feed_forward import FeedForward
from transom.layers.linear import Embedding, Linear
from transom.layers.moe import MoE, RouterStatistics
from transom.layers.norm import RMSNorm
from transom.layers.rope import rotary_table
from transom.layers.step import Step


@dataclass(frozen=True)
class MaskedEmbedding:
    """Rows that replace token embeddings: `embedding` [B, T, D] where `mask` [B, T] is True."""

    embedding: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TransformerInput:
    """One call: `tokens` [B, T], and optionally where they stand.

    `tokens_position` is a start (int), [T] or [B, T], -1 for padding; `sizes` the document lengths of packed
    rows (a flat list when B is 1, else one list per row); `lengths` [B] the real tokens of right-padded rows;
    `logits` which positions get logits.
    """

    tokens: Tensor
    tokens_position: int | Tensor | None = None
    image_embedding: MaskedEmbedding | None = None
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None
    lengths: Tensor | None = None
    logits: Literal["all", "last", "none"] = "all"


@dataclass(frozen=True)
class TransformerOutput:
    """`logits` [B, T, V] ([B, 1, V] for "last", None for "none"), normed hidden states [B, T, D], routers."""

    logits: Tensor | None
    hidden_BTD: Tensor
    router: tuple[RouterStatistics, ...] = ()


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, layer: LayerArgs) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(layer.dim, layer.norm_eps)
        self.attention = Attention(layer)
        self.ffn_norm = RMSNorm(layer.dim, layer.norm_eps)
        self.feed_forward = MoE(layer) if layer.moe else FeedForward(layer.dim, layer.hidden_dim)

    def forward(
        self, x_BTD: Tensor, step: Step, cache: LayerCacheLike | None = None
    ) -> tuple[Tensor, RouterStatistics | None]:
        h_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), step, cache)
        normed_BTD = self.ffn_norm(h_BTD)
        if isinstance(self.feed_forward, MoE):
            y_BTD, statistics = self.feed_forward(normed_BTD, step.valid_BT)
            return h_BTD + y_BTD, statistics
        return h_BTD + self.feed_forward(normed_BTD), None


class LLM(nn.Module):
    """Decoder-only language model; `attend` is the attention backend and may be replaced at any time."""

    attend: Attend = staticmethod(sdpa)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(layer) for layer in args.layers)
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = None if args.tie_embeddings else Linear(args.dim, args.vocab_size)

    def forward(
        self, inputs: TransformerInput, cache: ModelCache | None = None, inference: bool = False
    ) -> TransformerOutput:
        """Logits and hidden states; with `cache`, tokens continue its rows, and no gradient is recorded.

        `inference` records none either, and makes tensors that no later graph may use.
        """
        # Stored keys are detached: gradients through a cached call would silently lack their share.
        quiet = torch.no_grad() if cache is not None else contextlib.nullcontext()
        with torch.inference_mode() if inference else quiet:
            step = build_step(self.args, inputs, cache, self.attend)
            h_BTD = self.embed(inputs)
            if step.valid_BT is not None:  # a hidden key still meets a weight of 0, and 0 * NaN is NaN
                h_BTD = h_BTD.masked_fill(~step.valid_BT.unsqueeze(-1), 0.0)
            router = []
            for index, block in enumerate(self.layers):
                h_BTD, statistics = block(h_BTD, step, cache.layers[index] if cache is not None else None)
                if statistics is not None:
                    router.append(statistics)
            if cache is not None:
                cache.advance(step.positions_BT, padded=inputs.lengths is not None)
            h_BTD = self.norm(h_BTD)
            return TransformerOutput(self.unembed(h_BTD, inputs, step), h_BTD, tuple(router))

    def embed(self, inputs: TransformerInput) -> Tensor:
        """Token embeddings [B, T, D], with masked rows replaced by what `image_embedding` holds."""
        h_BTD = self.tok_embeddings(inputs.tokens)
        if inputs.image_embedding is None:
            return h_BTD
        rows, mask = inputs.image_embedding.embedding, inputs.image_embedding.mask
        if rows.shape != h_BTD.shape or mask.shape != h_BTD.shape[:2]:
            raise RequestError(
                f"image_embedding {tuple(rows.shape)} with mask {tuple(mask.shape)}: accepted is "
                f"{tuple(h_BTD.shape)} with {tuple(h_BTD.shape[:2])}"
            )
        return torch.where(mask.unsqueeze(-1), rows.to(h_BTD.dtype), h_BTD)

    def unembed(self, h_BTD: Tensor, inputs: TransformerInput, step: Step) -> Tensor | None:
        """Logits of the positions asked for."""
        if inputs.logits == "none":
            return None
        if inputs.logits == "last":
            offsets_T = torch.arange(h_BTD.size(1), device=h_BTD.device)
            last_B = torch.where(step.positions_BT >= 0, offsets_T, 0).amax(1)  # padding may stand on either side
            h_BTD = h_BTD.gather(1, last_B[:, None, None].expand(-1, 1, h_BTD.size(-1)))
        return self.project(h_BTD)

    def project(self, h_D: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D]."""
        if self.output is None:
            return F.linear(h_D, self.tok_embeddings.weight)
        return self.output(h_D)  # the leaf itself, not its weight: it may carry an adapter or be quantized

    def make_cache(
        self, batch_size: int | None = None, capacity: int | None = None, *, slack: int = 32
    ) -> ModelCache:
        """An empty cache for this model, on its device."""
        device = self.tok_embeddings.weight.device
        return ModelCache.build(self.args, batch_size, capacity, slack=slack, device=device)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill all weights in place, repeatably: the same seed gives the same model on every device.

        Matrices that write into the residual stream and an untied output start at zero, the others uniform
        with standard deviation 1 / (2 sqrt(fan in)): at step 0 every block is the identity, and the loss ln V.
        A tied output starts higher, since each token then predicts itself.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            leaf = name.split(".")[-2]
            if weight.ndim == 1:
                weight.fill_(1.0)
            elif leaf in ("wo", "w_out", "output"):
                weight.zero_()
            else:
                if leaf == "tok_embeddings":  # tied, it is the output too: N(0, 1) would start at loss ~ dim
                    draw = torch.randn(weight.shape, generator=generator) * (0.02 if self.output is None else 1.0)
                else:
                    bound = 0.5 * (3.0 / weight.shape[-1]) ** 0.5
                    draw = (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
                weight.copy_(draw)


class Place(NamedTuple):
    """Where the tokens of a call stand: positions [1 or B, T], segments of packed rows, layout if known."""

    positions_BT: Tensor
    segments_BT: Tensor | None
    layout: Layout | None


def build_step(args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None, attend: Attend) -> Step:
    """Positions, segments, rotary tables and mask specs of one call, from what the input says."""
    check_input(args, inputs, cache)
    rows, count = inputs.tokens.shape
    place = place_tokens(inputs, cache)
    positions_BT = place.positions_BT.expand(rows, -1)
    if inputs.lengths is not None:
        offsets_T = torch.arange(count, device=positions_BT.device)
        positions_BT = positions_BT.masked_fill(offsets_T >= inputs.lengths.to(offsets_T.device)[:, None], -1)
    padded = inputs.lengths is not None or isinstance(inputs.tokens_position, Tensor)
    ropes = {layer.rope for layer in args.layers if layer.rope is not None}
    rules: set[LayerRule] = {layer.rule for layer in args.layers}
    scales = {layer.temperature for layer in args.layers if layer.temperature is not None}
    return Step(
        positions_BT=positions_BT,
        valid_BT=positions_BT >= 0 if padded else None,
        # Tables from the unexpanded positions: where all rows agree, one row broadcasts.
        rope={rope: rotary_table(place.positions_BT, rope) for rope in ropes},
        temperature={scale: temperature_scale(place.positions_BT, scale) for scale in scales},
        masks={rule: MaskSpec(rule, positions_BT, place.segments_BT, place.layout) for rule in rules},
        attend=attend,
    )


def place_tokens(inputs: TransformerInput, cache: ModelCache | None) -> Place:
    """Positions from the one that counts them: the cache, packed sizes, explicit positions, or a start."""
    rows, count = inputs.tokens.shape
    device = inputs.tokens.device
    offsets_1T = torch.arange(count, device=device)[None]
    padded = inputs.lengths is not None
    if cache is not None:
        fresh = cache.claim(count)  # only an empty cache's first call sees its own tokens alone
        layout = Layout((count,) * rows, padded=padded) if fresh else None
        return Place(cache.lengths_B[:, None] + offsets_1T, None, layout)
    if inputs.sizes is not None:
        sizes = packed_sizes(inputs.sizes, rows, count)
        positions_BT = torch.stack([positions_from_sizes(row, device) for row in sizes])
        segments_BT = torch.stack([segments_from_sizes(row, device) for row in sizes])
        return Place(positions_BT, segments_BT, Layout(tuple(size for row in sizes for size in row)))
    if isinstance(inputs.tokens_position, Tensor):
        return Place(torch.atleast_2d(inputs.tokens_position.to(device)), None, None)
    start = inputs.tokens_position or 0
    return Place(offsets_1T + start, None, Layout((count,) * rows, start, padded))


def check_input(args: ModelArgs, inputs: TransformerInput, cache: ModelCache | None) -> None:
    """Refuse what cannot be computed, in one sentence, without asking the device."""
    if inputs.tokens.ndim != 2:
        raise RequestError(f"tokens of shape {tuple(inputs.tokens.shape)}: accepted is [batch, tokens]")
    if inputs.tokens.size(1) == 0:
        raise RequestError("tokens: none given; accepted is one or more per row")
    if inputs.sizes is not None and (inputs.lengths is not None or inputs.tokens_position is not None):
        raise RequestError("sizes: accepted without lengths and tokens_position, which they replace")
    if inputs.lengths is not None and inputs.lengths.shape != inputs.tokens.shape[:1]:
        raise RequestError(f"lengths of shape {tuple(inputs.lengths.shape)}: accepted is one per row of tokens")
    if isinstance(inputs.tokens_position, int) and inputs.tokens_position < 0:
        raise RequestError(f"tokens_position = {inputs.tokens_position}: accepted is a start of 0 or more")
    if cache is None:
        count = inputs.tokens.size(1)
        if inputs.sizes is not None:
            flat = (size if isinstance(size, int) else max(size, default=0) for size in inputs.sizes)
            count = max(flat, default=0)
        if count > args.max_seq_len:
            raise RequestError(f"{count} tokens: max_seq_len = {args.max_seq_len} is the longest sequence accepted")
        return
    if inputs.sizes is not None:
        raise RequestError("sizes: packed rows are accepted without a cache, since one row is one sequence there")
    if inputs.tokens_position is not None:
        raise RequestError("tokens_position: accepted without a cache, which counts positions itself")
    if inputs.tokens.size(0) != cache.batch_size:
        raise RequestError(f"tokens have {inputs.tokens.size(0)} rows: this cache was built for {cache.batch_size}")


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
                f"sizes = {[list(row) for row in nested]}: accepted is {rows} rows of lengths that sum to {count}"
            )
    return nested

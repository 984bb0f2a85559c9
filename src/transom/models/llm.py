"""The language model: embeddings, blocks, norm and output. Every model family is this one class.

`ModelArgs` describes the family. Shape letters: B batch, T new tokens, S cached slots, D model dim,
N query heads, K key/value heads, H head dim, F hidden dim, E experts, A active experts,
V vocabulary.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.attention.backends import Attend, auto
from transom.base.errors import RequestError
from transom.cache.model_cache import ModelCache
from transom.config.layer_args import HeadArgs
from transom.config.model_args import ModelArgs
from transom.layers.block import TransformerBlock
from transom.layers.initial import Copy, init_weights, start_at_chance
from transom.layers.inputs import TransformerInput, TransformerOutput
from transom.layers.linear import Embedding, Linear, tied_output
from transom.layers.moe import RouterStatistics
from transom.layers.norm import make_norm
from transom.layers.step import Step
from transom.models.build_step import build_step
from transom.models.vision import VisionEmbeddings
from transom.names.load_hook import load_hook
from transom.planning.memory import SLACK


class Runner(Protocol):
    """What computes the layers and the logits of a model in a call: the model itself, or a faster
    way to do the same.
    """

    def run_layers(
        self, h_BTD: Tensor, step: Step, cache: ModelCache | None
    ) -> tuple[Tensor, tuple[RouterStatistics, ...]]:
        """Return normed hidden states [B, T, D] after all blocks, and statistics of routers."""

    def project(self, h_D: Tensor) -> Tensor:
        """Return the logits [..., V] of normed hidden states [..., D]."""


class LLM(nn.Module):
    """Decoder-only Transformer.

    The constructor draws all weights from torch's generator by the rules of `init_weights`. On the
    meta device it draws nothing.

    Attributes:
        args: The arguments that the model was built from.
        attend: The attention backend, which may be replaced at any time.
        generation_settings: The generation settings of the folder that the model was loaded from.
            `save` writes them again.
    """

    attend: Attend = staticmethod(auto)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.generation_settings: dict[str, Any] = {}
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        vision = args.vision_args
        self.vision = None if vision is None else VisionEmbeddings(vision, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(layer) for layer in args.layers)
        self.norm = make_norm(args.norm, args.dim, args.norm_eps)
        outputs = args.vocab_size if args.head is None else args.head.outputs
        self.output = Linear(args.dim, outputs) if outputs and not args.tie_embeddings else None
        start_at_chance(self, tied=self.output is None)
        self.register_load_state_dict_pre_hook(partial(load_hook, args))

    @property
    def device(self) -> torch.device:
        """The device of the token embeddings, on which inputs are expected."""
        return next(self.parameters()).device  # a stage of a pipeline may lack the embeddings

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the token embeddings."""
        return self.tok_embeddings.dtype

    def forward(
        self,
        inputs: TransformerInput,
        cache: ModelCache | None = None,
        inference: bool = False,
        runner: Runner | None = None,
    ) -> TransformerOutput:
        """Run the model on the tokens of `inputs`.

        Args:
            inputs: Token ids [B, T] and, optionally, their positions, document sizes, real lengths,
                image embeddings and context; see `TransformerInput`.
            cache: KV cache. The tokens continue its rows and are stored in it. No gradients are
                recorded.
            inference: Run under `torch.inference_mode()`. No later graph can use the results.
            runner: What computes the layers and the logits, such as a `DecodePlan`; the model
                itself by default.

        Returns:
            Logits [B, T, V] (as `inputs.logits` asks for), normed hidden states [B, T, D] in the
            dtype of the weights, and the router statistics of the layers with experts.

        Raises:
            RequestError: The model can't compute the input, for example because it is longer than
                `max_seq_len` or than the cache.
        """
        # Stored keys are detached: gradients of a cached call would silently lack their share.
        quiet = torch.no_grad() if cache is not None else contextlib.nullcontext()
        with torch.inference_mode() if inference else quiet:
            step = build_step(self.args, inputs, cache, self.attend)
            h_BTD = self.embed(inputs)
            # A hidden key is multiplied by a weight of 0, and 0 * NaN is NaN.
            if step.valid_BT is not None:
                h_BTD = h_BTD.masked_fill(~step.valid_BT.unsqueeze(-1), 0.0)
            if cache is not None:
                cache.begin_call(step.positions_BT)
            h_BTD, router = (runner or self).run_layers(h_BTD, step, cache)
            if cache is not None:
                cache.end_call(step.positions_BT, padded=inputs.lengths is not None)
            if self.args.head is not None:
                return self._headed(h_BTD, step, self.args.head, router)
            logits = self.unembed(h_BTD, inputs, step, runner or self)
            return TransformerOutput(logits, h_BTD, router)

    def run_layers(
        self, h_BTD: Tensor, step: Step, cache: ModelCache | None
    ) -> tuple[Tensor, tuple[RouterStatistics, ...]]:
        """Return normed hidden states [B, T, D] after all blocks, and statistics of routers.

        Args:
            h_BTD: Token embeddings [B, T, D].
            step: What the layers share.
            cache: The cache of all layers, in which the call has begun.
        """
        router = []
        for name, block in self.layers.named_children():  # a stage of a pipeline has some of them
            layer_cache = cache.layers[int(name)] if cache is not None else None
            h_BTD, statistics = block(h_BTD, step, layer_cache)
            if statistics is not None:
                router.append(statistics)
        return self.norm(h_BTD), tuple(router)

    def _headed(
        self, h_BTD: Tensor, step: Step, head: HeadArgs, router: tuple[RouterStatistics, ...]
    ) -> TransformerOutput:
        pooled_BD = pool(h_BTD, step.positions_BT, head.pooling)
        if head.kind == "embedding" and head.normalize:
            pooled_BD = F.normalize(pooled_BD.float(), dim=-1).to(pooled_BD.dtype)
        logits = None if self.output is None else self.output(pooled_BD)
        return TransformerOutput(logits, h_BTD, router, pooled_BD)

    def embed(self, inputs: TransformerInput) -> Tensor:
        """Return the token embeddings [B, T, D], replaced where `image_embedding` says so."""
        h_BTD = self.tok_embeddings(inputs.tokens)
        if self.args.embedding_scale is not None:
            # The scale is rounded to the dtype of the weights first, as Gemma was trained.
            scale = torch.tensor(self.args.embedding_scale, dtype=h_BTD.dtype, device="cpu")
            h_BTD = h_BTD * float(scale)
        if inputs.image_embedding is None:
            return h_BTD
        rows, mask = inputs.image_embedding.embedding, inputs.image_embedding.mask
        if rows.shape != h_BTD.shape or mask.shape != h_BTD.shape[:2] or mask.dtype != torch.bool:
            raise RequestError(
                f"image_embedding: got {list(rows.shape)} with a mask {mask.dtype} "
                f"{list(mask.shape)}; expected {list(h_BTD.shape)} with a mask torch.bool "
                f"{list(h_BTD.shape[:2])}"
            )
        return torch.where(mask.unsqueeze(-1), rows.to(h_BTD.dtype), h_BTD)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return the rows [tiles, patches, D] of image tiles [tiles, C, S, S].

        `vision.merge_images` puts them in the place of patch tokens.
        """
        if self.vision is None:
            raise RequestError("images: got some for a text model; expected one with vision_args")
        return self.vision(pixels)

    def unembed(
        self, h_BTD: Tensor, inputs: TransformerInput, step: Step, runner: Runner
    ) -> Tensor | None:
        """Return the logits of the positions that `inputs.logits` asks for, or None."""
        if inputs.logits == "none":
            return None
        if inputs.logits == "last" and h_BTD.size(1) > 1:
            h_BTD = pool(h_BTD, step.positions_BT, "last").unsqueeze(1)
        return runner.project(h_BTD)

    def project(self, h_D: Tensor) -> Tensor:
        """Return the logits [..., V] of normed hidden states [..., D]."""
        if self.output is None:
            return self.finish_logits(tied_output(self.tok_embeddings, h_D))
        # The leaf is called, not its weight: it may have an adapter or be quantized.
        return self.finish_logits(self.output(h_D))

    def finish_logits(self, raw_V: Tensor) -> Tensor:
        """Return logits [..., V] after the scale and the soft cap that some models have."""
        scale, cap = self.args.logit_factor, self.args.logit_softcap
        if scale != 1.0:
            raw_V = raw_V * scale
        return raw_V if cap is None else torch.tanh(raw_V / cap) * cap

    def make_cache(
        self,
        batch_size: int | None = None,
        capacity: int | None = None,
        *,
        slack: int = SLACK,
        kv_bits: int = 16,
    ) -> ModelCache:
        """Return an empty KV cache for this model, on its device; see `ModelCache.build`."""
        return ModelCache.build(
            self.args, batch_size, capacity, slack=slack, kv_bits=kv_bits, device=self.device
        )

    def init_weights(self, seed: int = 0, copy: Copy = Tensor.copy_) -> None:
        """Draw all weights again in place. A seed gives the same weights on every device.

        `copy(weight, drawn)` copies what was drawn into a weight, of which it may take a part.

        Matrices that write into the residual stream and an untied output start at zero. All others
        are uniform with standard deviation 1 / (2 sqrt(fan in)). At step 0 every block is therefore
        the identity, and the loss is ln V. The loss of a tied output starts higher, since each
        token predicts itself.
        """
        plus_one, tied = self.args.norm == "rms_plus_one", self.output is None
        weights = dict(self.named_parameters())
        init_weights(weights, seed, plus_one=plus_one, tied=tied, copy=copy)


def pool(h_BTD: Tensor, positions_BT: Tensor, kind: Literal["mean", "last"]) -> Tensor:
    """Return one vector [B, D] per row: the mean over its real tokens, or the last of them.

    Padding has position -1 and may be on either side.
    """
    valid_BT = positions_BT >= 0
    if kind == "mean":
        wide = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32)) * valid_BT.unsqueeze(-1)
        return (wide.sum(1) / valid_BT.sum(1, keepdim=True).clamp(min=1)).to(h_BTD.dtype)
    offsets_T = torch.arange(h_BTD.size(1), device=h_BTD.device)
    last_B = torch.where(valid_BT, offsets_T, 0).amax(1)
    return h_BTD.gather(1, last_B[:, None, None].expand(-1, 1, h_BTD.size(-1))).squeeze(1)

"""One forward pass, looked at from inside: what every block adds, where heads look, what it would
say so far.

The model's code is untouched: the attention backend is replaced by one that also records, and
forward hooks read what attention, feed-forward, router and block return. Both are taken away again
whatever happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from transom.attention.mask import MaskSpec
from transom.attention.reference import weights_BNTS
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import require
from transom.layers.block import TransformerBlock
from transom.layers.inputs import TransformerInput
from transom.layers.moe import MoE
from transom.models.llm import LLM

BLOCK = 256  # queries whose dense attention weights exist at the same time, tokens
TOP = 3  # tokens kept of every prediction


@dataclass(frozen=True)
class LayerTrace:
    """What one block did with a text of T tokens.

    The three `rms` are root mean squares over features, averaged over tokens: of the residual
    stream behind the block, and of what attention and feed-forward added to it. `entropy_N` is the
    attention entropy of every head in nats, averaged over queries: 0 is one key, ln n is n keys
    alike. `last_attention_NT` are the last token's attention weights by key position. `experts` are
    the (id, weight) pairs of the last token, strongest first, empty in a dense layer. `predictions`
    are the likeliest next (token id, probability) if the model ended here (the logit lens of
    nostalgebraist 2020).
    """

    residual_rms: float
    attention_rms: float
    feed_forward_rms: float
    entropy_N: Tensor
    last_attention_NT: Tensor
    experts: tuple[tuple[int, float], ...]
    predictions: tuple[tuple[int, float], ...]

    @property
    def strongest(self) -> tuple[tuple[int, float], ...]:
        """(position, weight) of the key that each head of the last token weighs most."""
        weights_N, positions_N = self.last_attention_NT.max(-1)
        return tuple(zip(positions_N.tolist(), weights_N.tolist(), strict=True))


@dataclass
class Recording:
    """What a forward left behind: `attention` (entropy [N], last weights [N, T]) per layer, outputs
    by module.
    """

    attention: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)


def trace(model: LLM, tokens_1T: Tensor) -> list[LayerTrace]:
    """One forward of one row of token ids on the model's device, seen layer by layer."""
    shape = tuple(tokens_1T.shape)
    require(
        len(shape) == 2 and shape[0] == 1 and shape[1] > 0,
        "tokens",
        shape,
        "expected [1, tokens]",
    )
    low, high = int(tokens_1T.min()), int(tokens_1T.max())
    last = model.args.vocab_size - 1
    require(
        low >= 0 and high <= last, "token id", low if low < 0 else high, f"expected 0 to {last}"
    )
    with torch.inference_mode():
        with recording(model) as recorded:
            model(TransformerInput(tokens_1T, logits="none"))
        return [
            layer_trace(model, block, recorded.outputs, *attention)
            for block, attention in zip(blocks(model), recorded.attention, strict=True)
        ]


@contextlib.contextmanager
def recording(model: LLM) -> Iterator[Recording]:
    """Record every attention call and module output inside the `with`; the model is then as it
    was.
    """
    recorded = Recording()
    backend, replaced = model.attend, "attend" in vars(model)

    def attend(q_1TNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /) -> Tensor:
        recorded.attention.append(attention_summary(q_1TNH, view, spec, score))
        return backend(q_1TNH, view, spec, score)

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        recorded.outputs[module] = output

    handles = []
    model.attend = attend
    try:
        for block in blocks(model):
            parts: list[nn.Module] = [block, block.attention, block.feed_forward]
            if isinstance(block.feed_forward, MoE):
                parts.append(block.feed_forward.router)
            handles += [part.register_forward_hook(hook) for part in parts]
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        del model.attend  # the class's own shows again
        if replaced:
            model.attend = backend


def attention_summary(
    q_1TNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs
) -> tuple[Tensor, Tensor]:
    """(entropy [N] in nats, mean over queries; weights [N, T] of the last query), from the
    reference's weights.
    """
    length = q_1TNH.size(1)
    entropies, weights = [], torch.empty(0)
    for start in range(0, length, BLOCK):  # all T x T weights at once would not fit for long texts
        rows = slice(start, start + BLOCK)
        part = replace(spec, positions_BT=spec.positions_BT[:, rows], layout=None)
        weights = weights_BNTS(q_1TNH[:, rows], view, part, score)
        entropies.append(torch.special.entr(weights).sum(-1))
    return torch.cat(entropies, -1)[0].mean(-1).cpu(), weights[0, :, -1].cpu()


def layer_trace(
    model: LLM,
    block: TransformerBlock,
    outputs: dict[nn.Module, Any],
    entropy_N: Tensor,
    last_NT: Tensor,
) -> LayerTrace:
    """One block's summary from what its parts returned."""
    h_BTD, _ = outputs[block]
    added_BTD = outputs[block.feed_forward]
    experts: tuple[tuple[int, float], ...] = ()
    if isinstance(block.feed_forward, MoE):
        added_BTD, _ = added_BTD
        ids_TA, weights_TA, _ = outputs[block.feed_forward.router]
        experts = tuple(zip(ids_TA[-1].tolist(), weights_TA[-1].tolist(), strict=True))
    return LayerTrace(
        residual_rms=rms(h_BTD),
        attention_rms=rms(outputs[block.attention]),
        feed_forward_rms=rms(added_BTD),
        entropy_N=entropy_N,
        last_attention_NT=last_NT,
        experts=experts,
        predictions=lens(model, h_BTD[0, -1]) if model.args.head is None else (),
    )


def lens(model: LLM, h_D: Tensor) -> tuple[tuple[int, float], ...]:
    """The likeliest next (token id, probability) if the final norm and output stood right behind
    `h_D`.
    """
    logits_V = model.project(model.norm(h_D))
    wide = torch.promote_types(logits_V.dtype, torch.float32)
    best, ids = logits_V.softmax(-1, dtype=wide).topk(min(TOP, logits_V.numel()))
    return tuple(zip(ids.tolist(), best.tolist(), strict=True))


def rms(x_BTD: Tensor) -> float:
    """Root mean square over features, averaged over tokens."""
    wide = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    return float(wide.square().mean(-1).sqrt().mean())


def blocks(model: LLM) -> list[TransformerBlock]:
    """The model's blocks in order, as what they are."""
    return [block for block in model.layers if isinstance(block, TransformerBlock)]

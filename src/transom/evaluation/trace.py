"""Trace one forward pass: what every block adds, where its heads attend, and its predictions.

The attention backend is replaced by one that also records, and forward hooks read the outputs of
attention, feed-forward, router and block. The model is afterwards as it was.
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
from transom.base.errors import expect
from transom.base.runtime import attached, replaced
from transom.layers.block import TransformerBlock
from transom.layers.inputs import TransformerInput
from transom.layers.moe import MoE
from transom.models.llm import LLM

BLOCK = 256  # queries whose dense attention weights exist at the same time
TOP = 3  # most likely tokens of each prediction


@dataclass(frozen=True)
class LayerTrace:
    """What one block did with a text of T tokens.

    Attributes:
        residual_rms: Root mean square over features of the residual stream after the block,
            averaged over tokens.
        attention_rms: The same of the output of attention.
        feed_forward_rms: The same of the output of the feed-forward.
        entropy_N: Attention entropy of each head in nats, averaged over queries: 0 for attention
            to a single key, ln n for equal attention to n keys.
        last_attention_NT: Attention weights of the last token by key position.
        experts: (id, weight) of the experts of the last token, the largest weight first; empty in
            a dense layer.
        predictions: The most likely next (token id, probability) if the model ended after this
            block (the logit lens, nostalgebraist 2020).
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
        """The (position, weight) of the key with the largest weight, for each head."""
        weights_N, positions_N = self.last_attention_NT.max(-1)
        return tuple(zip(positions_N.tolist(), weights_N.tolist(), strict=True))


@dataclass
class Recording:
    """What was recorded: (entropy [N], last weights [N, T]) per layer, and outputs by module."""

    attention: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)


def trace(model: LLM, tokens_1T: Tensor) -> list[LayerTrace]:
    """Run one row of token ids [1, T] on the model's device and return the trace of each layer.

    Raises:
        RequestError: The shape is another one, or an id is not in the vocabulary.
    """
    shape, last = tuple(tokens_1T.shape), model.args.vocab_size - 1
    expect(len(shape) == 2 and shape[0] == 1 and shape[1] > 0, "tokens", shape, "[1, tokens]")
    for id in (int(tokens_1T.min()), int(tokens_1T.max())):
        expect(0 <= id <= last, "token id", id, f"0 to {last}")
    with torch.inference_mode():
        with recording(model) as recorded:
            model(TransformerInput(tokens_1T, logits="none"))
        return [
            layer_trace(model, block, recorded.outputs, *attention)
            for block, attention in zip(blocks(model), recorded.attention, strict=True)
        ]


@contextlib.contextmanager
def recording(model: LLM) -> Iterator[Recording]:
    """Record the attention calls and module outputs of forward passes inside the `with` block."""
    recorded, backend = Recording(), model.attend

    def attend(q_1TNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /) -> Tensor:
        recorded.attention.append(attention_summary(q_1TNH, view, spec, score))
        return backend(q_1TNH, view, spec, score)

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        recorded.outputs[module] = output

    parts: list[nn.Module] = []
    for block in blocks(model):
        parts += [block, block.attention, block.feed_forward]
        if isinstance(block.feed_forward, MoE):
            parts.append(block.feed_forward.router)
    hooks = attached([part.register_forward_hook(hook) for part in parts])
    with hooks, replaced(model, "attend", attend):
        yield recorded


def attention_summary(
    q_1TNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs
) -> tuple[Tensor, Tensor]:
    """Return the entropy [N] of each head, averaged over queries, and the last weights [N, T].

    The weights are those of the reference, computed for `BLOCK` queries at a time.
    """
    entropies, weights = [], torch.empty(0)
    for start in range(0, q_1TNH.size(1), BLOCK):
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
    """Return the trace of one block from the recorded outputs of its parts."""
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
    """Return the most likely next (token id, probability) of a hidden state without its norm."""
    logits_V = model.project(model.norm(h_D))
    wide = torch.promote_types(logits_V.dtype, torch.float32)
    best, ids = logits_V.softmax(-1, dtype=wide).topk(min(TOP, logits_V.numel()))
    return tuple(zip(ids.tolist(), best.tolist(), strict=True))


def rms(x_BTD: Tensor) -> float:
    """Return the root mean square over features, averaged over tokens."""
    wide = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    return float(wide.square().mean(-1).sqrt().mean())


def blocks(model: LLM) -> list[TransformerBlock]:
    """Return the blocks of a model in order, with their type."""
    return [block for block in model.layers if isinstance(block, TransformerBlock)]

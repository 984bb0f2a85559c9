"""Summed cross-entropy of the next token, without the logits of all tokens at once.

Logits of T tokens over a vocabulary of V are often the largest tensor of a step: T x V numbers, and
as many for their softmax and for their gradient. Here they are computed for a chunk of tokens at a
time, with the gradients of hidden states and output weights as soon as a chunk has its logits (Hsu
et al. 2024, Liger Kernel, arXiv 2410.10989). Tensor ranks compute the logits of their rows only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from transom.data.batch import NO_TARGET
from transom.distributed.vocabulary import OutputRows, divided_log_softmax
from transom.layers.linear import Embedding, Linear
from transom.models.llm import LLM
from transom.training.losses.log_probs import chunk_tokens, target_log_probs


def cross_entropy_sum(
    logits_BTV: Tensor, targets_BT: Tensor, weights_BT: Tensor | None = None
) -> Tensor:
    """Return the sum of -log p(target) over positions with a target, in nats.

    It is a sum so that the caller can divide by the targets of the whole step, and the loss does
    not depend on micro-batches and ranks.

    Args:
        logits_BTV: Logits, which are converted to float32 or better.
        targets_BT: Target ids, NO_TARGET where there is none.
        weights_BT: Weight of each target; None weighs all alike.
    """
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    logits_TV, targets_T = logits_BTV.flatten(0, -2).to(wide), targets_BT.flatten()
    if weights_BT is None:
        return F.cross_entropy(logits_TV, targets_T, ignore_index=NO_TARGET, reduction="sum")
    losses_T = F.cross_entropy(logits_TV, targets_T, ignore_index=NO_TARGET, reduction="none")
    return (losses_T * weights_BT.flatten()).sum()


def head_loss(
    model: LLM,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    chunk: int | None = None,
    weights_BT: Tensor | None = None,
) -> Tensor:
    """Return the `cross_entropy_sum` of the logits of normed hidden states.

    Args:
        model: The model, whose output projection makes the logits.
        hidden_BTD: Normed hidden states.
        targets_BT: Target ids, NO_TARGET where there is none.
        chunk: Tokens whose logits are computed at a time, 0 for all. None computes logits of up to
            2^22 numbers at once, and more in chunks of at most 2^24.
        weights_BT: Weight of each target.
    """
    weight_VD, rows = plain_output_weight(model), None
    if isinstance(weight_VD, DTensor):
        rows = OutputRows.of(weight_VD)
        weight_VD = weight_VD.to_local()
    size = model.args.vocab_size if rows is None or weight_VD is None else len(weight_VD)
    tokens = chunk_tokens(targets_BT.numel(), size) if chunk is None else chunk
    if targets_BT.numel() == 0 or (rows is None and tokens == 0):
        return cross_entropy_sum(model.project(hidden_BTD), targets_BT, weights_BT)
    if weight_VD is None:
        nats_BT = -target_log_probs(model, hidden_BTD, targets_BT, tokens)
        return (nats_BT if weights_BT is None else nats_BT * weights_BT).sum()
    hidden_TD, targets_T = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    weights_T = None if weights_BT is None else weights_BT.flatten()
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    kind = hidden_TD.device.type
    if torch.is_autocast_enabled(kind) and hidden_TD.dtype != torch.float64:  # as autocast casts
        hidden_TD = hidden_TD.to(torch.get_autocast_dtype(kind))
    # Rows and not gradients are set to zero: a position without target may be NaN.
    hidden_TD = hidden_TD.masked_fill((targets_T == NO_TARGET).unsqueeze(1), 0.0)
    if model.args.logit_factor != 1.0:
        hidden_TD = hidden_TD * model.args.logit_factor
    cap = model.args.logit_softcap
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, weights_T, tokens or len(targets_T), cap, rows
    )


def plain_output_weight(model: LLM) -> Tensor | None:
    """Return the output matrix [V, D] if logits are its product with hidden states, or None.

    An adapter, a quantized weight, a bias or a hook makes the projection more than that. A matrix
    that tensor ranks divide is a DTensor, and has the hooks that divide it.
    """
    if "project" in vars(model) and not torch.is_grad_enabled():
        return None  # the logits come from another stage of a pipeline
    # With tied weights `LLM.project` uses the embedding's weight, and does not call the leaf.
    leaf: nn.Module = model.tok_embeddings if model.output is None else model.output
    weight = leaf._parameters.get("weight")
    is_plain = type(leaf) in (Linear, Embedding) and isinstance(weight, nn.Parameter)
    if not is_plain or any(leaf.children()):
        return None
    if isinstance(weight, DTensor):
        return weight if leaf._parameters.get("bias") is None else None
    hooks = (leaf._forward_hooks, leaf._forward_pre_hooks)
    backward_hooks = (leaf._backward_hooks, leaf._backward_pre_hooks)
    changed = any((*hooks, *backward_hooks)) or "forward" in vars(leaf)
    if model.output is not None and (changed or leaf._parameters.get("bias") is not None):
        return None
    return weight


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of cap * tanh(h W^T / cap), with gradients made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor | None,
        chunk: int,
        cap: float | None,
        own: OutputRows | None,
    ) -> Tensor:
        """Return the loss. Products are in the dtype of the hidden states, sums in float32.

        With `own`, `weight_VD` has these rows of the output matrix, and all ranks of the group get
        the same loss and gradient of the hidden states.
        """
        dtype = hidden_TD.dtype
        wide = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        needs_grad = needs_hidden or needs_weight
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_dtype = torch.promote_types(weight_VD.dtype, wide)
        grad_VD: Tensor | None = None  # made last, when a chunk's logits are gone
        share_T1 = (targets_T != NO_TARGET).to(wide).unsqueeze(1)
        if weights_T is not None:
            share_T1 = share_T1 * weights_T.unsqueeze(1)
        target_T1 = targets_T.clamp(min=0).unsqueeze(1) - (0 if own is None else own.first)
        count = targets_T.numel()
        size = -(-count // -(-count // chunk))  # about equal chunks of at most `chunk` tokens
        with torch.autocast(hidden_TD.device.type, enabled=False):
            matrix_VD = weight_VD.to(dtype)
            for start in range(0, count, size):
                here = slice(start, start + size)
                rows, share = hidden_TD[here], share_T1[here]
                raw_TV = (rows @ matrix_VD.T).to(wide)
                loss, grad = _chunk(raw_TV, target_T1[here], cap, needs_grad, own)
                del raw_TV
                total += (loss * share).sum()
                if grad is None:
                    continue
                grad, scaled = grad.to(dtype), (rows * share).to(dtype)
                if grad_TD is not None:
                    grad_TD[here] = (grad @ matrix_VD) * share
                if needs_weight and grad_VD is None:
                    grad_VD = (grad.T @ scaled).to(grad_dtype)
                elif grad_VD is not None and dtype == grad_dtype:
                    grad_VD.addmm_(grad.T, scaled)
                elif grad_VD is not None:
                    grad_VD.add_(grad.T @ scaled)
                del grad  # before the next chunk's logits are made
        if own is not None and grad_TD is not None:
            dist.all_reduce(grad_TD, group=own.group)
        # save_for_backward would keep a second reference, and backward scales them in place.
        ctx.grads = grad_TD, None if grad_VD is None else grad_VD.to(weight_VD.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "the chunked loss gives its gradients away: backward works once per forward"
            )
        return (*(None if one is None else one.mul_(grad) for one in grads), *[None] * 5)


def _chunk(
    logits_TV: Tensor,
    target_T1: Tensor,
    cap: float | None,
    with_grad: bool,
    own: OutputRows | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss [T, 1] of a chunk of logits before the cap, and their gradient [T, V].

    The memory of `logits_TV` is reused. Targets count from the first row of this rank.
    """
    tanh_TV = None
    if cap is not None:
        tanh_TV = logits_TV.div_(cap).tanh_()
        logits_TV = tanh_TV * cap
    share_T1: Tensor | float = 1.0  # of each target that is a row of this rank
    if own is None:
        log_TV = logits_TV.log_softmax(-1)
        loss_T1 = -log_TV.gather(1, target_T1)
    else:
        size = logits_TV.size(1)
        share_T1 = ((target_T1 >= 0) & (target_T1 < size)).to(logits_TV.dtype)
        target_T1 = target_T1.clamp(0, size - 1)
        log_TV, loss_T1 = divided_log_softmax(logits_TV, target_T1, share_T1, own.group)
    if not with_grad:
        return loss_T1, None
    grad_TV = log_TV.exp_()
    grad_TV.scatter_(1, target_T1, grad_TV.gather(1, target_T1) - share_T1)
    if tanh_TV is not None:
        grad_TV.mul_(tanh_TV.square_().neg_().add_(1.0))
    return loss_T1, grad_TV

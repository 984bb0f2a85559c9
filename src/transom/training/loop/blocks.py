"""How the blocks of a model run in training: compiled, checkpointed, or with offloaded activations.

The `forward` of a block is replaced on the instance, so no module is wrapped and no parameter
changes its name; `arrange_blocks(model)` undoes it. Checkpointing is applied around the compiled
function: a compiled function that breaks into several graphs would not be compiled by torch at all
inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from transom.attention.backends import Attend
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.base import copies
from transom.layers.block import TransformerBlock
from transom.layers.compiled import compile_forward
from transom.models.llm import LLM

Forward = Callable[..., Any]

# Results that selective checkpointing keeps: those of matrix products. Others are cheap to compute
# again. Not every build of torch has every kernel.
KEPT_OPERATIONS = (
    "mm",
    "addmm",
    "bmm",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
)
# Smaller tensors stay where they are: a copy would cost more than the memory it frees.
OFFLOAD_MIN_BYTES = 1 << 20


def arrange_blocks(
    model: LLM,
    *,
    compiled: bool = False,
    checkpointing: str = "none",
    offload_min_bytes: int | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Replace how every block runs. Without arguments all blocks run plainly.

    Args:
        model: The model.
        compiled: Compile the blocks with torch.compile.
        checkpointing: Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): `full` keeps
            the input of each block only, `every-K` does so in every K-th block, and `selective`
            also keeps results of matrix products and attention. Gradients are those of `none`, bit
            for bit.
        offload_min_bytes: Keep tensors of at least this size, which backward needs, in host memory.
        backend: Backend of torch.compile.
    """
    attend = model.attend.attend if isinstance(model.attend, EagerAttend) else model.attend
    model.attend = EagerAttend(attend) if compiled else attend
    own = [block for block in model.layers if isinstance(block, TransformerBlock)]
    blocks = (block for block in model.modules() if isinstance(block, TransformerBlock))
    others = [block for block in blocks if block not in own]  # those of an image encoder
    interval = int(checkpointing.removeprefix("every-")) if "every-" in checkpointing else 1
    for index, block in enumerate((*own, *others)):
        vars(block).pop("forward", None)
        forward: Forward = block.forward
        if compiled and index < len(own):
            forward = compile_forward(forward, backend)
        if checkpointing == "selective":
            forward = partial(_checkpointed, forward, _selective)
        elif checkpointing != "none" and index % interval == 0:
            forward = partial(_checkpointed, forward, None)
        if offload_min_bytes is not None:
            forward = partial(_offloaded, forward, offload_min_bytes)
        if forward != block.forward:
            block.forward = forward  # type: ignore[method-assign]


@dataclass(frozen=True)
class EagerAttend:
    """`attend` outside of compiled graphs, which would contain the lengths of packed documents."""

    attend: Attend

    @torch.compiler.disable
    def __call__(
        self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /
    ) -> Tensor:
        return self.attend(q_BTNH, view, spec, score)


def _checkpointed(forward: Forward, contexts: Callable[[], Any] | None, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    more: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(forward, *args, use_reentrant=False, **more)


def _selective() -> Any:
    packets = (getattr(torch.ops.aten, name, None) for name in KEPT_OPERATIONS)
    return create_selective_checkpoint_contexts(
        [packet.default for packet in packets if packet is not None]
    )


def _offloaded(forward: Forward, min_bytes: int, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    with saved_tensors_hooks(partial(to_host, min_bytes), to_device):
        return forward(*args)


def to_host(min_bytes: int, tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Return the device of a tensor, and the tensor in host memory.

    The tensor itself is returned if a copy would free nothing: small tensors, and weights.
    """
    if is_weight(tensor) or tensor.device.type == "cpu" or tensor.nbytes < min_bytes:
        return tensor.device, tensor
    host = torch.empty(
        tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda
    )
    return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)


def is_weight(tensor: Tensor) -> bool:
    """Return whether a tensor is a weight, a view of one, or the autocast copy of a trained one."""
    owner = tensor if tensor._base is None else tensor._base
    if isinstance(owner, nn.Parameter) or owner.grad_fn is None:
        return isinstance(owner, nn.Parameter)
    sources = [node.name() for node, _ in owner.grad_fn.next_functions if node is not None]
    return owner.grad_fn.name() == "ToCopyBackward0" and sources == [
        "torch::autograd::AccumulateGrad"
    ]


def to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    """Return a tensor of `to_host` on its device."""
    return copies.to_device(packed[1], packed[0])

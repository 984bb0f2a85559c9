"""How the blocks of a built model run in training: compiled, with activations made again, or kept
in host memory.

Applied from outside: a block's `forward` is replaced on the instance, so no module is wrapped, no
parameter changes its name, and `arrange_blocks(model)` puts everything back. Checkpointing goes
around the compiled function, not into it: a compiled function may break into several graphs, and
torch then compiles none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from transom.layers.block import TransformerBlock
from transom.models.llm import LLM

Forward = Callable[..., Any]

# What selective checkpointing keeps: results that cost a product to make again. Norms, rotations,
# activations and casts are bound by memory, and made again. By name: not every build of torch has
# every kernel.
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
    """Replace how every block runs; without arguments: as it is.

    `checkpointing` (Chen et al. 2016, arXiv 1604.06174): `full` keeps each block's input only,
    `every-K` does so in every K-th block, `selective` keeps the results of products and of
    attention as well. The gradients are those of `none` bit for bit: the same operations run again
    on the same numbers and the same random state. `offload_min_bytes`: what backward needs and is
    at least as large waits in host memory.
    """
    attend = model.attend.attend if isinstance(model.attend, EagerAttend) else model.attend
    model.attend = EagerAttend(attend) if compiled else attend
    for index, block in enumerate(_blocks(model)):
        vars(block).pop("forward", None)
        forward: Forward = block.forward
        if compiled and index < len(model.layers):
            forward = torch.compile(forward, backend=backend)
        if checkpointing == "selective":
            forward = partial(_checkpointed, forward, _selective)
        elif checkpointing != "none" and index % _interval(checkpointing) == 0:
            forward = partial(_checkpointed, forward, None)
        if offload_min_bytes is not None:
            forward = partial(_offloaded, forward, offload_min_bytes)
        if forward != block.forward:
            block.forward = forward  # type: ignore[method-assign]


@dataclass(frozen=True)
class EagerAttend:
    """`attend` outside compiled graphs: the lengths of packed documents would be built in, anew
    every step.
    """

    attend: Attend

    @torch.compiler.disable
    def __call__(
        self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs, /
    ) -> Tensor:
        return self.attend(q_BTNH, view, spec, score)


def _blocks(model: LLM) -> Iterator[TransformerBlock]:
    """The model's own blocks, then those of an image encoder."""
    own = [block for block in model.layers if isinstance(block, TransformerBlock)]
    yield from own
    for module in model.modules():
        if isinstance(module, TransformerBlock) and not any(module is block for block in own):
            yield module


def _interval(how: str) -> int:
    return 1 if how == "full" else int(how.removeprefix("every-"))


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
    """(device to return to, the tensor in host memory), or itself where that would free nothing:
    weights stay.
    """
    if is_weight(tensor) or tensor.device.type == "cpu" or tensor.nbytes < min_bytes:
        return tensor.device, tensor
    host = torch.empty(
        tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda
    )
    return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)


def is_weight(tensor: Tensor) -> bool:
    """Whether it is a weight, a view of one, or the copy of a trained one that autocast has
    made.
    """
    owner = tensor if tensor._base is None else tensor._base
    if isinstance(owner, nn.Parameter) or owner.grad_fn is None:
        return isinstance(owner, nn.Parameter)
    sources = [node.name() for node, _ in owner.grad_fn.next_functions if node is not None]
    return owner.grad_fn.name() == "ToCopyBackward0" and sources == [
        "torch::autograd::AccumulateGrad"
    ]


def to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    """The tensor where it came from."""
    device, tensor = packed
    return tensor.to(device, non_blocking=device.type == "cuda")

"""Where numbers stop being finite: the first such weight, or the first such output of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.inputs import TransformerOutput
from transom.models.llm import LLM


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number of a tensor is NaN or infinite. Integers are finite, and so are
    weights on meta, which are streamed from elsewhere.
    """
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.half()  # PyTorch compares no floats of 8 bits
    return tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def first_nonfinite(model: LLM, calls: Iterable[Callable[[], TransformerOutput]]) -> str | None:
    """Return the first weight or output that is not finite, in words; None if there is none.

    If all weights are finite, `calls` are made one after the other: they are forward calls of the
    model.
    """
    for name, one in model.named_parameters():
        if not is_finite(one):
            return f"the weight {name} is not finite"
    for call in calls:
        with watched_outputs(model) as found:
            logits = call().logits
        if logits is not None and not is_finite(logits):
            found.append("output")  # a tied one is no module
        if found:
            return f"the output of {found[0]} is the first that is not finite"
    return None


@contextmanager
def watched_outputs(model: LLM) -> Iterator[list[str]]:
    """Yield a list that gets the name of each module with an output that is not finite, in the
    order in which they run.

    The modules inside of a block with a forward of its own, such as a compiled one, are not seen.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(is_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
            found.append(name)

    replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and not any(name.startswith(f"{outer}.") for outer in replaced):
                stack.callback(module.register_forward_hook(partial(look, name)).remove)
        yield found

"""The coordinate check of muP: whether the sizes of a model's outputs depend on its width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import cross_entropy_sum
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer, width_multiplier

LOGITS = "logits"


@dataclass(frozen=True)
class Coordinate:
    """Mean size of what a module puts out at a width, after `step` optimizer steps."""

    width: int
    step: int
    module: str
    size: float


def coordinate_check(
    make_model: Callable[[int], LLM],
    widths: Sequence[int],
    steps: int,
    *,
    optimizer: OptimizerArgs | None = None,
    tokens_BT: Tensor | None = None,
) -> list[Coordinate]:
    """Train `make_model(width)` for a few steps at each width, on one batch, and measure every
    module's output.

    With muP no size depends on the width; a rate that is too high for wide models shows as growth
    with width (`growth`). Modules are the embeddings, each block's sublayers and the logits;
    AdamW's clipping is left out, since it would hide the growth of gradients.
    """
    rows = []
    for width in widths:
        model = make_model(width)
        if tokens_BT is None:  # the same for all widths
            private = torch.Generator().manual_seed(0)
            shape = (4, min(model.args.max_seq_len, 32) + 1)
            tokens_BT = torch.randint(model.args.vocab_size, shape, generator=private)
        args = OptimizerArgs() if optimizer is None else optimizer
        rows += [
            Coordinate(width, step, name, size)
            for step, name, size in _train(model, args, tokens_BT, steps)
        ]
    return rows


def growth(rows: Sequence[Coordinate], step: int | None = None) -> dict[str, float]:
    """Per module the exponent e of size ~ width^e at `step` (default the last), by least squares; 0
    is muP's aim.

    A module that puts out zeros at some width has no exponent and is left out.
    """
    last = max(row.step for row in rows) if step is None else step
    sizes: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.step == last:
            sizes.setdefault(row.module, []).append((row.width, row.size))
    out = {}
    for name, points in sizes.items():
        if any(size == 0 for _, size in points):
            continue
        logs = [(math.log(width), math.log(size)) for width, size in points]
        x0, y0 = (sum(column) / len(logs) for column in zip(*logs, strict=True))
        out[name] = sum((x - x0) * (y - y0) for x, y in logs) / sum((x - x0) ** 2 for x, _ in logs)
    return out


def _train(
    model: LLM, args: OptimizerArgs, tokens_BT: Tensor, steps: int
) -> list[tuple[int, str, float]]:
    """(step, module, mean size) before every optimizer step and after the last."""
    device = model.device
    tokens_BT = tokens_BT.to(device)
    optimizers = build_optimizer(
        model, args, device_type=device.type, width=width_multiplier(model.args)
    )
    model.train()
    out = []
    for step in range(steps + 1):
        with _measured(model) as sizes:
            logits = model(TransformerInput(tokens_BT[:, :-1])).logits
        assert logits is not None, "a language model, asked for all logits"
        sizes[LOGITS] = float(logits.detach().abs().mean())
        out += [(step, name, size) for name, size in sizes.items()]
        (cross_entropy_sum(logits, tokens_BT[:, 1:]) / tokens_BT[:, 1:].numel()).backward()
        optimizers.step()
        optimizers.zero_grad()
    return out


@contextmanager
def _measured(model: LLM) -> Iterator[dict[str, float]]:
    """Fill a dict with the mean size of each module's output while the model is called."""
    sizes: dict[str, float] = {}

    def note(name: str, module: nn.Module, given: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        sizes[name] = float(tensor.detach().abs().mean())

    parts: dict[str, nn.Module] = {"tok_embeddings": model.tok_embeddings}
    for index, block in enumerate(model.layers):
        parts |= {
            f"layers.{index}.{name}": child
            for name, child in block.named_children()
            if "norm" not in name
        }
    with ExitStack() as stack:
        for name, module in parts.items():
            stack.callback(module.register_forward_hook(partial(note, name)).remove)
        yield sizes

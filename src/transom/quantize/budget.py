"""The format of every leaf for a mean number of bits, by how much its rounding changes predictions.

The loss grows by about half of the squared change of a leaf's outputs, each weighted by the square
of the gradient there (the Fisher information of the outputs). Gradients are those of tokens that
the model itself draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import expect
from transom.base.runtime import attached, evaluating
from transom.layers.inputs import TransformerInput
from transom.layers.linear import Embedding
from transom.models.build_step import build_step
from transom.models.llm import LLM
from transom.quantize.args import GROUPS, QuantizeArgs
from transom.quantize.calibration import Dense, block_inputs
from transom.quantize.fitting import rounded
from transom.quantize.formats import WeightFormat, empty_parts, requested

TOKENS = 4096  # of the calibration text that sensitivity is measured on


def choose_formats(
    model: LLM, args: QuantizeArgs, chosen: Mapping[str, Dense], batches: Sequence[Tensor]
) -> dict[str, WeightFormat]:
    """Return a format for each leaf with `bits_budget` bits per weight on average, or fewer.

    From the smallest format of every leaf, the step to a larger one that saves most loss per bit is
    taken until the budget is used.

    Args:
        model: The dense model.
        args: The budget, the method and the settings that all formats share.
        chosen: The leaves by name.
        batches: Calibration text.

    Raises:
        RequestError: The smallest formats have more bits than the budget.
    """
    assert args.bits_budget is not None, "as the caller checked"
    weights = sum(leaf.weight.numel() for leaf in chosen.values())
    candidates = {path: _candidates(leaf, args) for path, leaf in chosen.items()}
    made = {path: min(own, key=own.__getitem__) for path, own in candidates.items()}
    left = args.bits_budget * weights - sum(candidates[path][one] for path, one in made.items())
    least = args.bits_budget - left / weights
    expected = f"at least {least:.3f}, the smallest formats of all leaves"
    expect(left >= 0, "bits_budget", args.bits_budget, expected)
    losses = _losses(model, candidates, chosen, batches)
    while True:
        steps = []  # loss saved per bit, bits, leaf, index of the new format
        for path, now in made.items():
            for i, (one, size) in enumerate(candidates[path].items()):
                bits = size - candidates[path][now]
                if 0 < bits <= left:
                    steps.append(((losses[path][now] - losses[path][one]) / bits, bits, path, i))
        gain, bits, path, i = max(steps, default=(0.0, 0, "", 0))
        if gain <= 0:
            return made
        left -= bits
        made[path] = list(candidates[path])[i]


def _candidates(leaf: Dense, args: QuantizeArgs) -> dict[WeightFormat, int]:
    """Return the bits of a leaf in each of the formats that fit its inputs."""
    shape = leaf.weight.shape
    groups = [group for group in GROUPS if shape[-1] % (group or 2) == 0]
    fields = [replace(args, bits_budget=None, group=group) for group in groups]
    fields += [replace(args, bits_budget=None, kind="int8", group=0)]
    formats = [requested(one, leaf.weight.dtype) for one in fields]
    made = [(format, empty_parts(shape, format, "meta").values()) for format in formats]
    return {format: 8 * sum(part.nbytes for part in parts) for format, parts in made}


def _losses(
    model: LLM,
    candidates: Mapping[str, Iterable[WeightFormat]],
    chosen: Mapping[str, Dense],
    batches: Sequence[Tensor],
) -> dict[str, dict[WeightFormat, float]]:
    """Return the nats per token that the rounding of each leaf to each format costs."""
    rows = [row[None] for batch in batches for row in batch]
    some = rows[: max(1, TOKENS // rows[0].numel())]
    gradients, counts = _gradients(model, some, chosen)
    losses: dict[str, dict[WeightFormat, float]] = {path: {} for path in chosen}
    for _, leaves, found in block_inputs(model, some, chosen):
        for path, leaf in leaves.items():
            weight = leaf.weight.detach().float()
            for format in candidates[path]:
                change = rounded(weight, format).sub_(weight)
                loss = torch.zeros((), device=weight.device)
                if path in found:  # [E, out]: the squared changes of outputs, summed over rows
                    moved = ((change @ found[path].hessians) * change).sum(-1)
                    loss += (moved * gradients[path]).sum() / found[path].rows.sum()
                if isinstance(leaf, Embedding):
                    loss += counts @ (change.square() @ gradients["inputs"])
                losses[path][format] = float(loss) / 2
    return losses


def _gradients(
    model: LLM, rows: Sequence[Tensor], chosen: Mapping[str, Dense]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the mean squared gradients of the outputs of leaves, and the frequency of tokens.

    Gradients [out] are those of the loss of a row, by the name of the leaf. `inputs` has those [D]
    of the embeddings. Frequencies are float32 [V].
    """
    squares: dict[str, Tensor] = {}
    totals: dict[str, int] = {}

    def add(path: str, gradient: Tensor) -> None:
        flat = gradient.flatten(0, -2).float()
        squares[path] = squares.get(path, 0.0) + flat.square().sum(0)
        totals[path] = totals.get(path, 0) + len(flat)

    hooks = [
        leaf.register_forward_hook(
            lambda _, __, output, path=path: output.register_hook(lambda g: add(path, g)) and None
        )
        for path, leaf in chosen.items()
        if not isinstance(leaf, Embedding)
    ]
    counts = torch.zeros(model.args.vocab_size, device=model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    with attached(hooks), evaluating(model), torch.enable_grad():
        for row in rows:
            inputs = TransformerInput(row.to(model.device))
            step = build_step(model.args, inputs, None, model.attend)
            h = model.embed(inputs).detach().requires_grad_()
            logits = model.project(model.run_layers(h, step, None)[0]).float()
            logits.register_hook(lambda g: add("tok_embeddings", g))
            # `multinomial` would take as long as the model: it draws a number per logit.
            sums = logits.detach()[0].softmax(-1).cumsum(-1)
            points = torch.rand(len(sums), 1, generator=generator, device=sums.device)
            drawn = torch.searchsorted(sums, points * sums[:, -1:]).flatten()
            loss = F.cross_entropy(logits[0], drawn, reduction="sum")
            add("inputs", torch.autograd.grad(loss, h)[0])  # and none of a weight
            counts += inputs.tokens.flatten().bincount(minlength=len(counts))
    means = {path: total / totals[path] for path, total in squares.items()}
    return means, counts / counts.sum()

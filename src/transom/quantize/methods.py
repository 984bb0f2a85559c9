"""Quantizing the leaves of a built model, by every method.

Leaves are quantized one after the other, so memory has the model and one dense leaf at most, and
for methods that read text the inputs of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, nearest, notice
from transom.layers.block import TransformerBlock
from transom.layers.linear import Embedding, GroupedLinear, Linear
from transom.models.llm import LLM
from transom.quantize.args import GROUPS, QuantizeArgs
from transom.quantize.awq import scale_inputs
from transom.quantize.budget import choose_formats
from transom.quantize.calibration import InputStatistics, block_inputs, checked_batches
from transom.quantize.fitting import fitted_parts
from transom.quantize.formats import WeightFormat, empty_parts, quantize, requested
from transom.quantize.gptq import gptq
from transom.quantize.leaves import Dense, parameter_count, quantized_leaves, replace_weight

M = TypeVar("M", bound=nn.Module)


def quantize_model(
    model: M,
    args: QuantizeArgs,
    batches: Iterable[Tensor] | None = None,
    *,
    tell: Callable[[str], object] | None = None,
) -> M:
    """Store the weights of leaves in few bits, and freeze them.

    Args:
        model: A model that is not quantized and has no adapters. It is changed in place. Leaves on
            the meta device get empty parts.
        args: The format and the method.
        batches: Calibration text for methods that read it: token ids [B, T] without padding. It is
            iterated once.
        tell: Called with a line of text for each layer that has read the text.

    Returns:
        The same model.

    Raises:
        RequestError: The format does not fit the model, or the text is missing or too short.
            Nothing has changed.
        WorkError: The inputs of a leaf are NaN or infinite. Leaves before it are quantized.
    """
    chosen = _chosen(model, args)
    for path, leaf in chosen.items():
        _check(path, leaf, args)
    total = parameter_count(model)
    if args.calibrated:
        assert isinstance(model, LLM), "parts of a model read no text"
        _calibrated(model, args, chosen, checked_batches(model, batches, chosen), tell)
    else:
        if batches is not None:
            raise RequestError("batches: got some; expected none, since this method reads no text")
        for leaf in chosen.values():
            format = requested(args, leaf.weight.dtype)
            if leaf.weight.is_meta:
                parts = empty_parts(leaf.weight.shape, format, leaf.weight.device)
                replace_weight(leaf, parts, format)
            else:
                _quantize(leaf, None, format, args)
    quantized = sum(math.prod(leaf.shape) for leaf in quantized_leaves(model).values())
    shares = f"{quantized:,} of {total:,} weights in {mean_bits(model):.2f} bits each"
    groups = f"in groups of {args.group}" if args.group else "with one scale per output"
    groups = groups if args.bits_budget is None else "and int8 in groups of any size"
    method = f" by {args.method}" if args.calibrated else ""
    notice(f"{args.kind} {groups}{method} on {len(chosen)} leaves: {shares}")
    return model


def mean_bits(model: nn.Module) -> float:
    """Return the bits per weight of the quantized leaves, with all parts and without biases."""
    leaves = quantized_leaves(model).values()
    bits = sum(8 * part.nbytes for leaf in leaves for part in leaf.parts.values())
    return bits / sum(math.prod(leaf.shape) for leaf in leaves)


def _calibrated(
    model: LLM,
    args: QuantizeArgs,
    chosen: Mapping[str, Dense],
    batches: list[Tensor],
    tell: Callable[[str], object] | None,
) -> None:
    """Quantize the leaves by their inputs, in the order in which tokens reach them."""
    formats = {path: requested(args, leaf.weight.dtype) for path, leaf in chosen.items()}
    if args.bits_budget is not None:
        formats = choose_formats(model, args, chosen, batches)
    embeddings = {path: leaf for path, leaf in chosen.items() if isinstance(leaf, Embedding)}
    rest = {path: leaf for path, leaf in chosen.items() if path not in embeddings}
    unseen = unscaled = 0
    if embeddings:  # first, since all later inputs depend on them
        found: dict[str, InputStatistics] = {}
        if model.output is None and args.method == "gptq":  # they are the output too
            *_, (_, _, found) = block_inputs(model, batches, embeddings)
        for path, embedding in embeddings.items():
            unseen += _quantize(embedding, found.get(path), formats[path], args)
    for part, leaves, found in block_inputs(model, batches, rest):
        scales: dict[nn.Module, Tensor] = {}
        if args.method == "awq" and isinstance(part, TransformerBlock):
            scales = scale_inputs(
                part,
                {leaves[path]: one for path, one in found.items()},
                {leaves[path]: formats[path] for path in found},
            )
        for path, leaf in leaves.items():
            unscaled += leaf not in scales
            unseen += _quantize(leaf, found.get(path), formats[path], args, scales.get(leaf))
        if tell is not None and leaves:
            tell(f"{args.method}: {'.'.join(path.split('.')[:2])} of {len(model.layers)} layers")
    if unseen:
        notice(f"{args.method}: {unseen} matrices that multiply nothing of the text are rounded")
    if unscaled and args.method == "awq":
        notice(f"awq: {unscaled} leaves have inputs that no norm or linear can be divided by")


def _quantize(
    leaf: Dense,
    sums: InputStatistics | None,
    format: WeightFormat,
    args: QuantizeArgs,
    scales: Tensor | None = None,
) -> int:
    """Quantize one leaf, and return how many of its matrices no token reached."""
    experts = leaf.weight.detach().view(-1, *leaf.weight.shape[-2:])
    rows = [0] * len(experts) if sums is None else sums.rows.tolist()
    made = []
    for e, weight in enumerate(experts):
        if sums is None or rows[e] == 0 or args.method == "rtn":
            made.append(rounded_parts(weight, format, args))
        elif args.method == "gptq":
            made.append(gptq(weight, sums.hessians[e], format, args.act_order, args.damping))
        else:
            squares = sums.hessians[e].diagonal() / rows[e]
            if scales is not None:
                squares = squares / scales[e % len(scales)].square()
            squares = squares.view(-1, format.group or len(squares))
            made.append(quantize(weight, format, partial(fitted_parts, importance=squares)))
    stacked = {name: torch.stack([parts[name] for parts in made]) for name in made[0]}
    parts = stacked if leaf.weight.ndim == 3 else made[0]
    replace_weight(leaf, parts, format)
    return rows.count(0)


def rounded_parts(weight: Tensor, format: WeightFormat, args: QuantizeArgs) -> dict[str, Tensor]:
    """Return the parts of a weight [out, in] or [E, out, in] whose inputs are not known."""
    fit = fitted_parts if args.method != "rtn" or args.fit_scales else None
    return quantize(weight, format, fit)


def _chosen(model: nn.Module, args: QuantizeArgs) -> dict[str, Dense]:
    """Return the leaves to quantize by name.

    Raises:
        RequestError: A name to skip is not in the model, or nothing is left.
    """
    paths = [path for path, _ in model.named_modules()]
    words = {word for path in paths for word in path.split(".")}
    for name in args.skip:
        # The default names what only some models have.
        if not any(_is_in(name, path) for path in paths) and name not in QuantizeArgs().skip:
            expected = f"expected a module of this model{nearest(name, words)}"
            raise RequestError(f"skip: got {name!r}; {expected}")
    if quantized_leaves(model):
        raise RequestError("model: got a quantized one; expected dense leaves")
    kinds = (Linear, GroupedLinear, Embedding) if args.embeddings else (Linear, GroupedLinear)
    chosen = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, kinds) and not any(_is_in(name, path) for name in args.skip)
    }
    if not chosen:
        raise RequestError(f"skip: got {list(args.skip)}; expected at least one leaf to be left")
    return chosen


def _is_in(name: str, path: str) -> bool:
    return f".{name}." in f".{path}."


def _check(path: str, leaf: Dense, args: QuantizeArgs) -> None:
    """Check a leaf before anything changes.

    Raises:
        RequestError: Its inputs do not fill groups, it has an adapter, or it has NaN or infinite
            weights.
    """
    inputs = leaf.weight.size(-1)
    group = args.group if args.bits_budget is None else 0
    if inputs % (group or 2):
        fitting = [f"{group}, or" for group in GROUPS if group and inputs % group == 0][-1:]
        expected = " ".join([*fitting, f"to skip {path.rpartition('.')[2]!r}"])
        found = f"{args.group} for the {inputs} inputs of {path}"
        raise RequestError(f"group: got {found}; expected {expected}")
    if leaf._modules:
        raise RequestError(f"{path}: got a leaf with an adapter; expected to quantize it before")
    check_finite(path, leaf.weight.detach())


def check_finite(path: str, weight: Tensor) -> None:
    """Raise `RequestError` if the weight of a leaf that is to be quantized is not finite."""
    if weight.is_meta or bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        return
    raise RequestError(f"{path}.weight: got NaN or infinite numbers; expected finite ones")

"""Quantized leaves, and the surgery that makes them out of a built model's own and back.

A leaf changes its class and holds other parameters (`wq.qweight`, `wq.scales`) in place of
`wq.weight`; it stays the module it was, under its name, with its hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.base.errors import RequestError, nearest, notice
from transom.layers.linear import GroupedLinear, Linear, has_data
from transom.quantize.args import GROUPS, QuantizeArgs
from transom.quantize.formats import Parts, dequantize, empty_parts, quantize

M = TypeVar("M", bound=nn.Module)


class Quantized(nn.Module):
    """What a leaf has while it is quantized: `parts` of frozen parameters, and a weight made when
    asked for.
    """

    quantization: QuantizeArgs
    part_names: tuple[str, ...]

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its parameters as `formats.quantize` names them."""
        return {name: getattr(self, name) for name in self.part_names}

    @property
    def count(self) -> int:
        """Weights and biases, as many as while it is dense."""
        bias = self._parameters.get("bias")
        return 2 * self.parts["qweight"].numel() + (0 if bias is None else bias.numel())

    def dequantize(self) -> Tensor:
        """The weight [out, in] or [E, out, in], new at every call, in the dtype it had before."""
        return dequantize(self.parts, self.quantization.kind)

    @property
    def weight(self) -> Tensor:
        """`dequantize()`, for those who read a leaf's weight; writing it is an error."""
        return self.dequantize()


class QuantizedLinear(Quantized, Linear):  # type: ignore[override]  # its weight can be read only
    """y = x W^T with the weight in four bits."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.bias, self.quantization, self.parts)


class QuantizedGroupedLinear(Quantized, GroupedLinear):  # type: ignore[misc]  # its weight can be read only
    """E linears side by side with their weights in four bits."""

    def product(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """One expert after the other, so that one dense matrix is in memory; those without rows are
        left out.
        """
        if not has_data(rows_RD):
            return F.linear(rows_RD, self.weight[0])
        ends = ends_E.tolist()
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        *groups, behind = rows_RD.split([*sizes, len(rows_RD) - ends[-1]])
        parts = self.parts
        outputs = [
            product(rows, None, self.quantization, {name: part[e] for name, part in parts.items()})
            for e, rows in enumerate(groups)
            if len(rows)
        ]
        width, like = parts["qweight"].size(-2), (outputs or [rows_RD])[0]
        return torch.cat([*outputs, like.new_zeros(len(behind), width)])


def product(x: Tensor, bias: Tensor | None, args: QuantizeArgs, parts: Parts) -> Tensor:
    """x W^T + b in the dtype of x, or autocast's, where the weight lives for the product only."""
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    bias = None if bias is None else bias.to(x.dtype)
    made: Tensor = _Product.apply(x, bias, args, tuple(parts), *parts.values())
    return made


class _Product(torch.autograd.Function):
    """x W^T + b that keeps the codes of W for backward, and makes W of them again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        args: QuantizeArgs,
        names: tuple[str, ...],
        *parts: Tensor,
    ) -> Tensor:
        ctx.args, ctx.names = args, names
        ctx.save_for_backward(*parts)
        return F.linear(
            x, dequantize(dict(zip(names, parts, strict=True)), args.kind).to(x.dtype), bias
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            weight = dequantize(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), ctx.args.kind)
            of_x = gradient @ weight.to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, of_bias, None, None, *(None for _ in ctx.names)


_QUANTIZED: dict[type[Linear] | type[GroupedLinear], type[Quantized]] = {
    Linear: QuantizedLinear,
    GroupedLinear: QuantizedGroupedLinear,
}


def quantized_leaves(model: nn.Module) -> dict[str, Quantized]:
    """The quantized leaves by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def quantization_of(model: nn.Module) -> QuantizeArgs | None:
    """What the model was quantized with, for writing down; None where it was not."""
    return next((leaf.quantization for leaf in quantized_leaves(model).values()), None)


def dense_names(model: nn.Module) -> Iterator[str]:
    """The names its parameters have while it is dense: `wq.weight` stands for all parts of a
    quantized leaf.
    """
    held = quantized_leaves(model)
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, last = name.rpartition(".")
        if path not in held or last not in held[path].part_names:
            yield name
        elif last == "qweight":
            yield f"{path}.weight"


def quantize_model(model: M, args: QuantizeArgs, *, empty: bool = False) -> M:
    """Hold the weights of `Linear` and `GroupedLinear` leaves in four bits, frozen; in place, and
    returned.

    One leaf after the other: memory holds the model and what one leaf needs besides. With `empty`,
    and on the meta device, leaves get shapes only, for `load_state_dict`. A `RequestError` comes
    before any change.
    """
    chosen = _chosen(model, args)
    for path, leaf in chosen.items():
        _check(path, leaf, args, empty)
    total, bits, held = sum(parameter.numel() for parameter in model.parameters()), 0, 0
    for leaf in chosen.values():
        held += leaf.weight.numel()
        quantize_leaf(leaf, args, empty=empty)
        assert isinstance(leaf, Quantized), "what the surgery made of it"
        bits += 8 * sum(part.nbytes for part in leaf.parts.values())
    shares = f"{held:,} of {total:,} weights in {bits / held:.2f} bits each"
    notice(f"{args.kind} in groups of {args.group} on {len(chosen)} leaves: {shares}")
    return model


@torch.no_grad()
def quantize_leaf(leaf: Linear | GroupedLinear, args: QuantizeArgs, *, empty: bool = False) -> None:
    """Codes and scales in place of one leaf's weight; of shapes only with `empty` or on the meta
    device.
    """
    parts = (empty_parts if empty or leaf.weight.is_meta else quantize)(leaf.weight, args)
    del leaf.weight
    made = next(made for kind, made in _QUANTIZED.items() if isinstance(leaf, kind))
    leaf.__class__ = made  # type: ignore[assignment]
    assert isinstance(leaf, Quantized), "its class since the line before"
    leaf.quantization, leaf.part_names = args, tuple(parts)
    for name, part in parts.items():
        leaf.register_parameter(name, nn.Parameter(part, requires_grad=False))


@torch.no_grad()
def dequantize_model(model: M) -> M:
    """The dense model that adapters and activations saw, in place and returned; its weights are
    frozen as before.

    A model without quantized leaves is a `RequestError`. One leaf after the other, as
    `quantize_model` does.
    """
    found = quantized_leaves(model)
    if not found:
        raise RequestError("no leaf is quantized; expected a model after quantize_model")
    for leaf in found.values():
        weight = leaf.dequantize()
        for name in leaf.part_names:
            del leaf._parameters[name]
        del leaf.quantization, leaf.part_names
        dense = next(kind for kind, made in _QUANTIZED.items() if isinstance(leaf, made))
        leaf.__class__ = dense  # type: ignore[assignment]
        leaf.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return model


def _chosen(model: nn.Module, args: QuantizeArgs) -> dict[str, Linear | GroupedLinear]:
    """The leaves that are not skipped, by name; a name to skip that no module has is a
    `RequestError`.
    """
    paths = [path for path, _ in model.named_modules()]
    words = {word for path in paths for word in path.split(".")}
    for name in args.skip:
        # The default names what only some models have.
        if not any(_is_in(name, path) for path in paths) and name not in QuantizeArgs().skip:
            raise RequestError(f"skip: {name!r} is no module of this model{nearest(name, words)}")
    if quantized_leaves(model):
        raise RequestError(
            "the model is quantized already; expected one whose leaves have their weights"
        )
    chosen = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear | GroupedLinear)
        and not any(_is_in(name, path) for name in args.skip)
    }
    if not chosen:
        raise RequestError(
            f"skip: got {list(args.skip)}; expected what leaves at least one leaf to quantize"
        )
    return chosen


def _is_in(name: str, path: str) -> bool:
    return f".{name}." in f".{path}."


def _check(path: str, leaf: Linear | GroupedLinear, args: QuantizeArgs, empty: bool) -> None:
    """Refuse a leaf whose inputs do not fill groups, that carries adapters, or that holds bad
    numbers.
    """
    inputs = leaf.weight.size(-1)
    if inputs % args.group:
        fitting = [f"{group}, or" for group in GROUPS if inputs % group == 0][-1:]
        expected = " ".join([*fitting, f"to skip {path.rpartition('.')[2]!r}"])
        raise RequestError(
            f"group: got {args.group}; {path} has {inputs} inputs; expected {expected}"
        )
    if leaf._modules:
        raise RequestError(
            f"{path} carries an adapter; expected to quantize first, and then to add adapters"
        )
    if empty or leaf.weight.is_meta:
        return
    if not bool(torch.isfinite(torch.stack(torch.aminmax(leaf.weight.detach()))).all()):
        raise RequestError(f"{path}.weight holds NaN or infinite numbers; expected finite ones")

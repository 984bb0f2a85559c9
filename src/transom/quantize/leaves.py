"""Quantized leaves, and the surgery that makes them from the leaves of a built model, and back.

A leaf changes its class and gets other parameters (`wq.codes`, `wq.scales`) in place of
`wq.weight`. It stays the same module, with its name and its hooks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.base.runtime import large_pages, release_memory
from transom.layers.linear import Embedding, GroupedLinear, Linear, has_data
from transom.ops import products as ops
from transom.quantize import scaled, traced
from transom.quantize.formats import Parts, WeightFormat, dequantize, in_rows, shape_of
from transom.quantize.tiles import fits_tiles, in_tiles, multiplies_bytes

M = TypeVar("M", bound=nn.Module)
Dense = Linear | GroupedLinear | Embedding
# Weights that a product computes at a time: few stay in the cache of a CPU, and many keep other
# devices busy.
CPU_BLOCK, BLOCK = 1 << 20, 1 << 26
TOGETHER = 16 << 20  # bytes of leaves that are brought into tiles at a time


class Quantized(nn.Module):
    """A quantized leaf: frozen `parts`, and a weight that is computed when it is read.

    Attributes:
        format: The format of the parts.
        part_names: The names of its parameters.
        weight_dtype: The dtype of the weight. A cast of the module changes it, and no part.
    """

    format: WeightFormat
    part_names: tuple[str, ...]
    weight_dtype: torch.dtype

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its parameters, by the names in `quantize.formats`."""
        return {name: getattr(self, name) for name in self.part_names}

    @property
    def parts_in_rows(self) -> dict[str, Tensor]:
        """The parts as files and other programs order them, if `tile_weights` has changed them."""
        tiled = "tiles" in self.part_names
        return in_rows(self.parts, self.format) if tiled else self.parts

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return shape_of(self.parts, self.format)

    @property
    def count(self) -> int:
        """Weights and biases, as many as in the dense leaf."""
        bias = self._parameters.get("bias")
        return math.prod(self.shape) + (0 if bias is None else bias.numel())

    def dequantize(self) -> Tensor:
        """Compute the weight in float32, and round it once to `weight_dtype`."""
        return dequantize(self.parts, self.format).to(self.weight_dtype)

    @property
    def weight(self) -> Tensor:
        """The result of `dequantize`. It can't be written."""
        return self.dequantize()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.weight_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the parts as `fn` does, but keep their dtypes: rounded scales are others."""
        _set_parts(self, self.parts_in_rows)  # only the CPU multiplies tiles
        before = {name: part.detach() for name, part in self.parts.items()}
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device=before["codes"].device))
        super()._apply(fn, recurse)
        self.weight_dtype = probe.dtype
        for name, part in before.items():
            if getattr(self, name).dtype != part.dtype:
                self._parameters[name] = nn.Parameter(part.to(probe.device), requires_grad=False)
        return self


class QuantizedLinear(Quantized, Linear):  # type: ignore[override]  # the weight is read-only
    """y = x W^T with a quantized weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b [..., out] of x [..., in], in the dtype of x or of autocast."""
        return product(x, self.bias, self, self.parts)

    def multiply(self, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return `forward` with other rows of parts and of the bias."""
        parts = {name: rows[name] for name in self.part_names}
        return product(x, rows.get("bias"), self, parts)


class QuantizedEmbedding(Quantized, Embedding):  # type: ignore[override]  # the weight is read-only
    """A lookup of rows of a quantized weight [V, D]."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of tokens [...] as [..., D], of which no others are computed."""
        rows = dequantize(self.parts, self.format, tokens.flatten()).to(self.weight_dtype)
        return rows.view(*tokens.shape, -1)

    def project(self, h: Tensor) -> Tensor:
        """Return h W^T [..., V] of h [..., D]."""
        return product(h, None, self, self.parts)


class QuantizedGroupedLinear(Quantized, GroupedLinear):  # type: ignore[misc]  # the weight is read-only
    """E linears side by side with quantized weights."""

    def product(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply one expert after the other, so that one dense matrix is in memory.

        Experts without rows are skipped. Arguments and result are those of `GroupedLinear.forward`.
        """
        if not has_data(rows_RD):
            return F.linear(rows_RD, self.weight[0])
        ends = ends_E.tolist()
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        *groups, unused = rows_RD.split([*sizes, len(rows_RD) - ends[-1]])
        parts = self.parts
        outputs = [
            product(rows, None, self, {name: part[e] for name, part in parts.items()})
            for e, rows in enumerate(groups)
            if len(rows)
        ]
        width, like = self.shape[-2], (outputs or [rows_RD])[0]
        return torch.cat([*outputs, like.new_zeros(len(unused), width)])


def product(x: Tensor, bias: Tensor | None, leaf: Quantized, parts: Parts) -> Tensor:
    """Return x W^T + b in the dtype of x, or of autocast.

    W [out, in] has the format and dtype of a leaf. Few rows of x on the CPU are multiplied by
    `ops`, straight from the codes, if they need no gradient.
    """
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    format = leaf.format
    if "order" in parts:
        x = x.index_select(-1, parts["order"])
        parts = {name: part for name, part in parts.items() if name != "order"}
    if traced.takes(x):
        return traced.product(x, bias, parts, format)
    trains = x.requires_grad or (bias is not None and bias.requires_grad)
    trains = trains and torch.is_grad_enabled()
    if not trains and scaled.takes(x, parts):
        return scaled.product(x, bias, parts)
    if not trains and ops.takes(x, "tiles" in parts and multiplies_bytes(format)):
        y = ops.product(x, bias, parts, format.levels, format.scales, format.block)
        if y is not None:
            return y
    return plain_product(x, bias, format, leaf.weight_dtype, parts)


def plain_product(
    x: Tensor, bias: Tensor | None, format: WeightFormat, dtype: torch.dtype, parts: Parts
) -> Tensor:
    """Return x W^T + b in the dtype of x, from dense rows of W in a dtype: some at a time."""
    bias = None if bias is None else bias.to(x.dtype)
    return _Product.apply(x, bias, format, dtype, tuple(parts), *parts.values())


class _Product(torch.autograd.Function):
    """x W^T + b that keeps the codes of W for the backward pass, and computes W again there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        format: WeightFormat,
        dtype: torch.dtype,
        names: tuple[str, ...],
        *parts: Tensor,
    ) -> Tensor:
        ctx.format, ctx.dtype, ctx.names = format, dtype, names
        ctx.save_for_backward(*parts)
        named = dict(zip(names, parts, strict=True))
        outputs = [
            F.linear(
                x,
                dequantize(named, format, rows).to(dtype).to(x.dtype),
                None if bias is None else bias[rows],
            )
            for rows in _row_blocks(named, format)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            named = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            wide = torch.promote_types(gradient.dtype, torch.float32)
            inputs = shape_of(named, ctx.format)[-1]
            total = gradient.new_zeros(*gradient.shape[:-1], inputs, dtype=wide)
            for rows in _row_blocks(named, ctx.format):
                weight = dequantize(named, ctx.format, rows).to(ctx.dtype).to(gradient.dtype)
                total = total + (gradient[..., rows] @ weight)
            of_x = total.to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, of_bias, None, None, None, *(None for _ in ctx.names)


def _row_blocks(parts: Parts, format: WeightFormat) -> list[slice]:
    """Return slices of rows with at most `BLOCK` weights each (`CPU_BLOCK` there), or one row."""
    rows, inputs = shape_of(parts, format)
    block = CPU_BLOCK if parts["scales"].device.type == "cpu" else BLOCK
    step = max(1, block // inputs)
    return [slice(start, start + step) for start in range(0, rows, step)]


_QUANTIZED: dict[type[Dense], type[Quantized]] = {
    Linear: QuantizedLinear,
    GroupedLinear: QuantizedGroupedLinear,
    Embedding: QuantizedEmbedding,
}


def quantized_leaves(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized leaves of a model by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def dense_names(model: nn.Module) -> Iterator[str]:
    """Yield the names that the parameters have in the dense model.

    `wq.weight` stands for all parts of a quantized leaf.
    """
    leaves = quantized_leaves(model)
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, last = name.rpartition(".")
        if path not in leaves or last not in leaves[path].part_names:
            yield name
        elif last in ("codes", "tiles"):
            yield f"{path}.weight"


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of a model; a quantized leaf counts as a dense one."""
    leaves = quantized_leaves(model).values()
    parts = sum(part.numel() for leaf in leaves for part in leaf.parts.values())
    weights = sum(math.prod(leaf.shape) for leaf in leaves)
    return sum(parameter.numel() for parameter in model.parameters()) - parts + weights


def replace_weight(
    leaf: Dense, parts: Parts, format: WeightFormat, dtype: torch.dtype | None = None
) -> None:
    """Replace the weight of one leaf by frozen parts.

    Args:
        leaf: A dense leaf without adapters, possibly on the meta device.
        parts: The parts of a weight of the same shape; those of `empty_parts` can be loaded later.
        format: Their format.
        dtype: The dtype of the weight when it is computed; None for its dtype until now.
    """
    dtype = dtype or leaf.weight.dtype
    assert shape_of(parts, format) == leaf.weight.shape, "as the caller checked"
    del leaf.weight
    made = next(made for kind, made in _QUANTIZED.items() if isinstance(leaf, kind))
    leaf.__class__ = made  # type: ignore[assignment]
    assert isinstance(leaf, Quantized), "its class since the line before"
    leaf.format, leaf.part_names, leaf.weight_dtype = format, (), dtype
    _set_parts(leaf, parts)


def _set_parts(leaf: Quantized, parts: Parts) -> None:
    if tuple(parts) == leaf.part_names:
        return
    for name in leaf.part_names:
        del leaf._parameters[name]
    leaf.part_names = tuple(parts)
    for name, part in parts.items():
        leaf.register_parameter(name, nn.Parameter(part, requires_grad=False))


@torch.inference_mode(False)  # tensors of generation could not be trained with afterwards
def tile_weights(model: nn.Module) -> None:
    """Rearrange the parts of quantized leaves for the products in C++, where that is faster.

    Args:
        model: A model. Leaves that fit `quantize.tiles.in_tiles` change in place, and compute the
            same numbers. A move or a cast of the model changes them back.
    """
    leaves = [leaf for leaf in quantized_leaves(model).values() if "tiles" not in leaf.part_names]
    fitting = [leaf for leaf in leaves if fits_tiles(leaf.parts, leaf.format)]
    # Parts lie side by side, so that they fill large pages. Some leaves at a time: memory has their
    # parts twice meanwhile.
    while fitting:
        sizes = itertools.accumulate(_aligned_bytes(leaf) for leaf in fitting)
        count = 1 + sum(size <= TOGETHER for size in sizes)
        some, fitting = fitting[:count], fitting[count:]
        room = large_pages(torch.empty(sum(map(_aligned_bytes, some)), dtype=torch.uint8))
        for leaf in some:
            parts = {}
            for name, part in in_tiles(leaf.parts, leaf.format).items():
                own, room = room[: part.nbytes], room[_aligned(part.nbytes) :]
                parts[name] = own.view(part.dtype).view(part.shape).copy_(part)
            _set_parts(leaf, parts)
        release_memory()


def _aligned_bytes(leaf: Quantized) -> int:
    return sum(_aligned(part.nbytes) for part in leaf.parts.values())


def _aligned(size: int) -> int:
    return -(-size // 64) * 64  # bytes of a line of the cache


@torch.no_grad()
def dequantize_model(model: M) -> M:
    """Replace the codes by the dense weights that they stand for.

    Args:
        model: A quantized model. It is changed in place, and its weights stay frozen.

    Returns:
        The same model.

    Raises:
        RequestError: No leaf is quantized.
    """
    found = quantized_leaves(model)
    if not found:
        raise RequestError("model: got no quantized leaf; expected a quantized model")
    for leaf in found.values():
        weight = leaf.dequantize()
        for name in leaf.part_names:
            del leaf._parameters[name]
        del leaf.format, leaf.part_names, leaf.weight_dtype
        dense = next(kind for kind, made in _QUANTIZED.items() if isinstance(leaf, made))
        leaf.__class__ = dense  # type: ignore[assignment]
        leaf.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return model

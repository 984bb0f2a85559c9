"""The leaves: the three kinds of module that have large weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.layers.initial import draw_weight


class Linear(nn.Linear):
    """y = x W^T with a weight [out, in], without a bias by default.

    Attributes:
        joined: The parameters of this leaf and of others with the same input, one below the other,
            while `products` multiplies them as one.
    """

    joined: Mapping[str, Tensor] | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weight and set the bias to zero. The constructor calls this."""
        draw_weight(self.weight)
        if self.bias is not None and not self.bias.is_meta:
            nn.init.zeros_(self.bias)

    def multiply(self, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return `forward` with other rows of parameters."""
        return F.linear(x, rows["weight"], rows.get("bias"))


def products(x: Tensor, *leaves: Linear) -> Sequence[Tensor]:
    """Return the product [..., out] of x [..., in] with each leaf, as one product if it can."""
    joined: Mapping[str, Tensor] | None = getattr(leaves[0], "joined", None)
    if joined is None or torch.is_grad_enabled():
        return [leaf(x) for leaf in leaves]
    sizes = [leaf.out_features for leaf in leaves]
    # A compiler computes one row as sums. Of sums of equal size it makes one kernel itself, and
    # what follows becomes a part of it.
    if len({*sizes}) == 1 and x.numel() == x.size(-1) and torch.compiler.is_compiling():
        return [leaf(x) for leaf in leaves]
    return leaves[0].multiply(x, joined).split(sizes, -1)


class Embedding(nn.Embedding):
    """A lookup of rows of the weight [V, D]."""

    def reset_parameters(self) -> None:
        """Draw the weight as torch does, except on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.weight.dtype

    def project(self, h: Tensor) -> Tensor:
        """Return h W^T [..., V] of h [..., D], as an output that shares the weight."""
        # Trained embeddings beside frozen halves are wider than the hidden states.
        return F.linear(h, self.weight.to(h.dtype))


def tied_output(leaf: nn.Module, h: Tensor) -> Tensor:
    """Return the product [..., V] of h [..., D] with embeddings, or with PEFT's form of them."""
    if isinstance(leaf, Embedding):
        return leaf.project(h)
    weight: Tensor = leaf.weight  # type: ignore[assignment]  # of a module
    return F.linear(h, weight.to(h.dtype))


class GroupedLinear(nn.Module):
    """E linears side by side, with a weight [E, out, in] and a bias [E, out].

    Each multiplies its own rows, which are sorted by linear.
    """

    def __init__(
        self, num_groups: int, in_features: int, out_features: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_groups, out_features)) if bias else None
        draw_weight(self.weight)

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply rows [ends[e - 1], ends[e]) by linear e.

        Args:
            rows_RD: Rows [R, in], sorted by linear.
            ends_E: Integers [E], the end of each linear's rows. Rows after the last end belong to
                no linear: their output and its gradient have no meaning.

        Returns:
            [R, out] in the dtype of the rows.
        """
        out_RD = self.product(rows_RD, ends_E)
        if self.bias is None or not has_data(rows_RD):
            return out_RD
        # Rows of no linear get a row of zeros, which takes their meaningless gradient.
        return out_RD + per_row(self.bias.to(out_RD.dtype), ends_E, rows_RD.size(0), fill=0.0)

    def product(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Return `forward` without the bias."""
        return grouped_product(rows_RD, self.weight, ends_E)

    def loop(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Compute `forward` one linear after the other, as a reference."""
        out_RD = looped_product(rows_RD, self.weight, ends_E)
        if self.bias is None:
            return out_RD
        return out_RD + per_row(self.bias.to(out_RD.dtype), ends_E, len(rows_RD), fill=0.0)


def grouped_product(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply rows [ends[e - 1], ends[e]) by the transpose of matrix e.

    It is one grouped product where torch has a kernel for it, and a loop elsewhere.

    Args:
        rows_RI: Rows [R, in], sorted by matrix.
        weight_EOI: Matrices [E, out, in].
        ends_E: Integers [E], the end of each matrix's rows.

    Returns:
        [R, out].
    """
    if torch.compiler.is_exporting():
        return exported_product(rows_RI, weight_EOI, ends_E)
    if not has_data(rows_RI):
        return F.linear(rows_RI, weight_EOI[0])  # all groups have this shape
    if torch.is_autocast_enabled(rows_RI.device.type):  # autocast does not know grouped products
        rows_RI = rows_RI.to(torch.get_autocast_dtype(rows_RI.device.type))
    # Grouped kernels need rows that start at multiples of 16 bytes.
    aligned = all(size * rows_RI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    if not aligned or not grouped_mm_works(rows_RI.device.type, rows_RI.dtype):
        return looped_product(rows_RI, weight_EOI, ends_E)
    return F.grouped_mm(rows_RI, weight_EOI.to(rows_RI.dtype).mT, offs=ends_E.to(torch.int32))


def looped_product(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Compute the grouped product one matrix after the other; rows after the last end are zero."""
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    # unbind instead of weight[e], whose gradient would have the full size for every expert.
    weights = weight_EOI.to(rows_RI.dtype).unbind(0)
    parts = [F.linear(rows_RI[a:b], w) for a, b, w in zip(starts, ends, weights, strict=True)]
    return torch.cat([*parts, rows_RI.new_zeros(len(rows_RI) - ends[-1], weight_EOI.size(1))])


def exported_product(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Compute the grouped product without sizes that depend on numbers, for an exported program.

    A fixed number of rows reads the matrix of each row. Otherwise all matrices multiply all rows.
    """
    of_R = torch.searchsorted(
        ends_E, torch.arange(rows_RI.size(0), device=ends_E.device), right=True
    )
    if isinstance(rows_RI.size(0), int):
        weights = weight_EOI.index_select(0, of_R.clamp(max=weight_EOI.size(0) - 1))
        return torch.bmm(weights.to(rows_RI.dtype), rows_RI.unsqueeze(-1)).squeeze(-1)
    out = rows_RI.new_zeros(rows_RI.size(0), weight_EOI.size(1))
    for expert, weight in enumerate(weight_EOI.to(rows_RI.dtype).unbind(0)):
        out = torch.where((of_R == expert).unsqueeze(-1), F.linear(rows_RI, weight), out)
    return out


def per_row(values_EO: Tensor, ends_E: Tensor, rows: int, fill: float) -> Tensor:
    """Return the vector of each row's group [R, O]; rows after the last end get `fill`."""
    of_R = torch.searchsorted(ends_E, torch.arange(rows, device=ends_E.device), right=True)
    return F.pad(values_EO, (0, 0, 0, 1), value=fill).index_select(0, of_R)


def has_data(x: Tensor) -> bool:
    """Return False for meta and fake tensors, which have a shape only.

    While a program is exported, it is True: fake tensors stand for those of the program.
    """
    if torch.compiler.is_exporting():
        return True
    return x.device.type != "meta" and type(torch.empty(0)) is Tensor


def grouped_mm_works(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether torch has a grouped product for this device and dtype."""
    # A trace can't try it, and torch's shape rule for it accepts this dtype only.
    if torch.compiler.is_compiling():
        return dtype is torch.bfloat16
    return _tried_grouped_mm(device_type, dtype)


@functools.cache
def _tried_grouped_mm(device_type: str, dtype: torch.dtype) -> bool:
    """Run one small grouped product and check its numbers."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        rows = torch.ones(16, 16, device=device_type, dtype=dtype)
        weight = torch.ones(2, 16, 16, device=device_type, dtype=dtype)
        ends = torch.tensor([8, 16], device=device_type, dtype=torch.int32)
        return bool((F.grouped_mm(rows, weight.mT, offs=ends) == 16).all())
    except (RuntimeError, NotImplementedError):
        return False

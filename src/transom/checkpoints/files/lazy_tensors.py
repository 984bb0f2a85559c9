"""Tensors that are known by shape and dtype and read only when asked for: what makes loading a
stream.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transom.base.errors import RequestError, WorkError
from transom.names.transforms import Shape


@dataclass(frozen=True)
class LazyTensor:
    """One tensor to be; `read` returns it, as a view of a memory map wherever nothing has to be
    computed.
    """

    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def meta(self) -> Tensor:
        """Shape and dtype as a tensor on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def then(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """What `change`, which must work on the meta device too, makes of this tensor."""
        after = change(self.meta)
        return LazyTensor(tuple(after.shape), after.dtype, lambda: change(self.read()))


LazyTensors = Mapping[str, LazyTensor]


def main_dtype(source: LazyTensors) -> torch.dtype:
    """Return the smallest dtype that holds all parameters but choice biases: float32 for bfloat16
    and float16.
    """
    kinds = (stored.dtype for name, stored in source.items() if not _is_wide(name))
    return functools.reduce(torch.promote_types, kinds)


def _is_wide(name: str) -> bool:
    # The biases that help to choose experts move in steps too small for half precision, and no
    # product reads them.
    return name.endswith("choice_bias")


def dtypes_of(source: LazyTensors, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype in which each of our parameters is kept: `dtype`, or `main_dtype`."""
    kind = dtype or main_dtype(source)
    return {
        name: torch.promote_types(kind, torch.float32) if _is_wide(name) else kind
        for name in source
    }


def cast(source: LazyTensors, dtype: torch.dtype | None) -> LazyTensors:
    """Our parameters in another dtype; None keeps each one's own."""
    if dtype is None:
        return source
    kinds = dtypes_of(source, dtype)
    return {name: _cast(name, stored, kinds[name]) for name, stored in source.items()}


def _cast(name: str, stored: LazyTensor, kind: torch.dtype) -> LazyTensor:
    return (
        stored
        if stored.dtype == kind
        else stored.then(functools.partial(narrowed, name, kind=kind))
    )


def narrowed(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    """Return `tensor` in the dtype `kind`; raise a `WorkError` with its name if numbers are too
    large.
    """
    out = tensor.to(kind)
    most = torch.finfo(kind).max
    if tensor.is_meta or most >= torch.finfo(tensor.dtype).max or not tensor.numel():
        return out
    if not bool((torch.stack(torch.aminmax(tensor)).abs() <= most).all()):  # NaN is looked at too
        lost = int((out.isinf() & tensor.isfinite()).sum())
        word = str(kind).removeprefix("torch.")
        if lost:
            raise WorkError(
                f"{name}: {lost} weights are too large for {word}, which ends at {most:g}; "
                f"bfloat16 and float32 hold them"
            )
    return out


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a file that are made together: their keys, their outlines, and how to make
    them.
    """

    keys: Sequence[str]
    metas: Sequence[Tensor]
    read: Callable[[], Sequence[Tensor]]


# Endings of keys that only quantized checkpoints have, and what they are; the first that is met
# counts.
_QUANTIZED = (
    (r"\.g_idx|\.qzeros", "GPTQ or AWQ"),
    (r"_blocks", "MXFP4"),
    (r"\.absmax|\.quant_state\..*|\.quant_map|\.SCB", "bitsandbytes"),
    (r"\.weight_scale_inv", "FP8 in blocks"),
    (r"\.weight_packed|\.weight_shape", "compressed-tensors"),
    (r"\.biases", "MLX"),
    (r"\.(weight|input|output)_scale|\.qscale_(weight|act)", "FP8 with scales"),
    (r"\.qweight", "a packed format"),
    (r"\.scales?", "weights with scales"),
)


def refuse_quantized(source: LazyTensors, where: str) -> None:
    """Weights in a form that is no number per weight are a `RequestError` naming the kind."""
    odd = {key for key, stored in source.items() if not _is_plain(stored.dtype)}
    for pattern, kind in _QUANTIZED if odd else ():
        named = next((key for key in source if re.search(f"({pattern})$", key)), None)
        if named is not None:
            raise RequestError(
                f"{where}: {named}: quantized as {kind}; expected weights that are not quantized"
            )
    for key in sorted(odd):
        kind = str(source[key].dtype).removeprefix("torch.")
        if kind.startswith("float8") or key.endswith("weight"):
            raise RequestError(f"{where}: {key} is {kind}: quantized; expected {_PLAIN}")


_PLAIN = "float32, bfloat16, float16 or float64"


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)

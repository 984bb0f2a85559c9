"""Tensors with a known shape and dtype that are read when they are needed, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transom.base.errors import WorkError, expect
from transom.checkpoints.files.file_pieces import FilePiece
from transom.names.transforms import Shape

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet.

    `read` returns it, as a view of a memory map if nothing has to be computed. `mapped` is whether
    that view is known to be one: reading it then costs nothing. `pieces` are the places of its
    bytes in files, one after the other, if they are known and nothing has to be computed.
    """

    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]
    mapped: bool = False
    pieces: tuple[FilePiece, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor, *, mapped: bool = False) -> LazyTensor:
        """Return a lazy tensor for one that is in memory or mapped."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, mapped)

    @property
    def meta(self) -> Tensor:
        """An empty tensor of this shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def then(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return the result of `change`, which must work on the meta device too."""
        return LazyTensor.made_of([self], lambda tensors: change(tensors[0]))

    @classmethod
    def made_of(
        cls, parts: Sequence[LazyTensor], make: Callable[[Sequence[Tensor]], Tensor]
    ) -> LazyTensor:
        """Return what `make` makes of several tensors; it must work on the meta device too."""
        metas = [part.meta for part in parts]
        meta = make(metas)
        mapped = any(part.mapped and meta is one for part, one in zip(parts, metas, strict=True))
        return cls(
            tuple(meta.shape), meta.dtype, lambda: make([part.read() for part in parts]), mapped
        )


LazyTensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are computed together.

    Attributes:
        keys: Their names.
        metas: Their shapes and dtypes, as tensors on the meta device.
        read: Returns all of them.
        pieces: As for `LazyTensor`, if there is one.
    """

    keys: Sequence[str]
    metas: Sequence[Tensor]
    read: Callable[[], Sequence[Tensor]]
    pieces: tuple[FilePiece, ...] = ()

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(meta.nbytes for meta in self.metas)

    @classmethod
    def of(cls, key: str, lazy: LazyTensor) -> TensorGroup:
        """Return the group of a single tensor."""
        return cls((key,), (lazy.meta,), lambda: [lazy.read()])


def main_dtype(source: LazyTensors) -> torch.dtype:
    """Return the narrowest dtype that holds all parameters, except for choice biases.

    That of bfloat16 and float16 together is float32.
    """
    kinds = (lazy.dtype for name, lazy in source.items() if not _stays_wide(name))
    return functools.reduce(torch.promote_types, kinds)


def _stays_wide(name: str) -> bool:
    # The biases that choose experts move in steps too small for half precision. No product reads
    # them, so they cost nothing in float32.
    return name.endswith("choice_bias")


def dtypes_of(source: LazyTensors, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter in a model of `dtype`; None stands for `main_dtype`.

    Choice biases are float32 or wider.
    """
    kind = dtype or main_dtype(source)
    wide = torch.promote_types(kind, torch.float32)
    return {name: wide if _stays_wide(name) else kind for name in source}


def cast(source: LazyTensors, dtype: torch.dtype | None) -> LazyTensors:
    """Return parameters in another dtype; None keeps the dtype of each."""
    if dtype is None:
        return source
    kinds, out = dtypes_of(source, dtype), dict(source)
    for name, lazy in source.items():
        if lazy.dtype != kinds[name]:
            out[name] = lazy.then(functools.partial(narrowed, name, kind=kinds[name]))
    return out


def narrowed(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    """Return a tensor in the dtype `kind`.

    Raises:
        WorkError: Finite numbers become infinite; the message has the `name`.
    """
    out = tensor.to(kind)
    if out.is_meta or not bool(out.isinf().any()):
        return out
    lost = int(tensor[out.isinf()].isfinite().sum())
    if lost:
        word, most = str(kind).removeprefix("torch."), torch.finfo(kind).max
        raise WorkError(
            f"{name}: {lost} weights are too large for {word}, whose largest number is {most:g}; "
            "expected bfloat16 or float32"
        )
    return out


def refuse_quantized(source: LazyTensors, where: str) -> None:
    """Refuse tensors that are not one number per weight.

    Raises:
        RequestError: The dtype of a tensor is none of `PLAIN_DTYPES`.
    """
    plain = ", ".join(str(dtype).removeprefix("torch.") for dtype in PLAIN_DTYPES)
    for key, lazy in source.items():
        expected = f"weights that are not quantized: {plain}"
        expect(lazy.dtype in PLAIN_DTYPES, f"{where}: {key}: dtype", lazy.dtype, expected)

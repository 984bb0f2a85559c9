"""The attention backends by name, and the one a model uses when nobody chose."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from transom.attend.mask import MaskSpec
from transom.attend.reference import reference
from transom.attend.sdpa import sdpa
from transom.attend.view import CacheView, Score
from transom.errors import RequestError, nearest


class Attend(Protocol):
    """attend(q [B, T, N, H], view, spec, score) -> [B, T, N, H]; fully masked rows give zeros."""

    def __call__(self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: Score, /) -> Tensor: ...


BACKENDS: dict[str, Attend] = {"sdpa": sdpa, "reference": reference}


def backend(name: str) -> Attend:
    """The backend of that name."""
    if name not in BACKENDS:
        raise RequestError(f"attention backend {name!r}: known are {', '.join(BACKENDS)}{nearest(name, BACKENDS)}")
    return BACKENDS[name]

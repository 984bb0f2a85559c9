"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024).

Shape letters: N matrices, O out (rows), I in (columns); S the shorter and L the longer of O and I.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transom.base.errors import RequestError, expect, require
from transom.distributed.matrices import MatrixExchange, MatrixPart, Region, parts_of, regions
from transom.distributed.parts import local_part

# Coefficients (a, b, c) of x -> a x + b x^3 + c x^5, step by step: the best ones for singular
# values from 1e-3 to 1 (Amsel et al. 2025, "The Polar Express", arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001646454489),
)
# Each step takes x / SAFETY: a singular value that rounding has put above the interval of its step
# would diverge in the next ones.
SAFETY = 1.01
# Below this norm a matrix counts as zero; its square is still a normal float32.
SMALLEST_NORM = 1e-12
# Steps on one Gram matrix before it is computed again. Four of them multiply its rounding error by
# about 446^2, which is a few percent in float32; half precision allows one step only.
GRAM_STEPS = {torch.float32: 4, torch.float64: 4}


def orthogonalize(x_NOI: Tensor, steps: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrices, U V^T of the SVD.

    With s = singular value / Frobenius norm, every s >= 1e-3 becomes 0.42 to 1.57 after 4 steps,
    0.84 to 1.13 after 5, and within 1e-4 of 1 after 7. A smaller s is multiplied by 429 (4 steps),
    so that a zero matrix stays zero and never becomes NaN. float32 is within 1e-4 of these numbers,
    bfloat16 within 0.02 for s >= 1e-2, with rounding noise below that.

    Args:
        x_NOI: The matrices.
        steps: Steps of the iteration, 1 to 7.
        dtype: Dtype of the arithmetic.

    Returns:
        Matrices with the shape and dtype of `x_NOI`.

    Raises:
        RequestError: If the shape or `steps` is wrong.
    """
    expect(x_NOI.ndim == 3, "shape", tuple(x_NOI.shape), "[N, out, in]")
    coefficients = _coefficients(steps)
    x = x_NOI.to(torch.promote_types(x_NOI.dtype, torch.float32))
    norm_N11 = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(SMALLEST_NORM)
    x = (x / norm_N11).to(dtype)
    out_features, in_features = x.shape[1:]
    x_NLS = x if out_features >= in_features else x.mT
    stride = _steps_per_gram(out_features, in_features, dtype)
    for start in range(0, steps, stride):
        factor_NSS = _polynomial(torch.bmm(x_NLS.mT, x_NLS), coefficients[start : start + stride])
        x_NLS = torch.bmm(x_NLS, factor_NSS)
    result_NOI: Tensor = x_NLS if out_features >= in_features else x_NLS.mT
    return result_NOI.to(x_NOI.dtype)


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 for CUDA devices of capability 8 or higher, and float32 for others."""
    # Most CPUs have no bfloat16 product: there it is a plain loop, 100 times slower than float32.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def matrices_per_batch(elements: int, device_type: str) -> int:
    """Return how many matrices of `elements` elements share one batched product.

    They have 2^20 elements together on the CPU, and 2^26 on other devices.
    """
    # Products of small matrices are too short alone; large matrices are faster one by one, in the
    # cache.
    return max(1, (2**20 if device_type == "cpu" else 2**26) // elements)


def _coefficients(steps: int) -> list[tuple[float, float, float]]:
    expect(1 <= steps <= len(POLAR_EXPRESS), "steps", steps, f"1 to {len(POLAR_EXPRESS)}")
    return [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:steps]]


def _steps_per_gram(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    # A step on the matrix itself costs 2 L/S + 1 square products, a step on its Gram matrix 4 (and
    # 2 L/S once): equal at L/S = 1.5, whatever the number of steps (Zhang et al. 2026, "Gram
    # Newton-Schulz").
    short, long = sorted((out_features, in_features))
    return GRAM_STEPS.get(dtype, 1) if 2 * long > 3 * short else 1


def _polynomial(gram_NSS: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """Return Q(G), so that X Q(X^T X) is X after the odd polynomials of `coefficients` in turn."""
    product_NSS: Tensor | None = None
    for step, (a, b, c) in enumerate(coefficients):
        factor_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
        factor_NSS.diagonal(dim1=1, dim2=2).add_(a)
        product_NSS = factor_NSS if product_NSS is None else torch.bmm(product_NSS, factor_NSS)
        if step + 1 < len(coefficients):
            gram_NSS = torch.bmm(torch.bmm(factor_NSS, gram_NSS), factor_NSS)
    assert product_NSS is not None, "at least one step"
    return product_NSS


class MatrixState(NamedTuple):
    """One matrix of a step, or this rank's part of it.

    Attributes:
        weight: Rows and columns.
        gradient: Of the same shape.
        momentum: Of the same shape.
        regions: What each rank has of a divided matrix; None if this rank has all of it.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    regions: Sequence[Region] | None


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, for [out, in] and [E, out, in] parameters (E matrices).

    The update is lr * sqrt(max(1, out / in)) * orthogonalize(momentum), and weight decay is
    decoupled (lr * decay). The update does not depend on the size of the momentum: a matrix whose
    gradient is zero, such as an expert without tokens, keeps moving at full speed in its last
    direction. Without momentum it only decays.

    Ranks that have parts of a matrix keep their parts of its momentum. One rank, each in turn,
    gathers what is orthogonalised and sends the parts of the update back (as in Liu et al. 2025,
    "Muon is Scalable for LLM Training", arXiv 2502.16982). Stacked matrices that are divided along
    the stack are complete on their ranks, and none is sent.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 4,
        compute_dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Set the defaults of all groups.

        Args:
            params: Parameters or groups.
            lr: The learning rate.
            momentum: Decay of the running mean.
            weight_decay: Decoupled decay.
            steps: Steps of the orthogonalisation.
            compute_dtype: Its dtype; None is `default_compute_dtype`.
            group: The ranks that have the parts of divided parameters.
        """
        _coefficients(steps)
        self._exchange = None if group is None else MatrixExchange(group)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"steps": steps, "compute_dtype": compute_dtype})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of 2-D and 3-D parameters, and make their momentum."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            shape = tuple(parameter.shape)
            expected = "Muon accepts [out, in] and [experts, out, in]"
            require(len(shape) in (2, 3), "shape", shape, expected)
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Closures are not supported."""
        if closure is not None:
            raise RequestError("closure: Muon evaluates no closure; expected None")
        for group in self.param_groups:
            for shape, batch in self._batches(group["params"]):
                self._update(shape, batch, group)

    def _batches(self, parameters: list[Tensor]) -> Iterator[tuple[torch.Size, list[MatrixState]]]:
        """Yield matrices of one shape, dtype and device, as many as one batched product takes.

        It is one batched product on every rank, if each matrix is divided.
        """
        alike: dict[tuple[Any, ...], list[MatrixState]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            tensors = (parameter.detach(), parameter.grad, self.state[parameter]["momentum_buffer"])
            local = [local_part(tensor) for tensor in tensors]
            where = self._regions(parameter)
            if where is None or self._exchange is None:
                views = [t.unbind(0) if t.ndim == 3 else (t,) for t in local]
                made = [MatrixState(w, g, m, None) for w, g, m in zip(*views, strict=True)]
            else:
                columns = [parts_of(t, where, self._exchange.rank) for t in local]
                made = [
                    MatrixState(w.local, g.local, m.local, w.regions)
                    for w, g, m in zip(*columns, strict=True)
                ]
            key = (parameter.shape[-2:], parameter.dtype, parameter.device, where is None)
            alike[key].extend(made)
        for (shape, _, device, whole), matrices in alike.items():
            size = matrices_per_batch(shape.numel(), device.type)
            size *= 1 if whole or self._exchange is None else len(self._exchange.ranks)
            for start in range(0, len(matrices), size):
                yield shape, matrices[start : start + size]

    def _regions(self, parameter: Tensor) -> list[Region] | None:
        """Return where the ranks have the parts of a parameter whose matrices are divided."""
        if not isinstance(parameter, DTensor):
            return None
        assert self._exchange is not None, "the caller gives the ranks of divided parameters"
        where = regions(parameter, self._exchange.ranks)
        sizes = [slice(0, size) for size in parameter.shape]
        # Experts may be elsewhere, and every one is complete.
        return None if all([*one[-2:]] == sizes[-2:] for one in where) else where

    def _update(self, shape: torch.Size, batch: list[MatrixState], group: dict[str, Any]) -> None:
        weights, gradients, momenta, where = (list(column) for column in zip(*batch, strict=True))
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        dtype = group["compute_dtype"] or default_compute_dtype(ahead[0].device)
        change = functools.partial(orthogonalize, steps=group["steps"], dtype=dtype)
        if where[0] is None or self._exchange is None:
            updates = list(change(torch.stack(ahead)).unbind(0))
        else:
            parts = [MatrixPart(*one) for one in zip(ahead, where, strict=True)]
            updates = self._exchange.change(parts, shape, change)
        out_features, in_features = shape
        rate = group["lr"] * max(1.0, out_features / in_features) ** 0.5
        if group["weight_decay"] > 0:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-rate)

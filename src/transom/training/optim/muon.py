"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024).

Shape letters: N matrices, O out (rows), I in (columns); S the shorter and L the longer of O and I.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from transom.base.errors import RequestError, require

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
    require(x_NOI.ndim == 3, "shape", tuple(x_NOI.shape), "expected [N, out, in]")
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
    expected = f"expected 1 to {len(POLAR_EXPRESS)}"
    require(1 <= steps <= len(POLAR_EXPRESS), "steps", steps, expected)
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


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, for [out, in] and [E, out, in] parameters (E matrices).

    The update is lr * sqrt(max(1, out / in)) * orthogonalize(momentum), and weight decay is
    decoupled (lr * decay). The update does not depend on the size of the momentum: a matrix whose
    gradient is zero, such as an expert without tokens, keeps moving at full speed in its last
    direction. Without momentum it only decays.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 4,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Set the defaults of all groups; `compute_dtype` None is `default_compute_dtype`."""
        _coefficients(steps)
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
            for batch in self._batches(group["params"]):
                self._update(batch, group)

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[tuple[Tensor, ...]]]:
        """Yield matrices of one shape, dtype and device, as many as one batched product takes.

        Each is a tuple of views: weight, gradient and momentum [out, in].
        """
        alike: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            tensors = (parameter.detach(), parameter.grad, self.state[parameter]["momentum_buffer"])
            views = (t.unbind(0) if t.ndim == 3 else (t,) for t in tensors)
            key = (parameter.shape[-2:], parameter.dtype, parameter.device)
            alike[key].extend(zip(*views, strict=True))
        for (shape, _, device), matrices in alike.items():
            size = matrices_per_batch(shape.numel(), device.type)
            for start in range(0, len(matrices), size):
                yield matrices[start : start + size]

    def _update(self, batch: list[tuple[Tensor, ...]], group: dict[str, Any]) -> None:
        weights, gradients, momenta = (list(column) for column in zip(*batch, strict=True))
        out_features, in_features = weights[0].shape
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead_NOI = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        dtype = group["compute_dtype"] or default_compute_dtype(ahead_NOI.device)
        update_NOI = orthogonalize(ahead_NOI, group["steps"], dtype)
        rate = group["lr"] * max(1.0, out_features / in_features) ** 0.5
        if group["weight_decay"] > 0:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, update_NOI.unbind(0), alpha=-rate)

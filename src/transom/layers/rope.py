"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) as a function of positions.

No table is a parameter or a buffer: `module.to(bfloat16)` would ruin it, and positions travel with the data.
Angles are computed in float32 per call, once per distinct `RopeArgs`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transom.args import RopeArgs, RopeLayout


def apply_scaling(
    freqs: Tensor,
    scale_factor: float,
    high_freq_factor: float,
    old_context_len: int = 8192,
    low_freq_factor: float = 1.0,
) -> Tensor:
    """Llama 3's rule: long wavelengths slow down by `scale_factor`, short ones stay, the rest blend."""
    wavelength = 2 * math.pi / freqs
    # With high == low the blend is empty; the floor and the clamp only keep its unused value finite.
    span = max(high_freq_factor - low_freq_factor, 1e-9)
    smooth = ((old_context_len / wavelength - low_freq_factor) / span).clamp(0, 1)
    blended = (1 - smooth) * freqs / scale_factor + smooth * freqs
    long = torch.where(wavelength > old_context_len / low_freq_factor, freqs / scale_factor, blended)
    return torch.where(wavelength < old_context_len / high_freq_factor, freqs, long)


def base_frequencies(dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """theta^(-2m/dim) for m = 0 .. dim/2 - 1, float32."""
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.int64).float() / dim
    return 1.0 / (theta**exponents)


def frequencies(rope: RopeArgs, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of every rotary pair [dim / 2], scaling applied, float32."""
    freqs = base_frequencies(rope.dim, rope.theta, device)
    if rope.scaling is None:
        return freqs
    s = rope.scaling
    return apply_scaling(freqs, s.factor, s.high_freq_factor, s.original_max_seq_len, s.low_freq_factor)


def rotary_table(positions_BT: Tensor, rope: RopeArgs) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position, each [B, T, 1, dim / 2] float32, ready to broadcast over heads."""
    angles = positions_BT.unsqueeze(-1).float() * frequencies(rope, positions_BT.device)
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def rotate(x_BTNH: Tensor, table: tuple[Tensor, Tensor], layout: RopeLayout) -> Tensor:
    """Turn every feature pair of every head by its angle; float32 inside, in x's dtype."""
    cos, sin = table
    wide = x_BTNH.to(torch.promote_types(x_BTNH.dtype, torch.float32))
    if layout == "halves":
        # roll(H / 2) puts every feature beside its partner: two products, where slicing takes four and a copy.
        out = wide * torch.cat((cos, cos), -1) + wide.roll(wide.size(-1) // 2, -1) * torch.cat((-sin, sin), -1)
    elif torch.compiler.is_compiling():  # the compiler has no complex kernels and fuses this form
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:  # neighbours are one complex number: a single product, a fifth of the time of the form above
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        out = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    return out.to(x_BTNH.dtype)


def precompute_freqs_cis(
    dim: int,
    end: int,
    theta: float,
    use_scaled: bool = False,
    scale_factor: float = 8,
    high_freq_factor: float = 4,
) -> Tensor:
    """Complex rotations complex64 [end, dim / 2] of positions 0 .. end - 1, as the reference codes keep them."""
    freqs = base_frequencies(dim, theta)
    if use_scaled:
        freqs = apply_scaling(freqs, scale_factor, high_freq_factor)
    angles = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """View [T, H / 2] as [1, T, 1, H / 2] for complex x [B, T, heads, H / 2]."""
    if freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise ValueError(f"freqs_cis {tuple(freqs_cis.shape)} does not fit x {tuple(x.shape)}")
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Interleaved pairs of xq, xk [B, T, heads, H] times complex freqs_cis [T, H / 2]; a twin of `rotate`."""

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs)).flatten(-2).type_as(x)

    return turn(xq), turn(xk)

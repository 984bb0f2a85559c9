"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) as a function of positions.

No table is a parameter or a buffer, since `module.to(bfloat16)` would ruin it. Tables are computed
once per call and distinct `RopeArgs`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transom.config.layer_args import RopeArgs, RopeLayout, RopeScaling, yarn_mscale


def apply_scaling(
    freqs: Tensor,
    scale_factor: float,
    high_freq_factor: float,
    old_context_len: int = 8192,
    low_freq_factor: float = 1.0,
) -> Tensor:
    """Apply the frequency scaling of Llama 3 (meta-llama/llama-models, llama3/model.py).

    Args:
        freqs: Frequencies [dim / 2], float32.
        scale_factor: Long wavelengths are stretched by it.
        high_freq_factor: Wavelengths below `old_context_len / high_freq_factor` stay.
        old_context_len: The sequence length of pretraining, in tokens.
        low_freq_factor: Wavelengths above `old_context_len / low_freq_factor` are stretched
            completely; those between are interpolated.

    Returns:
        Frequencies [dim / 2], float32.
    """
    wavelength = 2 * math.pi / freqs
    # With high == low the blend is empty; the floor and the clamp only keep its unused value
    # finite.
    span = max(high_freq_factor - low_freq_factor, 1e-9)
    smooth = ((old_context_len / wavelength - low_freq_factor) / span).clamp(0, 1)
    blended = (1 - smooth) * freqs / scale_factor + smooth * freqs
    long = torch.where(
        wavelength > old_context_len / low_freq_factor, freqs / scale_factor, blended
    )
    return torch.where(wavelength < old_context_len / high_freq_factor, freqs, long)


def base_frequencies(dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """Return theta^(-2m/dim) for m = 0 .. dim/2 - 1, float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.int64).float() / dim
    return 1.0 / (theta**exponents)


def frequencies(
    rope: RopeArgs, length: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the angle per position of every rotary pair, with scaling, float32 [dim / 2].

    Args:
        rope: Arguments of the rotation.
        length: The length of the complete sequence in tokens, from which `dynamic` and `longrope`
            choose.
        device: Device of the result.
    """
    s = rope.scaling
    if s is None:
        return base_frequencies(rope.dim, rope.theta, device)
    if s.by_length:
        assert length is not None, "the model tells the length where it matters"
    match s.kind:
        case "linear":
            return base_frequencies(rope.dim, rope.theta, device) / s.factor
        case "llama3":
            freqs = base_frequencies(rope.dim, rope.theta, device)
            return apply_scaling(
                freqs, s.factor, s.high_freq_factor, s.original_max_seq_len, s.low_freq_factor
            )
        case "yarn":
            return yarn_frequencies(rope, s, device)
        case "dynamic":
            ratio = max(length or 0, s.original_max_seq_len) / s.original_max_seq_len
            stretch = s.factor * ratio - (s.factor - 1)
            return base_frequencies(
                rope.dim, rope.theta * stretch ** (rope.dim / (rope.dim - 2)), device
            )
        case "longrope":
            factors = s.long_factor if (length or 0) > s.original_max_seq_len else s.short_factor
            return base_frequencies(rope.dim, rope.theta, device) / torch.tensor(
                factors, device=device
            )


def yarn_frequencies(
    rope: RopeArgs, s: RopeScaling, device: torch.device | str | None = None
) -> Tensor:
    """Apply YaRN (Peng et al. 2023, arXiv 2309.00071).

    Fast pairs are kept and slow ones divided by the factor. Those between are interpolated.
    """

    def index(turns: float) -> float:
        """Return the index of the pair that turns that often within the original length."""
        wavelengths = math.log(s.original_max_seq_len / (turns * 2 * math.pi))
        return rope.dim * wavelengths / (2 * math.log(rope.theta))

    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.dim // 2, device=device).float() - low) / (high - low)).clamp(0, 1)
    freqs = base_frequencies(rope.dim, rope.theta, device)
    return freqs * (1 - ramp) + freqs / s.factor * ramp


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor on cos and sin; scores of rotated features gain its square."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_seq_len))
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_mscale(scaling.factor, 1.0)


def rotary_table(
    positions_BT: Tensor,
    rope: RopeArgs,
    length: int | None = None,
    kept: dict[RopeArgs, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of every position, each float32 [B, T, 1, dim / 2].

    Args:
        positions_BT: int64 positions [B, T].
        rope: Arguments of the rotation.
        length: As for `frequencies`.
        kept: Frequencies by rotation, for later calls with the same length.
    """
    device = positions_BT.device
    # A float32 angle of the millionth position would be wrong by up to 0.03 radians, and by another
    # amount at every position. MPS has no float64.
    wide = torch.float32 if device.type == "mps" else torch.float64
    own = {} if kept is None else kept
    if rope not in own:
        own[rope] = frequencies(rope, length, device).to(wide)
    angles = positions_BT[..., None, None].to(wide) * own[rope]
    cos, sin = angles.cos().float(), angles.sin().float()
    factor = attention_factor(rope.scaling)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x_BTNH: Tensor, table: tuple[Tensor, Tensor], layout: RopeLayout) -> Tensor:
    """Rotate the feature pairs of every head.

    Args:
        x_BTNH: Queries or keys [B, T, N, H]. Only the first features rotate if the table has fewer.
        table: (cos, sin) of `rotary_table`.
        layout: `interleaved` pairs neighbours (2m, 2m + 1), `halves` pairs (m, m + H / 2).

    Returns:
        [B, T, N, H] in the dtype of the input, computed in float32 or better.
    """
    cos, sin = table
    rotary = 2 * cos.size(-1)
    if rotary < x_BTNH.size(-1):  # partial rotary: the first features rotate, the others stay
        turned = rotate(x_BTNH[..., :rotary], table, layout)
        return torch.cat((turned, x_BTNH[..., rotary:]), -1)
    wide = x_BTNH.to(torch.promote_types(x_BTNH.dtype, torch.float32))
    if layout == "halves":
        # roll(H / 2) puts every feature in the place of its partner: two products instead of the
        # four and a copy that slices take.
        partners = wide.roll(rotary // 2, -1)
        out = wide * torch.cat((cos, cos), -1) + partners * torch.cat((-sin, sin), -1)
    elif torch.compiler.is_compiling() or not _pairs_are_complex(wide):
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:  # neighbours are one complex number: one product, in a fifth of the time
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        out = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    return out.to(x_BTNH.dtype)


def _pairs_are_complex(x: Tensor) -> bool:
    """Return whether `view_as_complex` takes neighbours as they are in memory.

    It needs even strides and an even offset, which a slice may not have.
    """
    return (
        x.stride(-1) == 1
        and x.storage_offset() % 2 == 0
        and all(s % 2 == 0 for s in x.stride()[:-1])
    )


def precompute_freqs_cis(
    dim: int,
    end: int,
    theta: float,
    use_scaled: bool = False,
    scale_factor: float = 8,
    high_freq_factor: float = 4,
) -> Tensor:
    """Return the rotations complex64 [end, dim / 2] of positions 0 .. end - 1.

    The name and the arguments are those of Meta's reference code (llama3/model.py).
    """
    freqs = base_frequencies(dim, theta)
    if use_scaled:
        freqs = apply_scaling(freqs, scale_factor, high_freq_factor)
    angles = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """View rotations [T, H / 2] as [1, T, 1, H / 2] for complex x [B, T, heads, H / 2].

    The name is that of Meta's reference code.
    """
    if freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise ValueError(f"freqs_cis {tuple(freqs_cis.shape)} does not fit x {tuple(x.shape)}")
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate interleaved pairs of xq and xk [B, T, heads, H] by rotations complex64 [T, H / 2].

    The name is that of Meta's reference code. `rotate` gives the same result.
    """

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return (
            torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs))
            .flatten(-2)
            .type_as(x)
        )

    return turn(xq), turn(xk)

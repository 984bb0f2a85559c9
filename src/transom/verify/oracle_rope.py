"""RoPE of the oracle, pair by pair (arXiv 2104.09864).

Long contexts are scaled as by Llama 3 and YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transom.config.layer_args import RopeScaling
from transom.config.model_args import ModelArgs


def rotate(head: Tensor, position: int, args: ModelArgs, local: bool = False) -> Tensor:
    """Rotate pair m of a head [H] by the angle position * theta^(-2m / d).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
        head: A query or key.
        position: The position of its token.
        args: The arguments of the model.
        local: Whether the layer has `rope_local_theta` and no scaling.
    """
    out = list(head)
    size = int(len(head) * args.rotary_fraction)
    theta = (args.rope_local_theta if local else None) or args.rope_theta
    scaling = None if local else args.scaling
    factor = attention_factor(scaling)
    for m in range(size // 2):
        frequency = theta ** (-2 * m / size)
        if scaling is not None:
            frequency = scale_frequency(frequency, m, size, theta, scaling)
        i, j = (m, m + size // 2) if args.rope_layout == "halves" else (2 * m, 2 * m + 1)
        angle = position * frequency
        cos, sin = factor * math.cos(angle), factor * math.sin(angle)
        out[i], out[j] = head[i] * cos - head[j] * sin, head[j] * cos + head[i] * sin
    return torch.stack(out)


def scale_frequency(
    frequency: float, m: int, size: int, theta: float, scaling: RopeScaling
) -> float:
    """Return the frequency of pair m: linear scaling divides all, Llama 3 and YaRN the slow ones.

    Between fast and slow frequencies the result is a mean of both.
    """
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":  # a ramp between the pairs that turn beta times in the context
        around = math.log(scaling.original_max_seq_len / (2 * math.pi))
        first, last = (
            size * (around - math.log(beta)) / (2 * math.log(theta))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        width = last - first if last != first else 0.001
        share = min(max((m - first) / width, 0), 1)
        return (1 - share) * frequency + share * slow
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if turns > high:
        return frequency
    if turns < low:
        return slow
    share = (turns - low) / (high - low)
    return (1 - share) * slow + share * frequency


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return YaRN's factor of cos and sin, 0.1 ln(factor) + 1; DeepSeek has two other weights."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * max(0.0, math.log(scaling.factor))
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (growth * scaling.mscale + 1) / (growth * scaling.mscale_all_dim + 1)
    return growth + 1

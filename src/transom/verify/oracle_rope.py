"""The rotary positions of the oracle, pair by pair (arXiv 2104.09864), with the scalings of Llama 3
and YaRN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transom.config.model_args import ModelArgs


def rotated(head: Tensor, position: int, args: ModelArgs, local: bool = False) -> Tensor:
    """Pair m turns by position * theta^(-2m / d): (a, b) -> (a cos - b sin, b cos + a sin)."""
    out = list(head)
    turning = int(len(head) * args.rotary_fraction)
    for m in range(turning // 2):
        theta = (args.rope_local_theta if local else None) or args.rope_theta
        frequency = theta ** (-2 * m / turning)
        angle = position * (frequency if local else stretched(frequency, m, turning, args))
        i, j = (m, m + turning // 2) if args.rope_layout == "halves" else (2 * m, 2 * m + 1)
        larger = 1.0 if local else attention_factor(args)
        cos, sin = larger * math.cos(angle), larger * math.sin(angle)
        out[i], out[j] = head[i] * cos - head[j] * sin, head[j] * cos + head[i] * sin
    return torch.stack(out)


def stretched(frequency: float, m: int, turning: int, args: ModelArgs) -> float:
    """A rotary frequency after scaling: linear divides all, llama3 and YaRN the slow ones, with a
    blend.
    """
    scaling = args.scaling
    if scaling is None:
        return frequency
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    if (
        scaling.kind == "yarn"
    ):  # blends by index, between the pairs that turn beta times in the original
        around = math.log(scaling.original_max_seq_len / (2 * math.pi))
        ends = [
            turning * (around - math.log(beta)) / (2 * math.log(args.rope_theta))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        ]
        if scaling.truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        first, last = max(ends[0], 0), min(ends[1], turning - 1)
        share = min(max((m - first) / (last - first if last != first else 0.001), 0), 1)
        return (1 - share) * frequency + share * slow
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if turns > high:
        return frequency
    if turns < low:
        return slow
    share = (turns - low) / (high - low)
    return (1 - share) * slow + share * frequency


def attention_factor(args: ModelArgs) -> float:
    """YaRN (arXiv 2309.00071): 0.1 ln(factor) + 1 on cos and sin, with DeepSeek's two weights of
    the 0.1.
    """
    scaling = args.scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    grown = 0.1 * max(0.0, math.log(scaling.factor))
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (grown * scaling.mscale + 1) / (grown * scaling.mscale_all_dim + 1)
    return grown + 1

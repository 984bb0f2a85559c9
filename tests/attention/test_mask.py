"""The rule of who sees whom, against three plain loops."""

from __future__ import annotations

import pytest
import torch

from transom.attention.mask import (
    allowed,
    create_chunked_attention_mask,
    positions_from_sizes,
    segments_from_sizes,
)
from transom.config.layer_args import LayerRule


def may_see(rule: LayerRule, q: int, k: int, q_segment: int, k_segment: int) -> bool:
    """The published rules, one pair at a time."""
    if q < 0 or k < 0 or q_segment != k_segment:
        return False
    return {
        "causal": k <= q,
        "window": q - rule.size < k <= q,
        "chunk": k <= q and (rule.size == 0 or q // rule.size == k // rule.size),
        "full": True,
    }[rule.kind]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        LayerRule(),
        LayerRule("full"),
        *(LayerRule(kind, size) for kind in ("window", "chunk") for size in (1, 4)),
    ],
    ids=lambda rule: f"{rule.kind}{rule.size or ''}",
)
def test_allowed_is_the_rule_pair_by_pair(rule, segmented):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-1, 14, (3, 9), generator=generator)
    k = torch.randint(-1, 14, (3, 11), generator=generator)
    q_segments = torch.randint(0, 2, q.shape, generator=generator)
    k_segments = torch.randint(0, 2, k.shape, generator=generator)
    if not segmented:
        q_segments, k_segments = torch.zeros_like(q), torch.zeros_like(k)
    expected = torch.zeros(3, 9, 11, dtype=torch.bool)
    for b in range(3):
        for t in range(9):
            for s in range(11):
                pair = (q[b, t], k[b, s], q_segments[b, t], k_segments[b, s])
                expected[b, t, s] = may_see(rule, *(x.item() for x in pair))
    segments = (q_segments, k_segments) if segmented else ()
    assert torch.equal(allowed(rule, q, k, *segments), expected)


def test_chunked_mask_starts_each_chunk_blind():
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert create_chunked_attention_mask(7, 3).int().tolist() == expected


def test_sizes_become_positions_and_segments():
    assert positions_from_sizes([3, 1, 2]).tolist() == [0, 1, 2, 0, 0, 1]
    assert segments_from_sizes([3, 1, 2]).tolist() == [0, 0, 0, 1, 2, 2]

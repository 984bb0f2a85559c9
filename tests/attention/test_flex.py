"""Flex: its block masks hide nothing that the rule shows, and a small dense run equals the
reference.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as peer

from transom.attention import flex as module
from transom.attention.flex import block_mask, flex, why_not
from transom.attention.mask import MaskSpec, allowed, positions_from_sizes, segments_from_sizes
from transom.attention.reference import reference
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule

LENGTH, BLOCK = 150, 32  # five blocks, the last one short
RULES = [LayerRule(), LayerRule("full"), LayerRule("window", 45), LayerRule("chunk", 64)]


def by_rule(rule: LayerRule) -> str:
    return f"{rule.kind}{rule.size or ''}"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", BLOCK)


def lay_out(kind: str) -> tuple[Tensor, Tensor | None]:
    """Positions [2, T] and segments."""
    rows = torch.arange(LENGTH).expand(2, -1)
    if kind == "rows":
        return rows, None
    if kind == "padded":
        return rows.masked_fill(rows >= torch.tensor([[LENGTH], [70]]), -1), None
    sizes = [[64, 86], [1, 9, 140]]
    if kind == "packed":
        return torch.stack([positions_from_sizes(row) for row in sizes]), torch.stack(
            [segments_from_sizes(row) for row in sizes]
        )
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(-1, LENGTH, (2, LENGTH), generator=generator)
    return positions, torch.randint(0, 2, (2, LENGTH), generator=generator)


def in_blocks(may: Tensor) -> Tensor:
    """[B, T, S] as [B, T blocks, S blocks, pairs]; pairs beyond the end are not visible."""
    missing = -LENGTH % BLOCK
    padded = torch.nn.functional.pad(may, (0, missing, 0, missing))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK)).transpose(2, 3).flatten(3)


def chosen(counts: Tensor, indices: Tensor) -> Tensor:
    """Bool [B, T blocks, S blocks] from torch's lists."""
    out = torch.zeros(indices.shape, dtype=torch.bool)
    first = torch.arange(indices.size(-1)) < counts.unsqueeze(-1)
    return out.scatter_(-1, indices.long(), first)[:, 0]


@pytest.mark.parametrize("layout", ["rows", "padded", "packed", "anything"])
@pytest.mark.parametrize("rule", RULES, ids=by_rule)
def test_block_masks_hold_every_visible_pair_and_skip_the_mask_only_where_all_are(
    small_blocks, rule, layout
):
    positions, segments = lay_out(layout)
    made = block_mask(CacheView((), positions, segments), MaskSpec(rule, positions, segments), 2)
    blocks = in_blocks(allowed(rule, positions, positions, segments, segments))
    partial = chosen(made.kv_num_blocks, made.kv_indices)
    full = chosen(made.full_kv_num_blocks, made.full_kv_indices)
    assert not (partial & full).any(), "a block listed twice would be counted twice"
    assert not (blocks.any(-1) & ~(partial | full)).any(), "a visible pair would be lost"
    assert not (full & ~blocks.all(-1)).any(), "a hidden pair would be seen"
    if layout in ("rows", "padded"):  # where positions run on, the corners of a block tell all
        assert torch.equal(full, blocks.all(-1)) and torch.equal(
            partial, blocks.any(-1) & ~blocks.all(-1)
        )


def test_no_pair_of_tokens_is_looked_at_while_the_table_is_made(monkeypatch):
    monkeypatch.setattr(module, "visible", lambda *_: pytest.fail("mask evaluated"))
    positions = torch.arange(4096)[None]
    table = block_mask(CacheView((), positions), MaskSpec(LayerRule("window", 200), positions), 1)
    assert table.kv_indices.shape == (1, 1, 32, 32)


@pytest.mark.parametrize("layout", ["padded", "packed", "anything"])
@pytest.mark.parametrize("rule", RULES, ids=by_rule)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_equals_the_reference(monkeypatch, rule, layout):
    # torch's own eager path, without the compiler in front: the numbers of its block mask and score
    # function
    monkeypatch.setattr(peer, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    positions, segments = lay_out(layout)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, LENGTH, 4, 16), (2, LENGTH, 2, 16), (2, LENGTH, 2, 24), (4,))
    q, k, v, sinks = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    view, spec = CacheView((k, v), positions, segments), MaskSpec(rule, positions, segments)
    for score in (ScoreArgs(), ScoreArgs(0.4, 2.0, sinks)):
        torch.testing.assert_close(
            flex(q, view, spec, score), reference(q, view, spec, score), rtol=0, atol=1e-10
        )


def test_layers_of_one_step_share_a_table_and_other_slots_get_their_own():
    positions = torch.arange(64)[None]
    spec, view = MaskSpec(LayerRule(), positions), CacheView((), positions)
    first = module._block_mask(view, spec, 1)
    assert module._block_mask(CacheView((), positions), spec, 1) is first
    assert module._block_mask(CacheView((), positions.clone()), spec, 1) is not first


def test_flex_is_for_cuda():
    q, positions = torch.zeros(1, 4, 2, 16), torch.arange(4)[None]
    reason = why_not(q, CacheView((q, q), positions), MaskSpec(LayerRule(), positions), ScoreArgs())
    assert reason is not None and "cuda" in reason

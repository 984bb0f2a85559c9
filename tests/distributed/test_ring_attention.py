"""Ring attention equals attention to gathered keys, and what it can't do is gathered."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed.context_jobs import difference, job, results
from tests.distributed.ranks import run_ranks
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import collected_notices
from transom.base.runtime import replaced
from transom.config.layer_args import LayerRule
from transom.distributed import ring_attention


def differences():
    """Return the largest difference for each number of key heads and way of exchanging keys."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options, found = ring_attention.torch_ring()._cp_options, {}
    for kv_heads in (4, 2, 1):
        for method in type(options.rotate_method):
            with (
                replaced(options, "convert_to_f32", False),
                replaced(options, "rotate_method", method),
            ):
                given = job(kv_heads=kv_heads)
                errors = difference(results(True, mesh, *given), results(False, mesh, *given))
            found[kv_heads, method.name] = errors
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ring_equals_gathered_keys(tmp_path, ranks):
    for found in run_ranks(differences, ranks, tmp_path):
        assert len(found) == 6 and max(found.values()) < 1e-12, found


def test_the_operators_of_cuda_take_what_the_loops_give(monkeypatch):
    """Tensors without numbers show it where there is no GPU."""

    def kernel(q, direction=""):
        return getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{direction}")

    monkeypatch.setattr(ring_attention, "_kernel", kernel)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        q, k, v = (
            torch.empty(1, 64, heads, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for heads in (8, 2, 2)
        )
        positions = torch.empty(1, 64, device="meta", dtype=torch.int64)
        view, spec = CacheView((k, v), positions), MaskSpec(LayerRule(), positions)
        out = ring_attention.ring(q, view, spec, ScoreArgs(), dist.group.WORLD)
        out.sum().backward()
    finally:
        dist.destroy_process_group()
    assert [out.shape, k.grad.shape, v.grad.shape] == [q.shape, k.shape, v.shape]


REFUSED = {
    "window": {"rule": LayerRule("window", 4)},
    "cap": {"score": ScoreArgs(softcap=3.0)},
    "document": {"segments": torch.zeros(1, 8, dtype=torch.int64)},
    "release of torch": {"torch_ring": None},
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_the_ring_cannot_do_is_gathered_with_a_notice(word):
    given = {"rule": LayerRule(), "score": ScoreArgs(), "segments": None, **REFUSED[word]}
    q, positions = torch.randn(1, 8, 2, 4), torch.arange(8)[None]
    view = CacheView((q, q), positions, given["segments"])
    spec = MaskSpec(given["rule"], positions, given["segments"])
    module = given.get("torch_ring", "there")
    with collected_notices() as notices, replaced(ring_attention, "torch_ring", lambda: module):
        assert ring_attention.ring(q, view, spec, given["score"], mock.Mock()) is None
    assert len(notices) == 1 and "keys are gathered" in notices[0] and word in notices[0]

"""What fits into memory is known before it is there: bytes of caches, limits, and what to change."""

import re

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.load import LoadPlan
from transom.inference import room
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import generate
from transom.inference.room import check_memory, check_room, room_for_new_tokens
from transom.layers.inputs import TransformerInput
from transom.planning.memory import Workload, cache_parts, left_in_groups

MIXED = {
    "n_layers": 4,
    "layer_pattern": "SCFf",
    "sliding_window": 8,
    "attention_chunk_size": 12,
    "max_seq_len": 4096,
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens", [20, 42, 100])
@pytest.mark.parametrize("kv_bits", [8, 16])
def test_planned_bytes_are_those_of_an_allocated_cache(tokens, kv_bits):
    model = random_model(tiny_args(**MIXED))
    cache = model.make_cache(3, tokens, kv_bits=kv_bits)
    model(TransformerInput(random_tokens(3, 5)), cache)
    assert sum(cache_parts(model.args, Workload(3, tokens, 4, kv_bits)).values()) == cache.bytes


def test_what_a_refusal_proposes_fits(monkeypatch):
    args = tiny_args(**MIXED)
    monkeypatch.setattr(room, "host_bytes_left", lambda: 5_000_000)

    def check(tokens, kv_bits=16):
        decode = DecodeArgs(kv_bits=kv_bits, prefill_step_size=16)
        load = LoadPlan(args, {"attention": 1_500_000}, 500_000, torch.float32, CPU)
        check_memory(args, 2, tokens, torch.float32, CPU, decode, load=load, least=9)

    with pytest.raises(RequestError, match=r"model of 0\.00 GB.* 2 x 4,000 tokens") as refused:
        check(4000)
    words = re.search(r"--max-model-len (\d+) or --kv-bits 8 fits", str(refused.value))
    most = int(words[1])
    check(most)
    check(4000, kv_bits=8)
    with pytest.raises(RequestError, match=f"--max-model-len {most}"):
        check(int(1.11 * most))
    monkeypatch.setattr(room, "host_bytes_left", lambda: 1_000_000)
    with pytest.raises(RequestError, match="9 tokens do not fit either"):
        check(4000)


def test_a_request_that_does_not_fit_is_refused_before_the_cache_is_made(monkeypatch):
    model = random_model(tiny_args(**MIXED))
    monkeypatch.setattr(room, "host_bytes_left", lambda: 500_000)
    monkeypatch.setattr(type(model), "make_cache", None)
    with pytest.raises(RequestError, match=r"memory: got a KV cache"):
        generate(model, [[1, 2]], 4000)


def test_both_limits_of_the_context_are_named():
    args = tiny_args(max_seq_len=64)
    assert room_for_new_tokens(args, 60) == room_for_new_tokens(args, 60, 4, 80) == 4
    assert room_for_new_tokens(args, 10, 50, 32) == 22
    assert room_for_new_tokens(tiny_args(sliding_window=5, max_seq_len=64), 60) == 128
    with pytest.raises(RequestError, match=r"30 tokens and 128 new.* max_model_len = 30"):
        room_for_new_tokens(args, 30, None, 30)
    with pytest.raises(RequestError, match=r"60 tokens and 5 new.* max_seq_len = 64"):
        room_for_new_tokens(args, 60, 5)
    with pytest.raises(RequestError, match="max_model_len = 30"):
        check_room(args, 20, 11, 30)


@pytest.mark.parametrize(
    ("lines", "folder", "names"),
    [
        (["0::/jobs/a"], "jobs/a", ("max", "current")),
        (["0::/jobs/a"], "", ("max", "current")),
        (["5:memory:/jobs/a", "0::/"], "memory/jobs/a", ("limit_in_bytes", "usage_in_bytes")),
        (["5:memory:/jobs/a", "0::/"], "memory", ("limit_in_bytes", "usage_in_bytes")),
    ],
)
def test_the_limit_of_a_control_group_counts(tmp_path, lines, folder, names):
    group = tmp_path / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.stat").write_text("anon 70\ninactive_file 20\ntotal_inactive_file 30\n")
    limit, used = (group / f"memory.{name}" for name in names)
    used.write_text("100\n")
    limit.write_text("max\n")
    assert left_in_groups(tmp_path, lines) == []
    limit.write_text("1000\n")
    assert left_in_groups(tmp_path, lines) == [930]

"""`verify cache`: green on every kind of model, red where something is planted, and honest about
where.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_model, tiny_args
from tests.mutations import model_bugs, run_bugs
from transom.base.errors import RequestError
from transom.base.runtime import one_thread
from transom.cache import store
from transom.config.model_args import ModelArgs
from transom.config.presets import PRESETS, preset
from transom.verify.cache import (
    Plan,
    check,
    compare,
    compare_full_size,
    compare_small,
    edges,
    first_failure,
)
from transom.verify.findings import difference, summarize
from transom.verify.sample_models import (
    CHUNK,
    ORIGINAL,
    SAMPLES,
    WINDOW,
    random_tokens,
    sample_model,
    small_copy,
)

LONGROPE = {"kind": "longrope", "factor": 4.0, "original_max_seq_len": 4096}
MODELS = {
    "mixed": SAMPLES["mixed"],
    "latent": {
        "n_heads": 8,
        "mla_args": {
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 24,
        },
    },
    "longrope": {
        "dim": 512,
        "head_dim": 64,
        "rope_scaling": {
            **LONGROPE,
            "short_factor": [1.0 + i / 10 for i in range(32)],
            "long_factor": [2.0 + i for i in range(32)],
        },
    },
    "context": {"context_dim": 40, "layer_pattern": "SF", "sliding_window": 99},
    "dynamic": {"rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_max_seq_len": 4096}},
}


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_green(name, capsys):
    bucket = store.BUCKET
    copy = small_copy(ModelArgs.from_dict(MODELS[name]), name, context=True)
    assert "leaves out" not in capsys.readouterr().err
    lines = summarize(compare_small(sample_model(copy), name))
    assert [line.first_failure for line in lines if line.failed] == []
    compared = {"prefill + decode", "chunked prefill", "KV cache in 8 bits", "after a rollback"}
    compared |= set() if name == "context" else {"greedy text with proposals"}
    assert compared <= {line.comparison for line in lines}
    assert bucket == store.BUCKET, "what was shrunken for the comparison is as before"


def test_a_layer_that_sees_later_tokens_is_compared_without_a_cache(capsys):
    copy = small_copy(ModelArgs.from_dict({"layer_pattern": "BF"}), "encoder")
    lines = summarize(compare_small(sample_model(copy), "encoder"))
    assert {line.comparison for line in lines} == {
        "padded on the right",
        "padded on the left",
        "packed documents",
    }
    assert not any(line.failed for line in lines)
    assert "has no cache" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_windows_read_and_write_without_end(tokens):
    lines = summarize(check(tokens=tokens))
    assert [line.first_failure for line in lines if line.failed] == []
    assert [line.comparison for line in lines] == ["constant memory", "tokens in order"]


def test_a_wrong_token_far_from_the_beginning_is_seen():
    with run_bugs.stale_slot():
        lines = summarize(check(tokens=5_000))
    assert [line.comparison for line in lines if line.failed] == ["tokens in order"]


def test_a_planted_bug_is_located():
    """The ring of layer 0 keeps an old token: the first wrong position is the first that reads
    it.
    """
    with run_bugs.stale_slot():
        bad = next(
            one
            for one in compare_small(sample_model(small_copy(preset("mistral-7b-v0.1"), "m")), "m")
            if not one.ok
        )
    assert bad.detail == f"first at position {WINDOW}, layer 0"
    assert bad.error > 1e-3


def test_first_failure_tells_layer_and_position():
    good = [torch.zeros(1, 5, 2), torch.zeros(1, 5, 2), torch.zeros(1, 5, 3)]
    bad = [x.clone() for x in good]
    bad[1][0, 3] = 1.0
    bad[2][0, 1:] = 1.0
    assert first_failure(bad, good, 1e-9, start=10) == "first at position 13, layer 1"
    bad[1].zero_()
    assert first_failure(bad, good, 1e-9, start=0) == "first at position 1, logits"


def test_edges_surround_windows_rings_and_buckets():
    args = tiny_args(sliding_window=5)
    found = edges(args, Plan(40, (0, 3), 16, 40))
    for mark in (
        5,
        10,
        8,
        16,
        32,
        4,
    ):  # window, two windows, ring, its double, two buckets, slack + 1
        assert {mark - 1, mark, mark + 1} <= set(found), mark
    assert min(found) == 1
    assert max(found) == 39


def test_a_real_model_runs_as_it_is(capsys):
    args = tiny_args(layer_pattern="SF", sliding_window=20, max_seq_len=600)
    lines = summarize(compare_full_size(random_model(args), "tiny"))
    assert [line.first_failure for line in lines if line.failed] == []
    assert lines[0].worst.tolerance == pytest.approx(1e-4), "float32 weights, float32 tolerance"
    list(compare_full_size(random_model(args), "tiny", length=18))
    assert "does not exceed windows or chunks of 20 tokens" in capsys.readouterr().err
    with pytest.raises(RequestError, match="head: got 'embedding'"):
        next(compare_full_size(random_model(tiny_args(head={"kind": "embedding"})), "tiny"))
    with pytest.raises(RequestError, match=r"--length: got 601.*600"):
        next(compare_full_size(random_model(args), "tiny", length=601))


def test_nan_is_never_equal():
    good = torch.ones(2, 3)
    assert difference(good, good) == 0.0
    assert difference(good * float("nan"), good) == float("inf")
    assert difference(good[:1], good) == float("inf")
    assert difference(1e6 * good + 1, 1e6 * good) == pytest.approx(1e-6, rel=0.1)


def test_a_model_that_ignores_its_padding_is_seen():
    """Comparisons judge rows alone: batch and single row may not share the mistake."""
    model = sample_model(small_copy(preset("demo"), "demo"))
    with model_bugs.visible_padding():
        lines = summarize(compare(model, "demo", Plan(12, (0,), 256, 12)))
    assert {line.comparison for line in lines if line.failed} >= {
        "padded on the left",
        "padded prompt + decode",
    }


def test_longrope_factors_are_as_many_as_a_copy_has_pairs():
    for count in (3, 4, 48):
        scaling = {
            **LONGROPE,
            "short_factor": [1.0] * count,
            "long_factor": [2.0 + i for i in range(count)],
        }
        args = ModelArgs.from_dict({"head_dim": 2 * count, "rope_scaling": scaling})
        copy = small_copy(args, "longrope")
        assert len(copy.rope_scaling.long_factor) == copy.rotary_dim // 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_copy_keeps_the_pattern_and_shrinks_the_sizes(name):
    args = preset(name)
    copy = small_copy(args, name)
    assert args.pattern.startswith(copy.pattern)
    assert set(args.pattern) == set(copy.pattern)
    assert copy.sliding_window in (None, WINDOW)
    assert copy.attention_chunk_size in (None, CHUNK)
    assert (copy.moe_args is None) == (args.moe_args is None)
    assert (copy.n_heads == copy.kv_heads) == (args.n_heads == args.kv_heads)
    if args.scaling is not None:
        assert copy.scaling.original_max_seq_len == ORIGINAL
    logits = sample_model(copy)(tokens_input(copy)).logits
    assert logits.dtype == torch.float64
    assert logits.std() > 0.1


def tokens_input(args):
    from transom.layers.inputs import TransformerInput

    return TransformerInput(random_tokens(args, 1, 9))


def test_what_a_copy_leaves_out_is_said(capsys):
    args = ModelArgs.from_dict({"context_dim": 32, "head": {"kind": "classification"}})
    small_copy(args, "it")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["head", "context_dim"]

"""What a model will take in memory is what it takes: weights and caches exactly, calls about."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers import random_tokens, run_python, tiny_args
from transom.checkpoints.describe_model import describe_model
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.load import load, load_plan
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.inference import room
from transom.inference.joined_weights import joined_weights
from transom.inference.memory_answer import memory_answer
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning import memory
from transom.planning.memory import Workload, call_bytes, weight_counts, weight_kind
from transom.verify.checks import run

WIDE = {"dim": 128, "n_heads": 8, "hidden_dim": 352, "max_seq_len": 4096}
MLA = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
JOBS = {
    "grouped heads": ({}, torch.float32, 16),
    "halves": ({"head_dim": 64, "rope_layout": "halves"}, torch.bfloat16, 16),
    "8 bits": ({}, torch.bfloat16, 8),
    "windows": ({"sliding_window": 512}, torch.float32, 16),
    "chunks, 8 bits": ({"layer_pattern": "C", "attention_chunk_size": 512}, torch.float32, 8),
    "soft caps": ({"attn_softcap": 50.0}, torch.bfloat16, 16),
    "experts": (
        {"moe_args": {"num_experts": 8, "top_k": 4, "hidden_dim": 128}},
        torch.float32,
        16,
    ),
    "latent": ({"n_kv_heads": None, "mla_args": MLA}, torch.float32, 16),
}
# An estimate may be this share of what a call allocates. The first says less than all, since the
# order in which tensors are freed is PyTorch's.
LEAST, MOST = 0.9, 2.0


def test_plans_are_those_of_models_that_generate():
    findings = list(run("memory"))
    assert len(findings) > 40 and all(one.ok for one in findings), findings


@pytest.mark.slow
def test_the_plan_of_smollm2_with_codes_is_its_peak():
    # In a process of its own: this one also has what other tests have imported.
    code = "from transom.cli.main import main; main(['verify', 'memory', 'smollm2'])"
    printed = run_python(code)
    assert "peak of memory" in printed and "comparisons passed" in printed, printed


def allocated(call) -> int:
    """Return the most that PyTorch allocates at once during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("name", JOBS)
@torch.inference_mode()
def test_estimates_of_calls_are_near_what_they_allocate(name):
    fields, dtype, kv_bits = JOBS[name]
    model = LLM(tiny_args(**{**WIDE, **fields})).to(dtype).eval()
    rows, step, pieces = 2, 128, 8
    cache = model.make_cache(rows, tokens := step * pieces, kv_bits=kv_bits)
    work = Workload(rows, tokens, dtype.itemsize, kv_bits, step, native=False)

    def call(count) -> int:
        inputs = TransformerInput(random_tokens(rows, count), logits="none")
        before = cache.bytes
        return allocated(lambda: model(inputs, cache)) - (cache.bytes - before)

    first = call(step)
    assert LEAST < call_bytes(model.args, work, step, 0) / first < MOST
    for _ in range(pieces - 2):
        last = call(step)
    assert LEAST < call_bytes(model.args, work, step, step * (pieces - 1)) / last < MOST


@pytest.mark.parametrize("name", ["halves", "experts", "latent"])
def test_joined_weights_are_in_memory_twice_a_layer_at_a_time(name):
    fields, dtype, _ = JOBS[name]
    model = LLM(tiny_args(**{**WIDE, **fields})).to(dtype).eval()
    work = Workload(1, 1, dtype.itemsize, joined=True)
    # The profiler counts what is freed of a copy that is made while it runs.
    found = allocated(lambda: joined_weights(copy.deepcopy(model)).__enter__())
    found -= sum(weight.nbytes for weight in model.parameters())
    assert 1 <= memory.joined_bytes(model.args, work) / found < MOST
    assert memory.memory_plan(model.args, work, {}).prefill >= found


def test_kinds_of_counts_are_those_of_names():
    args = tiny_args(
        vision_args=None,
        norm="layer",
        qk_norm="head",
        qkv_bias=True,
        attn_sinks=True,
        context_dim=8,
        moe_args={"shared_expert": True, "router_bias": True, "interleave_moe_layer_step": 2},
    )
    found: dict[str, int] = {}
    for name, weight in LLM(args).named_parameters():
        found[weight_kind(name)] = found.get(weight_kind(name), 0) + weight.numel()
    assert found == weight_counts(args)
    kinds = {"feed-forward", "experts", "attention", "norms", "embeddings", "output"}
    assert set(found) == kinds


@pytest.mark.parametrize("kept", [True, False])
def test_weights_that_stay_mapped_are_known_before(kept, tmp_path):
    save(LLM(tiny_args(dim=64)), tmp_path, format="hf")
    dtype = None if kept else "bfloat16"
    plan, model = load_plan(ModelLocation(tmp_path), dtype=dtype), load(tmp_path, dtype=dtype)
    assert plan.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    areas = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path) in line:
            start, end = (int(one, 16) for one in line.split()[0].split("-"))
            areas.append(range(start, end))
    mapped = [x for x in model.parameters() if any(x.data_ptr() in area for area in areas)]
    assert plan.mapped_bytes == sum(x.nbytes for x in mapped)
    assert bool(mapped) == kept


@pytest.mark.parametrize("draft", [None, "demo"])
def test_what_is_said_to_fit_fits_and_no_more(draft, monkeypatch):
    model = describe_model("llama3-8b")
    options = {"draft": None if draft is None else describe_model(draft)}
    weights = sum(memory_answer(model, 1).plan.weights.values())
    free = weights + 2_000_000_000
    monkeypatch.setattr("transom.inference.memory_answer.host_bytes_left", lambda: free)
    answer = memory_answer(model, 1000, 3, **options)
    for tokens, rows in ((answer.most_tokens, 3), (1000, answer.most_rows)):
        assert tokens >= 1000 and rows >= 3
        assert memory_answer(model, tokens, rows, **options).plan.needed <= free
    assert memory_answer(model, answer.most_tokens + 1, 3, **options).plan.needed > free
    assert memory_answer(model, 1000, answer.most_rows + 1, **options).plan.needed > free


def test_the_verb_prints_what_the_function_returns_without_torch(capsys):
    words = ("--memory", "--context", "700", "--batch", "2", "--kv-bits", "8", "--json")
    code = (
        "import sys\nfrom transom.cli.main import main\n"
        f"assert main(['inspect', 'gpt-oss-20b', *{words}]) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    document = json.loads(run_python(code))
    args = describe_model("gpt-oss-20b").args
    assert document["plan"]["cache"] == memory.cache_parts(args, Workload(2, 700, 2, 8))
    assert {"ring of a window", "all tokens", "positions"} == set(document["plan"]["cache"])
    assert document["prefix_limit"] == memory.PREFIX_BYTES
    assert main(["inspect", "gpt-oss-20b", *words[:-1]]) == 0
    assert f"{document['total']:,}" in capsys.readouterr().out


def test_the_document_of_a_folder_has_the_bytes_of_its_weights_by_kind(tmp_path, capsys):
    save(LLM(tiny_args(dim=64)), tmp_path, format="hf")
    assert main(["inspect", str(tmp_path), "--memory", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["weights"] == load_plan(ModelLocation(tmp_path)).weights


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--memory", "--context", "0"), "context: got 0"),
        (("--memory", "--batch", "0"), "batch: got 0"),
        (("--memory", "--kv-bits", "4"), "kv_bits: got 4"),
        (("--memory", "--dtype", "int8"), "dtype: got 'int8'"),
        (("--memory", "--keep-quantized"), "keep_quantized: got True"),
        (("--memory", "--offload", "disk"), "offload: got 'disk'; expected files of weights"),
        (("--offload", "disk"), "--offload: got 'disk'; valid only with --memory"),
        (("--memory", "--draft-model", "no-such"), "model: got 'no-such'"),
        (("--memory", "--trace", "a"), "--memory: got True"),
        (("--context", "5"), "--context: got 5; valid only with --memory"),
        (("demo", "--memory"), "--memory: got True; valid only with one model"),
        (("demo", "--batch", "2"), "--batch: got 2; valid only with --memory"),
        (("--kv-bits", "8"), "--kv-bits: got 8; valid only with --memory"),
    ],
)
def test_a_wrong_request_is_one_sentence(words, told, capsys):
    assert main(["inspect", "demo", *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_mapped_weights_that_do_not_fit_are_told_and_not_refused(tmp_path, monkeypatch, capsys):
    save(LLM(tiny_args(dim=64)), tmp_path)
    plan = load_plan(ModelLocation(tmp_path))
    monkeypatch.setattr(room, "host_bytes_left", lambda: plan.weight_bytes)
    given = plan.args, 1, 16, plan.dtype, plan.device, room.DecodeArgs()
    room.check_memory(*given, load=plan)
    assert "read again for every token" in capsys.readouterr().err

"""Compiled decode steps give the tokens of plain ones, compile nothing per token, and give way."""

from functools import partial

import pytest
import torch

from benchmarks import gpu_decode
from tests.helpers import random_model, tiny_args
from transom.base.errors import collected_notices
from transom.inference import compiled, loop
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import stream
from transom.layers.compiled import compile_forward
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model

pytestmark = pytest.mark.usefixtures("fresh_compiler")

KINDS = {
    "full": {},
    "window": {"sliding_window": 5, "layer_pattern": "SF"},
    "chunk": {"attention_chunk_size": 6, "nope_layer_interval": 2},
}
PROMPTS = [list(range(1, 20)), [7], [5, 9, 30, 2]]
COMPILE = DecodeArgs(compile=True)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile has made, run without compiling them."""
    made = []

    def counting(graph, example_inputs):
        made.append(graph)
        return graph.forward

    compile_it = partial(compile_forward, backend=counting)
    monkeypatch.setattr(compiled, "compile_forward", lambda forward, **_: compile_it(forward))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_compiles_anything(kind, graphs):
    model = random_model(tiny_args(**KINDS[kind])).double()
    options = {"max_new_tokens": 70}
    expected = list(stream(model, PROMPTS, **options))
    got, counts = [], []
    for ids in stream(model, PROMPTS, decode=COMPILE, **options):
        got.append(ids)
        counts.append(len(graphs))
    assert got == expected
    assert counts[0] == 0  # the prompt runs plainly
    assert 0 < counts[2] == counts[-1]


def test_a_longer_view_of_the_cache_compiles_once_more(graphs):
    model = random_model(tiny_args(max_seq_len=1024)).double()
    counts = [len(graphs) for _ in stream(model, [[1] * 250], max_new_tokens=600, decode=COMPILE)]
    assert counts[2] == 2 and counts[-1] == 3  # of blocks and of the output; of longer blocks


@pytest.mark.slow
def test_kernels_are_those_of_the_equations_and_stay_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    model = random_model(tiny_args()).double()
    expected = list(stream(model, PROMPTS, max_new_tokens=9))
    assert list(stream(model, PROMPTS, max_new_tokens=9, decode=COMPILE)) == expected
    assert any((tmp_path / "inductor").rglob("*.so"))


def test_without_a_compiler_the_steps_are_plain(monkeypatch):
    def no_compiler(graph, example_inputs):
        raise RuntimeError("no working C++ compiler found" + "\nand more that nobody reads" * 100)

    monkeypatch.setattr(compiled, "compile_forward", partial(compile_forward, backend=no_compiler))
    model = random_model(tiny_args(**KINDS["window"])).double()
    expected = list(stream(model, PROMPTS, max_new_tokens=9))
    with collected_notices() as notices:
        for _ in range(2):
            assert list(stream(model, PROMPTS, max_new_tokens=9, decode=COMPILE)) == expected
    (told,) = notices
    assert "no working C++ compiler found" in told and len(told) < 400


@pytest.mark.slow
def test_quantized_weights_stay_with_the_products_of_the_cpu(graphs):
    model = quantize_model(random_model(tiny_args()), QuantizeArgs("int8", group=0))
    with collected_notices() as notices:
        list(stream(model, PROMPTS, max_new_tokens=4, decode=COMPILE))
    assert not graphs and any(line.startswith("compile: quantized") for line in notices)


def host_state(cache):
    return cache.bound, cache.peak, cache.rolled_back


class Recorded(compiled.CompiledSteps):
    """Records steps as on CUDA, with blocks that are not compiled."""

    def __init__(self, model):
        super().__init__(model)
        self._records, self._blocks = True, None


def recorded_on_the_cpu(caches):
    """A stand-in for CUDA graphs: `record` computes nothing, a replay changes no Python object."""

    def record(function):
        cache = caches[-1]
        before = cache.snapshot()
        function()
        counted = host_state(cache)
        cache.restore(before)
        cache.bound, cache.peak, cache.rolled_back = counted

        def replay():
            state, placements = host_state(cache), [x.placement for x in cache.stores]
            result = function()
            cache.bound, cache.peak, cache.rolled_back = state
            for store, placement in zip(cache.stores, placements, strict=True):
                store.placement = placement
            return result

        return replay

    return record


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_is_counted_on_the_host(kind, monkeypatch):
    model = random_model(tiny_args(max_seq_len=400, **KINDS[kind])).double()
    prompts = [[3] * 240, list(range(1, 20))]
    free = list(stream(model, prompts, max_new_tokens=40))
    options = {"max_new_tokens": 40, "stop_tokens": [free[25][1]]}
    caches = [model.make_cache(2, 300)]
    expected = list(stream(model, prompts, cache=caches[0], **options))
    monkeypatch.setattr(loop, "compiled_steps", Recorded)
    monkeypatch.setattr(compiled, "record", recorded_on_the_cpu(caches))
    caches.append(model.make_cache(2, 300))
    assert list(stream(model, prompts, cache=caches[1], decode=COMPILE, **options)) == expected
    plain, recorded = caches
    assert host_state(recorded) == host_state(plain)
    assert torch.equal(recorded.lengths_B, plain.lengths_B)


def test_a_step_that_cannot_be_recorded_runs(monkeypatch):
    model = random_model(tiny_args(**KINDS["window"])).double()
    cache = model.make_cache(3, 40)

    def refuse(function):
        recorded_on_the_cpu([cache])(function)
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = list(stream(model, PROMPTS, max_new_tokens=9))
    monkeypatch.setattr(loop, "compiled_steps", Recorded)
    monkeypatch.setattr(compiled, "record", refuse)
    with collected_notices() as notices:
        got = list(stream(model, PROMPTS, max_new_tokens=9, decode=COMPILE, cache=cache))
    assert got == expected
    assert [line.startswith("compile: no CUDA graph") for line in notices] == [True]


def test_the_benchmark_of_a_gpu_runs():
    shape = {**gpu_decode.SHAPE, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    shape |= {"hidden_dim": 96, "vocab_size": 61, "max_seq_len": 1024}
    cases = gpu_decode.cases(torch.device("cpu"), shape, prefill=64, compile=False)
    assert len(cases) == 4 and all(case["tokens_per_second"] > 0 for case in cases)

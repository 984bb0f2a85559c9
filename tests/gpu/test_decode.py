"""Decoding on a CUDA device: the tokens of the CPU, without waiting for the device, and compiled."""

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.base.errors import collected_notices
from transom.inference.decode_args import DecodeArgs
from transom.inference.joined_weights import joined_weights
from transom.inference.loop import stream
from transom.inference.sampling import SamplingArgs
from transom.layers.inputs import TransformerInput
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = {
    "full": {},
    "window": {"sliding_window": 7, "layer_pattern": "SF"},
    "llama4": {
        "attention_chunk_size": 8,
        "nope_layer_interval": 2,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 4.0,
    },
}
PROMPTS = [list(range(1, 20)), [7], [5, 9, 30, 2]]
SAMPLED = SamplingArgs(
    temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2
)
COMPILE = DecodeArgs(compile=True)


@pytest.fixture(params=KINDS)
def model(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    return random_model(tiny_args(max_seq_len=1024, **KINDS[request.param]))


@pytest.mark.parametrize("sampling", [SamplingArgs(), SAMPLED], ids=["greedy", "sampled"])
def test_tokens_and_caches_equal_those_of_the_cpu(model, sampling):
    free = list(stream(model, PROMPTS, max_new_tokens=20, sampling=sampling))
    options = {"max_new_tokens": 20, "sampling": sampling, "stop_tokens": [free[4][0], free[9][1]]}
    results = []
    for device in ("cpu", "cuda"):
        cache = model.to(device).make_cache(3, 64, slack=0)
        got = list(stream(model, PROMPTS, cache=cache, **options))
        results.append((got, cache.lengths_B.tolist()))
    assert results[1] == results[0]


def test_the_surplus_token_of_a_closed_stream_is_taken_back(model):
    cache = model.cuda().make_cache(1, 64)
    steps = stream(model, PROMPTS[:1], max_new_tokens=20, cache=cache)
    for _ in range(5):
        next(steps)
    steps.close()
    assert cache.lengths_B.tolist() == [len(PROMPTS[0]) + 4]


@pytest.mark.parametrize("decode", [DecodeArgs(), COMPILE], ids=["plain", "compiled"])
@pytest.mark.parametrize("sampling", [SamplingArgs(), SAMPLED], ids=["greedy", "sampled"])
def test_no_step_waits_for_the_device(model, decode, sampling):
    options = {"sampling": sampling, "stop_tokens": [60], "decode": decode}
    steps = stream(model.cuda(), PROMPTS, max_new_tokens=100, **options)
    for _ in range(6):  # the first steps compile, probe kernels and are recorded
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(70):  # new random numbers go to the device on the way
            next(steps, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [1, 3])  # products of one row have kernels of their own
def test_compiled_steps_are_recorded_and_equal_plain_ones(model, rows):
    model = model.double().cuda()  # without near ties
    options = {"max_new_tokens": 300, "stop_tokens": [60]}  # beyond one length of the view
    expected = list(stream(model, PROMPTS[:rows], **options))
    with collected_notices() as notices:
        got = list(stream(model, PROMPTS[:rows], decode=COMPILE, **options))
    assert got == expected
    assert not [line for line in notices if line.startswith("compile")]


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_steps_multiply_by_codes(kind, rows):
    args = tiny_args(dim=64, hidden_dim=128)
    model = quantize_model(random_model(args, std=0.1), QuantizeArgs(kind, group=32)).cuda()
    results = []
    for decode in (DecodeArgs(), COMPILE):
        log_probs = []
        options = {"max_new_tokens": 12, "log_probs": log_probs, "decode": decode}
        with collected_notices() as notices:
            ids = list(stream(model, PROMPTS[:rows], **options))
        assert not [line for line in notices if line.startswith("compile")]
        results.append((ids, torch.stack(log_probs)))
    (plain, expected), (compiled, got) = results
    assert compiled == plain
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def kernels(model):
    """Return the logits of one row, and the number of kernels that compute them."""
    inputs = TransformerInput(torch.tensor([[5]], device="cuda"))
    with torch.no_grad():
        model(inputs)
        with torch.profiler.profile() as profile:
            logits = model(inputs).logits
    return logits, sum(one.device_type.name == "CUDA" for one in profile.events())


def test_joined_weights_are_multiplied_by_fewer_kernels():
    model = random_model(tiny_args()).double().cuda()
    expected, before = kernels(model)
    with joined_weights(model):
        got, count = kernels(model)
    torch.testing.assert_close(got, expected)
    assert count <= before - 3 * model.args.n_layers

"""A window model reads and writes on and on: memory stays, and the last logits are still right."""

from __future__ import annotations

import json

import pytest

from tests.helpers import run_python

STREAM = """
import json, resource, sys
import torch
from tests.helpers import random_model, random_tokens, tiny_args
from transom.models.llm import TransformerInput

torch.set_num_threads(1)
total, decoded, chunk, window = {total}, {decoded}, 500, 256
model = random_model(tiny_args(sliding_window=window, max_seq_len=1024))
tokens = random_tokens(1, total)
cache = model.make_cache(1)

def feed(a, b):
    return model(TransformerInput(tokens[:, a:b], logits="last"), cache=cache, inference=True).logits[0, 0]

def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for at in range(0, total // 10, chunk):
    feed(at, at + chunk)
early = peak_kib()
for at in range(total // 10, total - decoded, chunk):
    feed(at, at + chunk)
for at in range(total - decoded, total):
    last = feed(at, at + 1)
# Two layers of window 256 reach back 510 tokens: the last 600 alone must give the same logits.
recent = TransformerInput(tokens[:, -600:], tokens_position=total - 600, logits="last")
alone = model(recent, inference=True).logits[0, 0]
error = ((last - alone).norm() / alone.norm()).item()
print(json.dumps({{"early": early, "end": peak_kib(), "error": error, "cache_bytes": cache.bytes}}))
"""


@pytest.mark.parametrize(
    ("total", "decoded"),
    [(20_000, 500), pytest.param(100_000, 2_000, marks=pytest.mark.slow)],
)
def test_memory_of_a_window_model_does_not_grow_with_the_stream(total, decoded):
    result = json.loads(run_python(STREAM.format(total=total, decoded=decoded)))
    assert result["end"] <= 1.01 * result["early"], (
        "peak resident memory grew after the first tenth"
    )
    assert result["error"] < 1e-3

"""A model of windows alone reads and writes without end, in constant memory.

A long prompt runs through the generation loop, which then decodes. Every window of every layer lies
within the last tokens, so a forward of these alone, without a cache and with the dense reference of
attention, must give the same log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from transom.attention.reference import reference
from transom.base.errors import expect
from transom.base.runtime import resident_bytes
from transom.config.model_args import ModelArgs
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import stream
from transom.layers.inputs import TransformerInput
from transom.verify.findings import TOLERANCES, Finding, difference, exact
from transom.verify.sample_models import BASE, random_tokens, sample_model

WINDOW, DECODED = 256, 2000
LEAST = 4096  # tokens
DECODE = DecodeArgs(prefill_step_size=1024)  # calls of the prefill are longer than the ring
NOISE = 8e6  # bytes by which resident memory may grow, besides three copies of the ids


def check(tokens: int) -> Iterator[Finding]:
    """Run `tokens` tokens through a small model with windows of 256 tokens, in float32.

    The last 2,000 tokens are decoded one by one, or the last half of fewer tokens.

    Raises:
        RequestError: There are fewer than `LEAST` tokens.
    """
    expect(tokens >= LEAST, "--tokens", tokens, f"{LEAST:,} or more")
    args = ModelArgs.from_dict({**BASE, "max_seq_len": 4096, "sliding_window": WINDOW})
    model, count = sample_model(args, dtype=torch.float32), min(DECODED, tokens // 2)
    prompt, cache = random_tokens(args, 1, tokens - count)[0].tolist(), model.make_cache(1)
    next(stream(model, [prompt[: tokens // 8]], max_new_tokens=1, decode=DECODE, cache=cache))
    before = cache.bytes, resident_bytes()

    log_probs: list[torch.Tensor] = []
    steps = stream(
        model, [prompt], max_new_tokens=count, decode=DECODE, cache=cache, log_probs=log_probs
    )
    ids = prompt + [id for (id,) in steps if id is not None]
    after = cache.bytes, resident_bytes()

    case = f"{tokens:,} tokens, window {WINDOW}"
    yield exact("constant memory", f"{case}: bytes of the cache", after[0] - before[0])
    growth = max(0, after[1] - before[1])
    yield Finding("constant memory", f"{case}: growth in bytes", growth, NOISE + 24 * tokens)

    start = max(0, tokens - count - args.n_layers * WINDOW)
    model.attend = reference
    recent = TransformerInput(torch.tensor([ids[start:]]), tokens_position=start)
    logits = model(recent, inference=True).logits[0, -count - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[-count:])[:, None])[:, 0]
    error = difference(torch.cat(log_probs), expected)
    yield Finding("tokens in order", f"{case}: the last {count:,}", error, TOLERANCES[model.dtype])

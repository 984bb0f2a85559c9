"""Exported programs, written and read again, against the model that they were made of."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from transom.cache.model_cache import ModelCache
from transom.checkpoints.exported import DECODE, PREFILL, Programs, export_programs
from transom.checkpoints.load import load
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.verify.findings import TOLERANCES, Finding, close, exact
from transom.verify.sample_models import SAMPLES, random_tokens, sample_model
from transom.verify.targets import small_models

ROWS, PROMPT, DECODED, MORE = 2, 13, 12, 9  # more tokens of a second prefill; longer than windows
CAPACITY = 64


def check(model: str | None = None) -> Iterator[Finding]:
    """Compare the logits of a padded prefill, of greedy decoding and of a second prefill.

    Args:
        model: A folder or name that `load` opens, which runs in the dtype of its files; all sample
            models in float32 by default.
    """
    if model is not None:
        yield from _compare(model, load(model, keep_quantized=False))
        return
    for name, args in small_models(None, reversed(SAMPLES)):  # the smallest first
        yield from _compare(name, sample_model(args, dtype=torch.float32))


@torch.no_grad()
def _compare(name: str, model: LLM) -> Iterator[Finding]:
    made = export_programs(model, CAPACITY, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        made.write(Path(folder))
        run = [torch.export.load(Path(folder) / file).module() for file in (PREFILL, DECODE)]
    tokens, more = random_tokens(model.args, ROWS, PROMPT), random_tokens(model.args, ROWS, MORE, 1)
    cache, own = made.cache, model.make_cache(ROWS, CAPACITY)
    calls = [(tokens, (PROMPT, 5)), *[(None, (1, 1))] * DECODED, (more, (3, MORE)), (None, (1, 0))]
    ids, differ = tokens[:, :1], 0
    tolerance = TOLERANCES[model.dtype]
    for number, (given, counts) in enumerate(calls):
        inputs, lengths = ids if given is None else given, torch.tensor(counts)
        expected = _eager(model, own, inputs, lengths)
        logits, cache = run[inputs.size(1) == 1](made.weights, inputs, lengths, cache)
        kind = "decode" if given is None else "prefill"
        ran = lengths > 0
        yield close(
            f"{kind} = eager", f"{name}, call {number}", logits[ran], expected[ran], tolerance
        )
        ids = expected.argmax(-1, keepdim=True)
        differ += int((logits.argmax(-1, keepdim=True) != ids)[ran].sum())
    if model.dtype == torch.float32:  # rounding to 16 bits makes ties
        yield exact("greedy tokens", name, differ)
    yield from _beyond(name, made, run[1])


def _eager(model: LLM, cache: ModelCache, tokens: Tensor, lengths: Tensor) -> Tensor:
    return model(TransformerInput(tokens, lengths=lengths, logits="last"), cache).logits[:, 0]


def _beyond(name: str, made: Programs, decode: torch.nn.Module) -> Iterator[Finding]:
    """Check that rows beyond the capacity have no logits, if anything limits them."""
    full = {**made.cache, "lengths": torch.tensor([CAPACITY, CAPACITY - 1])}
    one = torch.ones(ROWS, dtype=torch.int64)
    logits, _ = decode(made.weights, one[:, None], one, full)
    limited = any(x.size(1) == CAPACITY + 1 for key, x in full.items() if "positions" in key)
    found = logits.isnan().all(-1).tolist()
    yield exact("rows beyond the context", name, found != [limited, False], f"NaN: {found}")

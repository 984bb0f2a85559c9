"""The decode plan, whose blocks run in C++, against the modules of the same model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from transom.config.model_args import ModelArgs
from transom.inference.decode_plan import decode_plan
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM, Runner
from transom.verify.findings import Finding, close, difference, exact
from transom.verify.sample_models import SAMPLES, random_tokens, sample_model
from transom.verify.targets import small_models

# Logits in float32, relative to the largest one: another order of summation.
TOLERANCE = 1e-5
ROWS, PROMPT = 3, 7
CALLS = (1, 1, 5, 1, 1, 4, 1, 5, 1)  # tokens of each row
# The slack of rings, and bits of the cache. Rings of 4 tokens more than a window begin again.
CACHES = {"static": (32, 16), "rings": (4, 16), "8 bits": (4, 8)}
# Blocks of these samples have parts that stay modules.
MODULES = {"deepseek"}


def check() -> Iterator[Finding]:
    """Compare the logits of decoding for every sample model, with padding and finished rows.

    In 16 bits, the plan and the modules are compared with the same model in float64, without
    experts: a router whose scores are nearly equal chooses others after any rounding.
    """
    for name, args in small_models(None, SAMPLES):
        model, tokens = sample_model(args, dtype=torch.float32), random_tokens(args, ROWS, 64)
        plan = decode_plan(model)
        assert plan is not None, "the caller has a library"
        modules = len(model.layers) - plan.covered
        yield exact("blocks in C++", name, 0 if name in MODULES else modules, "runs as modules")
        for kind in CACHES:
            measured, expected = (_logits(model, tokens, kind, runner) for runner in (plan, None))
            yield close("plan = modules", f"{name}, {kind}", measured, expected, TOLERANCE)
        for dtype in () if args.moe_args or args.mla_args else (torch.bfloat16, torch.float16):
            yield _rounding(name, args, tokens, dtype)


def _logits(model: LLM, tokens_BT: Tensor, kind: str, runner: Runner | None) -> Tensor:
    """Return the logits [tokens, V] of all calls, of the rows that have a token."""
    slack, bits = CACHES[kind]
    cache = model.make_cache(ROWS, tokens_BT.size(1), slack=slack, kv_bits=bits)
    made, start = [], PROMPT
    lengths = torch.tensor([PROMPT, 5, 6])
    with torch.inference_mode():
        model(TransformerInput(tokens_BT[:, :PROMPT], lengths=lengths), cache)
        for number, count in enumerate(CALLS):
            real = torch.tensor([count, count * (number % 3 != 1), max(1, count - 2)])
            inputs = TransformerInput(tokens_BT[:, start : start + count], lengths=real)
            output = model(inputs, cache, runner=runner)
            made += [row[:n] for row, n in zip(output.logits, real.tolist(), strict=True)]
            start += count
    return torch.cat(made)


def _rounding(name: str, args: ModelArgs, tokens_BT: Tensor, dtype: torch.dtype) -> Finding:
    """Compare the errors of the plan and of the modules against float64 with the same weights."""
    model, wide = sample_model(args, dtype=dtype), sample_model(args)
    wide.load_state_dict({key: part.double() for key, part in model.state_dict().items()})
    exact_logits = _logits(wide, tokens_BT, "rings", None)
    errors = [
        difference(_logits(model, tokens_BT, "rings", runner), exact_logits)
        for runner in (decode_plan(model), None)
    ]
    case = f"{name}, {str(dtype).removeprefix('torch.')}"
    detail = f"the error of the modules is {errors[1]:.2g}"
    return Finding("error of the plan", case, errors[0], 1.5 * errors[1], detail)

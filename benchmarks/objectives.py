"""Preference losses and distillation against the next-token loss on the same rows."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleaved
from benchmarks.head_loss import cuda_peak_mib, resident_peak_mib, subprocess_peak_mib
from benchmarks.options import BATCH, LENGTH, SHAPE
from transom.config.model_args import ModelArgs
from transom.data.batch import NO_TARGET, Batch
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.models.llm import LLM
from transom.training.finetune.args import FinetuneArgs
from transom.training.losses.distillation import Distillation, divergence
from transom.training.losses.log_probs import adapters_off
from transom.training.losses.objectives import NextToken, Objective
from transom.training.losses.preferences import Preference, precompute_reference

PROMPT = LENGTH // 2  # tokens of each row that are no answer
ADAPTER, WHOLE = "next-token loss, LoRA of rank 16", "next-token loss, all weights"
HEAD_TOKENS, HEAD_DIM, HEAD_VOCABULARY = 1024, 256, 32768
HEAD = "distillation head, 1,024 tokens, vocabulary 32,768"  # a page asks for it by this name


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return the milliseconds of a step of each method, and the memory of distillation's head."""
    out = []
    for peer, cases in ((ADAPTER, _preferences(device)), (WHOLE, _distillation(device))):
        seconds = interleaved(cases, device, rounds=5)
        out += [
            {
                "benchmark": "objectives",
                "case": name,
                "peer": peer,
                "ms": round(1000 * seconds[name], 1),
                "peer_ms": round(1000 * seconds[peer], 1),
                "ratio": round(seconds[peer] / seconds[name], 2),
            }
            for name in cases
            if name != peer
        ]
    return [*out, _head(device)]


def _preferences(device: torch.device) -> dict[str, Callable[[], None]]:
    model = _model(device)
    with contextlib.redirect_stderr(io.StringIO()):  # what it covers is no result
        apply_lora(model, LoraArgs(rank=16))
    pairs, single = _batch(device, kto=False), _batch(device, kto=True)
    with adapters_off(model):
        reference = precompute_reference(model, [pairs])
    return {
        ADAPTER: _step(NextToken(model), model, pairs),
        "DPO, the base as the reference": _step(
            Preference(model, FinetuneArgs(objective="dpo")), model, pairs
        ),
        "DPO, reference computed before": _step(
            Preference(model, FinetuneArgs(objective="dpo"), reference=reference), model, pairs
        ),
        "ORPO": _step(Preference(model, FinetuneArgs(objective="orpo")), model, pairs),
        "KTO": _step(Preference(model, FinetuneArgs(objective="kto")), model, single),
    }


def _distillation(device: torch.device) -> dict[str, Callable[[], None]]:
    model, batch = _model(device), _batch(device, kto=True)
    taught = Distillation(model, _model(device), FinetuneArgs(temperature=2.0))
    return {
        WHOLE: _step(NextToken(model), model, batch),
        "distillation, teacher of the same size": _step(taught, model, batch),
    }


def _model(device: torch.device) -> LLM:
    torch.manual_seed(0)
    model = LLM(ModelArgs.from_dict(SHAPE)).train()
    model.init_weights(0)
    with torch.no_grad():
        for weight in model.parameters():  # as drawn, every block would be the identity
            weight.add_(torch.randn_like(weight) * 0.02)
    return model.to(device)


def _batch(device: torch.device, *, kto: bool) -> Batch:
    count = BATCH * (16 if device.type == "cuda" else 1)
    ids = torch.randint(
        1, SHAPE["vocab_size"], (count, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )
    targets = ids[:, 1:].clone()
    targets[:, : PROMPT - 1] = NO_TARGET
    extras = {"desirable": torch.arange(count) % 2 == 0} if kto else {}
    lengths = torch.full((count,), LENGTH)
    per_item = 1 if kto else 2
    whole = Batch(
        ids[:, :-1],
        targets,
        lengths=lengths,
        extras=extras,
        rows_per_item=per_item,
    )
    return whole.to(device)


def _step(objective: Objective, model: LLM, batch: Batch) -> Callable[[], None]:
    """Return a forward and backward as in the trainer; bfloat16 autocast on CUDA."""

    def run() -> None:
        units = objective.units(objective.prepare(batch)).to(batch.tokens.device)
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=batch.tokens.is_cuda):
            loss = objective.loss(model(replace(batch.inputs(), logits="none")), batch, units)[
                "loss"
            ]
        loss.backward()
        model.zero_grad()

    return run


def _head(device: torch.device) -> dict[str, Any]:
    """Measure time and memory of distillation's loss in chunks against full logits."""
    cases = _heads(HEAD_VOCABULARY, device)
    seconds = interleaved(cases, device, rounds=3)
    if device.type == "cuda":
        mib = {name: cuda_peak_mib(call) for name, call in cases.items()}
    else:
        del cases
        mib = {name: subprocess_peak_mib("benchmarks.objectives", name) for name in seconds}
    return {
        "benchmark": "objectives",
        "case": HEAD,
        "peer": "full logits of both",
        "ms": round(1000 * seconds["ours"], 1),
        "peer_ms": round(1000 * seconds["peer"], 1),
        "ratio": round(seconds["peer"] / seconds["ours"], 2),
        "mib": mib["ours"],
        "peer_mib": mib["peer"],
        "memory_share": round(mib["ours"] / mib["peer"], 2),
    }


def _heads(vocab_size: int, device: torch.device) -> dict[str, Callable[[], None]]:
    fields = {
        "dim": HEAD_DIM,
        "n_layers": 1,
        "n_heads": 4,
        "vocab_size": vocab_size,
        "tie_embeddings": True,
    }
    student, teacher = (LLM(ModelArgs.from_dict(fields)) for _ in range(2))
    for model in (student, teacher):
        torch.nn.init.normal_(model.tok_embeddings.weight, std=HEAD_DIM**-0.5)
        model.to(device)
    hidden, taught = torch.randn(2, 1, HEAD_TOKENS, HEAD_DIM, device=device)
    hidden.requires_grad_()
    targets = torch.randint(vocab_size, (1, HEAD_TOKENS), device=device)
    objective = Distillation(student, teacher, FinetuneArgs(temperature=2.0))

    def run(make: Callable[[], Tensor]) -> None:
        make().backward()
        hidden.grad = student.tok_embeddings.weight.grad = None

    def ours() -> Tensor:
        return objective.compare(hidden, taught, targets).loss(2.0, 0.5)

    def full() -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher.project(taught)
        return divergence(student.project(hidden), teacher_logits, targets, 2.0).loss(2.0, 0.5)

    return {"ours": lambda: run(ours), "peer": lambda: run(full)}


if __name__ == "__main__":
    small, large = (
        _heads(size, torch.device("cpu"))[sys.argv[1]] for size in (64, HEAD_VOCABULARY)
    )
    small()  # what the first call allocates for good
    print(json.dumps(resident_peak_mib(large)))

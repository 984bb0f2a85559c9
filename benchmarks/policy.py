"""A step of learning from rewards, sampling included, against learning from given rows."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved
from benchmarks.options import SHAPE
from transom.config.model_args import ModelArgs
from transom.data.batch import Batch
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.training.finetune.args import FinetuneArgs
from transom.training.losses.objectives import NextToken, Objective
from transom.training.rl.policy import PolicyGradient
from transom.training.rl.rewards import Reward
from transom.training.rl.rollouts import Question, QuestionBatches

QUESTIONS, GROUP, PROMPT, ANSWER = 2, 8, 64, 64  # of a step; tokens of every prompt and answer
PEER = "next-token loss on the same rows"


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return the milliseconds of learning alone, with the KL, and with sampling."""
    seconds = interleaved(cases(device), device, rounds=5)
    return [
        {
            "benchmark": "policy",
            "case": name,
            "peer": PEER,
            "ms": round(1000 * seconds[name], 1),
            "peer_ms": round(1000 * seconds[PEER], 1),
            "ratio": round(seconds[PEER] / seconds[name], 2),
        }
        for name in seconds
        if name != PEER
    ]


def cases(device: torch.device) -> dict[str, Callable[[], None]]:
    """Return every case, with an adapter on the same model; no answer ends early."""
    model = LLM(ModelArgs.from_dict(SHAPE)).train()
    model.init_weights(0)
    model.to(device)
    with contextlib.redirect_stderr(io.StringIO()):  # what it covers is no result
        apply_lora(model, LoraArgs(rank=16))
    reward = Reward("length", lambda answer, reference: float(len(answer) % 7), Path(__file__))
    ids = torch.randint(
        1, 256, (QUESTIONS, PROMPT), generator=torch.Generator().manual_seed(0)
    ).tolist()
    questions = [Question(str(index), row, {}) for index, row in enumerate(ids)]
    batches = QuestionBatches(
        questions, group=GROUP, answer_tokens=ANSWER, rows_per_step=QUESTIONS, seed=0
    )

    def grpo(beta: float) -> PolicyGradient:
        args = FinetuneArgs(objective="grpo", beta=beta, answer_tokens=ANSWER)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return PolicyGradient(model, byte_tokenizer(), reward, (), args, dtype)

    plain, near = grpo(0.0), grpo(0.04)
    drawn = plain.prepare(batches.next()).to(device)
    return {
        PEER: lambda: learn(NextToken(model), model, drawn),
        "GRPO, learning alone": lambda: learn(plain, model, drawn),
        "GRPO, learning with the KL": lambda: learn(near, model, drawn),
        "GRPO, drawing and learning": lambda: learn(
            plain, model, plain.prepare(batches.next()).to(device)
        ),
    }


def learn(objective: Objective, model: LLM, batch: Batch) -> None:
    """Make a forward and backward as in the trainer; bfloat16 autocast on CUDA."""
    units = objective.units(batch)
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=batch.tokens.is_cuda):
        loss = objective.loss(model(replace(batch.inputs(), logits="none")), batch, units)["loss"]
    loss.backward()
    model.zero_grad()

"""The probability with which a token is sampled is the one that training computes for it.

Sampling decodes token by token with a KV cache; training makes one forward of padded rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from transom.attention.backends import BACKENDS, auto, refusal
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import expect, notice
from transom.checkpoints.load import load
from transom.data.batch import NO_TARGET
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.training.losses.log_probs import measured_log_probs
from transom.training.rl.policy import sample_answers
from transom.training.rl.rollouts import Question, QuestionBatch, answer_seed, rollout_batch
from transom.verify.findings import Finding
from transom.verify.sample_models import random_tokens, sample_model
from transom.verify.targets import has_weights, small_models

SAMPLES = ("mixed", "gemma", "deepseek")  # windows and chunks; soft caps; latents and experts
PROMPTS = (3, 9, 14, 2)  # tokens
GROUP = 2  # answers to each prompt, which share its keys
ANSWER_TOKENS = 24  # more than a ring of the samples keeps, together with the longest prompt
STOPPING = 16  # every 16th token ends an answer, so that answers differ in length
TEMPERATURES = (1.0, 0.7)
FLOAT32_TOLERANCE = 1e-4  # nats, of the worst token
# Name, dtype of the weights, dtype of the products under autocast. Weights in bfloat16 come last,
# because they cannot be restored.
PRECISIONS = (
    ("float32", torch.float32, torch.float32),
    ("bfloat16 products", torch.float32, torch.bfloat16),
    ("bfloat16", torch.bfloat16, torch.bfloat16),
)


class Preferred:
    """Attention by one backend for the jobs that it supports, and by `auto` for the others.

    Attributes:
        used: How often the backend was used.
        declined: Why it was not used for the last job that it declined.
    """

    def __init__(self, name: str) -> None:
        self.backend, self.used, self.declined = BACKENDS[name], 0, ""

    def __call__(self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
        reason = refusal(self.backend.name) or self.backend.why_not(q_BTNH, view, spec, score)
        if reason is not None:
            self.declined = reason
            return auto(q_BTNH, view, spec, score)
        self.used += 1
        return self.backend.function(q_BTNH, view, spec, score)


def check(model: str | None = None, *, device: str = "cpu") -> Iterator[Finding]:
    """Compare a folder's own weights, a small copy of another model, or samples without a model."""
    if model is not None and has_weights(model):
        yield from compare_policies([(model, load(model, device, "float32"))])
        return
    small = small_models(model, SAMPLES)
    yield from compare_policies((name, sample_model(args).to(device)) for name, args in small)


def compare_policies(models: Iterable[tuple[str, LLM]]) -> Iterator[Finding]:
    """Compare answers to random prompts in every precision, backend and temperature.

    The models have bfloat16 weights afterwards. A notice names the backends that support nothing.

    Raises:
        RequestError: If a model has a head in place of next-token logits.
    """
    declined: dict[str, str] = {}
    for name, model in models:
        expect(model.args.head is None, "head", model.args.head, "a language model")
        for (precision, weights, products), backend in product(PRECISIONS, BACKENDS):
            model.to(weights)
            model.attend = attend = Preferred(backend)
            label = f"{precision}, {backend}"
            findings = [
                _compare(model, f"{name} at temperature {one:g}", label, products, one)
                for one in TEMPERATURES
            ]
            if attend.used:
                declined[f"{backend} in {precision}"] = ""
                yield from findings
            else:
                declined.setdefault(f"{backend} in {precision}", attend.declined)
    for backend, reason in declined.items():
        if reason:
            notice(f"{backend}: nothing was compared ({reason})")


@torch.no_grad()
def _compare(
    model: LLM, case: str, label: str, products: torch.dtype, temperature: float
) -> Finding:
    """Sample answers, and compare the log-probability of every token with that of training.

    In float32 the worst token counts. In bfloat16 the median counts, and it may be one step of the
    dtype at the largest logit, since storing a logit of that size rounds it by up to half a step.
    Single tokens may differ more, above all where two experts are nearly tied.
    """
    args, device = model.args, model.device
    ids = random_tokens(args, len(PROMPTS), max(PROMPTS)).tolist()
    prompts = enumerate(PROMPTS)
    questions = tuple(Question(str(row), ids[row][:count], {}) for row, count in prompts)
    places = product(range(len(PROMPTS)), range(GROUP))
    seeds = tuple(answer_seed(0, 0, row, index) for row, index in places)
    batch = QuestionBatch(questions, seeds, GROUP)
    answers = sample_answers(
        model,
        byte_tokenizer(),  # the text of the answers is not used
        [question.ids for question in batch.answers],
        seeds,
        answer_tokens=ANSWER_TOKENS,
        temperature=temperature,
        stop_tokens=range(0, args.vocab_size, STOPPING),
        dtype=products,
    )
    rewards = torch.zeros(len(answers))
    rollouts = rollout_batch(batch, answers, rewards, rewards).to(device)
    half = products != torch.float32
    with torch.autocast(device.type, products, enabled=half):
        inputs, targets_BT = rollouts.inputs(), rollouts.targets
        trained_BT = measured_log_probs(model, inputs, targets_BT, temperature=temperature)
        logits = model(inputs).logits
    kept_BT, sampled_BT = targets_BT != NO_TARGET, rollouts.extras["sampled"]
    gaps_BT = (trained_BT - sampled_BT).abs()
    gaps = gaps_BT[kept_BT]
    at = divmod(int(gaps_BT.argmax()), gaps_BT.size(1))
    worst, mean, median = float(gaps.max()), float(gaps.mean()), float(gaps.median())
    case = f"{case}, {len(gaps)} tokens: largest {worst:.1e}, mean {mean:.1e} nats"
    values = f"sampled with {sampled_BT[at]:.4f}, trained with {trained_BT[at]:.4f}"
    detail = f"answer {at[0]}, token {at[1]}: {values}"
    if half:
        largest = float(logits[kept_BT].abs().max()) / temperature
        tolerance = torch.finfo(products).eps * largest
        return Finding(f"median gap, {label}", case, median, tolerance, detail)
    return Finding(f"largest gap, {label}", case, worst, FLOAT32_TOLERANCE, detail)

"""Trainer and generator are one policy: the log-probability that a token was drawn with, token by
token out of the cache, is the one that learning from it finds in one forward of padded rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from transom.attention.backends import BACKENDS, auto, refusal
from transom.attention.mask import MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import notice, require
from transom.config.model_args import ModelArgs
from transom.data.batch import NO_TARGET
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.training.losses.log_probs import measured_log_probs
from transom.training.rl.policy import draw_answers
from transom.training.rl.rollouts import Question, QuestionBatch, answer_seed, rollout_batch
from transom.verify.findings import Finding
from transom.verify.sample_models import SAMPLES, random_tokens, sample_model

FAMILIES = (
    "mixed",
    "gemma",
    "deepseek",
)  # windows, chunks and scaled frequencies; soft caps; latents and experts
PROMPTS = (3, 9, 14, 2)  # tokens
GROUP = 2  # answers to each, which share the prompt's keys
ANSWER_TOKENS = 24  # with the longest prompt more than a ring of the built-in models holds
STOPPING = 16  # one id in as many ends an answer, so that rows differ in length
TEMPERATURES = (1.0, 0.7)
FLOAT32_TOLERANCE = 1e-4  # nats, of the worst token


@dataclass(frozen=True)
class Precision:
    """What the weights are in, and the products, where autocast narrows them."""

    name: str
    weights: torch.dtype
    products: torch.dtype

    def finding(
        self, backend: str, where: str, gaps_T: Tensor, largest_logit: float, detail: str
    ) -> Finding:
        """float32: the worst token. Narrower: the median, within one step of the dtype at the
        largest logit.

        Being written down puts a logit of that size off by up to half a step. Single tokens may be
        further apart, above all where a near-tie of a router sends one to another expert; the worst
        is shown.
        """
        worst, mean = float(gaps_T.max()), float(gaps_T.mean())
        what, error, tolerance = "largest", worst, FLOAT32_TOLERANCE
        if self.products != torch.float32:
            what, error = "median", float(gaps_T.median())
            tolerance = torch.finfo(self.products).eps * largest_logit
        where = f"{where}: largest {worst:.1e}, mean {mean:.1e} nats"
        detail = "" if error <= tolerance else detail
        return Finding(f"{what} gap, {self.name}, {backend}", where, error, tolerance, detail)


PRECISIONS = (  # weights in bfloat16 last: they do not come back
    Precision("float32", torch.float32, torch.float32),
    Precision("bfloat16 products", torch.float32, torch.bfloat16),
    Precision("bfloat16", torch.bfloat16, torch.bfloat16),
)


class Preferring:
    """Attention by one backend wherever it can, by `auto` elsewhere; `used` counts its calls."""

    def __init__(self, name: str) -> None:
        self.backend, self.used, self.why_not = BACKENDS[name], 0, ""

    def __call__(self, q_BTNH: Tensor, view: CacheView, spec: MaskSpec, score: ScoreArgs) -> Tensor:
        reason = refusal(self.backend.name) or self.backend.why_not(q_BTNH, view, spec, score)
        if reason is not None:
            self.why_not = reason
            return auto(q_BTNH, view, spec, score)
        self.used += 1
        return self.backend.function(q_BTNH, view, spec, score)


def check_policy(device: str = "cpu") -> Iterator[Finding]:
    """Built-in models."""
    return compare_policies(
        (name, sample_model(ModelArgs.from_dict(SAMPLES[name])).to(device)) for name in FAMILIES
    )


def compare_policies(models: Iterable[tuple[str, LLM]]) -> Iterator[Finding]:
    """Answers to prompts of random tokens in every precision, with every backend, at two
    temperatures.

    Weights end up in bfloat16. A backend that could do nothing is said.
    """
    declined: dict[tuple[str, str], str] = {}
    for name, model in models:
        require(model.args.head is None, "head", model.args.head, "expected a language model")
        for precision, backend in product(PRECISIONS, BACKENDS):
            model.to(precision.weights)
            model.attend = attend = Preferring(backend)
            found = [_compare(model, name, precision, backend, heat) for heat in TEMPERATURES]
            if attend.used:
                declined[backend, precision.name] = ""
                yield from found
            else:
                declined.setdefault((backend, precision.name), attend.why_not)
    for (backend, precision_name), why in declined.items():
        if why:
            notice(f"{backend} in {precision_name}: nothing was compared ({why})")


@torch.no_grad()
def _compare(
    model: LLM, name: str, precision: Precision, backend: str, temperature: float
) -> Finding:
    args, device = model.args, model.device
    ids = random_tokens(args, len(PROMPTS), max(PROMPTS)).tolist()
    questions = tuple(Question(str(row), ids[row][:count], {}) for row, count in enumerate(PROMPTS))
    seeds = tuple(
        answer_seed(0, 0, row, index) for row in range(len(PROMPTS)) for index in range(GROUP)
    )
    batch = QuestionBatch(questions, seeds, GROUP, ANSWER_TOKENS)
    said = draw_answers(
        model,
        byte_tokenizer(),  # what answers say does not matter
        [question.ids for question in batch.answers],
        seeds,
        answer_tokens=ANSWER_TOKENS,
        temperature=temperature,
        stop_tokens=range(0, args.vocab_size, STOPPING),
        dtype=precision.products,
    )
    nothing = torch.zeros(len(said))
    rollouts = rollout_batch(batch, said, nothing, nothing).to(device)
    with torch.autocast(
        device.type, precision.products, enabled=precision.products != torch.float32
    ):
        inputs, targets_BT = rollouts.inputs(), rollouts.targets
        trained_BT = measured_log_probs(model, inputs, targets_BT, temperature=temperature)
        logits = model(inputs).logits
    assert logits is not None, "all logits are the default"
    kept_BT = targets_BT != NO_TARGET
    gaps_BT = (trained_BT - rollouts.extras["drawn"]).abs()
    row, column = divmod(int(gaps_BT.argmax()), gaps_BT.size(1))
    told = float(rollouts.extras["drawn"][row, column]), float(trained_BT[row, column])
    where = f"{name} at temperature {temperature:g}, {int(kept_BT.sum())} tokens"
    detail = (
        f"answer {row}, token {column}: drawn with {told[0]:.4f}, learnt from with {told[1]:.4f}"
    )
    largest = float(logits[kept_BT].abs().max()) / temperature
    return precision.finding(backend, where, gaps_BT[kept_BT], largest, detail)

"""GRPO: learning from rewards of answers that the trained model samples itself.

DeepSeekMath (Shao et al. 2024, arXiv 2402.03300) compares the answers to one question with each
other instead of training a value model. Each step learns once from the answers that it has sampled.
The ratio of PPO between the current and the sampling policy is therefore 1, and its clipping has no
effect. Shape letters: B rows, T tokens, Q questions, G answers to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transom.base.runtime import evaluating
from transom.cache.model_cache import ModelCache
from transom.chat.reasoning import marker_ids
from transom.data.batch import NO_TARGET, Batch
from transom.distributed.ranks import ALONE, Ranks
from transom.evaluation.answers import CACHE_TOKENS
from transom.evaluation.bits import batches_by_length
from transom.evaluation.score import Score
from transom.inference.forward import first_capacity, prefill
from transom.inference.sampling import SamplingArgs
from transom.inference.text import stream_text
from transom.layers.inputs import TransformerOutput
from transom.lora.adapters import adapted_modules
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.finetune.args import FinetuneArgs
from transom.training.losses.log_probs import (
    adapters_off,
    check_frozen_base,
    measured_log_probs,
    target_log_probs,
)
from transom.training.losses.objectives import Objective
from transom.training.rl.rewards import SOLVED, Reward
from transom.training.rl.rollouts import Question, QuestionBatch, SampledAnswer, rollout_batch

PREFILL_TOKENS = 512  # of one forward pass
LEAST_SPREAD = 1e-4  # added to the standard deviation, as in TRL (trainer/grpo_trainer.py)


def group_advantages(rewards_B: Tensor, group: int, *, scale: bool = True) -> Tensor:
    """Return the advantage (reward - mean) / (std + 1e-4) of each answer [B] in its group.

    A group are the `group` neighbouring answers to one question (arXiv 2402.03300, section 4.1.2).
    Without `scale` the advantage is reward - mean (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783):
    the division gives questions that are nearly always or nearly never solved a larger weight.
    """
    # In float64 the mean of equal rewards is exactly their value.
    rewards_QG = rewards_B.double().view(-1, group)
    centred_QG = rewards_QG - rewards_QG.mean(1, keepdim=True)
    if scale:
        centred_QG = centred_QG / (rewards_QG.std(1, keepdim=True) + LEAST_SPREAD)
    return centred_QG.flatten().to(rewards_B.dtype)


def kl_estimate(policy: Tensor, reference: Tensor) -> Tensor:
    """Return r - log r - 1 with r = reference / policy of sampled tokens, from log-probabilities.

    It is never negative, and its mean over samples is KL(policy || reference) (k3 of Schulman 2020,
    http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = reference - policy
    return log_ratio.exp() - log_ratio - 1


@torch.no_grad()
def sample_answers(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    answer_tokens: int,
    temperature: float,
    stop_tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> list[SampledAnswer]:
    """Sample an answer to each prompt, without dropout, and return the answers in order.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt. Equal prompts of a batch are prefilled once.
        seeds: The seed of each answer.
        answer_tokens: The most tokens of an answer.
        temperature: Divides the logits; 0 is greedy.
        stop_tokens: Ids of tokens that end an answer.
        dtype: The dtype of autocast.
    """
    device = model.device
    lengths = [len(prompt) + answer_tokens for prompt in prompts]
    answers: dict[int, SampledAnswer] = {}
    for batch in batches_by_length(lengths, CACHE_TOKENS):
        steps: list[Tensor] = []
        rows = [prompts[index] for index in batch]
        with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            completions = stream_text(
                model,
                tokenizer,
                rows,
                max_new_tokens=answer_tokens,
                sampling=SamplingArgs(temperature),
                seeds=[seeds[index] for index in batch],
                stop_tokens=stop_tokens,
                cache=_shared_cache(model, rows, answer_tokens),
                log_probs=steps,
                kept=marker_ids(tokenizer),  # so that a reward can tell reasoning from answer
            ).run()
        log_probs = torch.stack(steps, 1).tolist()
        for index, one, values in zip(batch, completions, log_probs, strict=True):
            answers[index] = SampledAnswer(one, values[: len(one.tokens)])
    return [answers[index] for index in range(len(prompts))]


def _shared_cache(model: LLM, prompts: Sequence[list[int]], new_tokens: int) -> ModelCache | None:
    """Return a cache of all but the last token of every prompt, with equal prompts prefilled once.

    None if all prompts differ, one has a single token, or the cache would have to grow later.
    """
    distinct = [*dict.fromkeys(map(tuple, prompts))]
    lengths = [len(prompt) for prompt in distinct]
    total = max(lengths) + new_tokens
    grows = first_capacity(model.args, max(lengths), total) < total
    if len(distinct) == len(prompts) or min(lengths) < 2 or grows:
        return None
    cache = model.make_cache(len(distinct), total)
    prefill(model, cache, [prompt[:-1] for prompt in distinct], PREFILL_TOKENS)
    places = {prompt: row for row, prompt in enumerate(distinct)}
    return cache.fork([places[tuple(prompt)] for prompt in prompts])


@dataclass
class PolicyGradient(Objective):
    """GRPO: the sum of -advantage log p(token) over all answer tokens, divided by their number.

    Every token has the same weight, in long and short answers (DAPO, Yu et al. 2025, arXiv
    2503.14476, section 3.3). `loss` returns, over the answers of a step:

    - `reward`, `answer_tokens` and `cut` (ended by their length): means over answers
    - `solved`: the share of answers with a reward of 1 or more
    - `reward_std`: the standard deviation in a group, a mean over questions
    - `no_signal`: the share of questions whose answers all have the same reward
    - `gap`: the mean distance, in nats, of the log-probability of a token in training from that in
      sampling; adapter dropout and router jitter make it large
    - `kl`: the divergence from the model without its adapters, if `beta` is positive

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        reward: Judges the answers.
        stop_tokens: Ids of tokens that end an answer.
        args: `answer_tokens`, `temperature` of sampling and of the log-probabilities in the loss,
            `beta` (the weight of the KL divergence from the model without its adapters) and
            `scale_rewards`, see `group_advantages`.
        dtype: The dtype of autocast in training.
        chunk: Tokens whose logits are computed at a time, see `target_log_probs`.
        ranks: The ranks of the run.
    """

    generates = True
    model: LLM
    tokenizer: Tokenizer
    reward: Reward
    stop_tokens: Sequence[int]
    args: FinetuneArgs
    dtype: torch.dtype = torch.float32
    chunk: int | None = None
    ranks: Ranks = ALONE
    # Answers of the current step over all ranks.
    step_answers: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if self.args.strength:
            check_frozen_base(self.model, f"finetune.beta: got {self.args.beta}")
        active = [
            lora for *_, adapters in adapted_modules(self.model) for lora in adapters.active_lora()
        ]
        dropout = max((lora.dropout for lora in active), default=0)
        if dropout:
            self.ranks.say(
                f"dropout {dropout:g}: answers are sampled without it, so they come from another "
                "distribution than the one that is trained"
            )

    def prepare(self, batch: QuestionBatch) -> Batch:
        """Return the batch of sampled answers to the questions of a step, with their advantages."""
        questions = batch.answers
        asked = questions, batch.seeds
        answers, rewards = self._answers(*asked, self.args.temperature, self.ranks)
        rewards_B = torch.tensor(rewards)
        rewards_QG = rewards_B.view(-1, batch.group)
        signals = (rewards_QG != rewards_QG[:, :1]).any(1).sum().to(self.ranks.device)
        self.ranks.sum(signals)
        if not int(signals):
            self.ranks.say(
                "no signal: all answers to each question of a step have the same reward, so the "
                "step learns nothing; `no_signal` in metrics.jsonl is the share of such questions"
            )
        advantages_B = group_advantages(rewards_B, batch.group, scale=self.args.scale_rewards)
        self.step_answers = len(questions) * self.ranks.row_ranks
        return rollout_batch(batch, answers, rewards_B, advantages_B)

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """Return the sum over answer tokens, divided by `units`, and the parts of the class."""
        how = (self.chunk, self.args.temperature)
        # Before the reference, whose casts of the weights autocast would keep without gradients.
        policy_BT = target_log_probs(self.model, output.hidden_BTD, micro.targets, *how)
        loss = -(micro.extras["advantages"][:, None] * policy_BT).sum() / units
        parts = {"gap": (policy_BT.detach() - micro.extras["sampled"]).abs().sum() / units}
        if self.args.strength:
            inputs = micro.inputs()
            with adapters_off(self.model):
                reference_BT = measured_log_probs(self.model, inputs, micro.targets, *how)
            kl = kl_estimate(policy_BT, reference_BT).sum() / units
            loss, parts["kl"] = loss + self.args.strength * kl, kl.detach()
        return {"loss": loss, **parts, **self._means(micro)}

    def evaluate(self, items: Sequence[Question]) -> Score:
        """Return the score of greedy answers to held-out questions; the loss is minus the reward.

        `accuracy` is the share solved, and `cut` the share that ended by their length.
        """
        answers, rewards = self._answers(items, range(len(items)), 0.0)
        sums = {
            "reward": sum(rewards),
            "accuracy": sum(one >= SOLVED for one in rewards),
            "cut": sum(one.completion.finish_reason == "length" for one in answers),
        }
        return Score(-sums["reward"], len(items), unit="examples", sums=sums)

    def _answers(
        self,
        questions: Sequence[Question],
        seeds: Sequence[int],
        temperature: float,
        ranks: Ranks = ALONE,
    ) -> tuple[list[SampledAnswer], list[float]]:
        """Return a sampled answer to each question, and its reward.

        Of `ranks`, those that call the model together sample all their answers alike: a rank whose
        own answers end early would leave the others waiting.
        """
        prompts = [question.ids for question in questions]
        asked, own = ranks.pooled([*zip(prompts, seeds, strict=True)])
        answers = sample_answers(
            self.model,
            self.tokenizer,
            [ids for ids, _ in asked],
            [seed for _, seed in asked],
            answer_tokens=self.args.answer_tokens,
            temperature=temperature,
            stop_tokens=self.stop_tokens,
            dtype=self.dtype,
        )[own]
        pairs = zip(questions, answers, strict=True)
        rewards = [self.reward(one.completion.text, row.reference, row.id) for row, one in pairs]
        return answers, rewards

    def _means(self, micro: Batch) -> dict[str, Tensor]:
        """Return this micro-batch's share of the means over answers and over questions."""
        group = micro.rows_per_item
        rewards_QG = micro.extras["rewards"].view(-1, group)
        values = {
            "reward": rewards_QG,
            "reward_std": rewards_QG.std(1) * group,
            "solved": rewards_QG >= SOLVED,
            "answer_tokens": micro.targets != NO_TARGET,
            "cut": micro.extras["cut"],
            "no_signal": (rewards_QG == rewards_QG[:, :1]).all(1) * group,
        }
        return {name: value.sum() * (1 / self.step_answers) for name, value in values.items()}

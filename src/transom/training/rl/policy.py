"""Learning from rewards that can be checked: GRPO, with answers drawn by the model that is trained.

Shape letters: B rows, T tokens, Q questions, G answers to each. DeepSeekMath (Shao et al. 2024,
arXiv 2402.03300) compares the answers to one question with each other in place of a value model. A
step draws its own answers and is the only one to learn from them, so the probabilities are those
that were drawn from: their ratio, which PPO clips, is 1 and there is nothing to clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transom.base.errors import RequestError, require
from transom.base.runtime import evaluating
from transom.cache.model_cache import ModelCache
from transom.chat.reasoning import marker_ids
from transom.data.batch import NO_TARGET, Batch
from transom.evaluation.answers import CACHE_TOKENS
from transom.evaluation.score import Score
from transom.inference.loop import first_capacity, prefill
from transom.inference.sampling import SamplingArgs
from transom.inference.text import stream_text
from transom.layers.inputs import TransformerOutput
from transom.lora.adapters import adapted_modules
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.loop.ranks import ALONE, Ranks
from transom.training.losses.log_probs import (
    adapters_off,
    check_frozen_base,
    measured_log_probs,
    target_log_probs,
)
from transom.training.losses.objectives import Objective
from transom.training.rl.rewards import SOLVED, Reward
from transom.training.rl.rollouts import Drawn, Question, QuestionBatch, rollout_batch

PREFILL_TOKENS = 512  # of a call
LEAST_SPREAD = 1e-4  # beside the standard deviation, as TRL has it (trainer/grpo_trainer.py)


def group_advantages(rewards_B: Tensor, group: int, *, scale: bool = True) -> Tensor:
    """(reward - mean) / (std + 1e-4) of each answer [B] among the `group` answers to its question.

    arXiv 2402.03300, section 4.1.2. Without `scale` the mean alone is taken off (Dr. GRPO, Liu et
    al. 2025, arXiv 2503.20783): with it, questions that are nearly always or nearly never solved
    weigh more than others.
    """
    rewards_QG = rewards_B.double().view(
        -1, group
    )  # or equal rewards would not have their own mean
    centred_QG = rewards_QG - rewards_QG.mean(1, keepdim=True)
    if scale:
        centred_QG = centred_QG / (rewards_QG.std(1, keepdim=True) + LEAST_SPREAD)
    return centred_QG.flatten().to(rewards_B.dtype)


def kl_estimate(policy: Tensor, reference: Tensor) -> Tensor:
    """r - log r - 1 with r = reference / policy of each drawn token, from log-probabilities: at
    least 0.

    Its mean over draws is KL(policy || reference) (Schulman 2020,
    http://joschu.net/blog/kl-approx.html, k3).
    """
    log_ratio = reference - policy
    return log_ratio.exp() - log_ratio - 1


@torch.no_grad()
def draw_answers(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    answer_tokens: int,
    temperature: float,
    stop_tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> list[Drawn]:
    """An answer of at most `answer_tokens` tokens to each prompt, in order, from a generator of its
    own.

    The model answers as in use, without dropout; `dtype` is that of autocast. Prompts of like
    length make a batch, in which equal ones are run once.
    """
    device = model.device
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    drawn: dict[int, Drawn] = {}
    while order:
        count = max(1, CACHE_TOKENS // (len(prompts[order[0]]) + answer_tokens))
        chosen, order = order[:count], order[count:]
        steps: list[Tensor] = []
        with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            rows = [prompts[index] for index in chosen]
            texts = stream_text(
                model,
                tokenizer,
                rows,
                max_new_tokens=answer_tokens,
                sampling=SamplingArgs(temperature),
                seeds=[seeds[index] for index in chosen],
                stop_tokens=stop_tokens,
                cache=_shared_cache(model, rows, answer_tokens),
                log_probs=steps,
                kept=marker_ids(
                    tokenizer
                ),  # a reward that reads them can tell reasoning from answer
            )
            said = texts.run()
        for index, done, log_probs in zip(
            chosen, said, torch.stack(steps, 1).tolist(), strict=True
        ):
            drawn[index] = Drawn(done, log_probs[: len(done.tokens)])
    return [drawn[index] for index in range(len(prompts))]


def _shared_cache(model: LLM, prompts: Sequence[list[int]], new_tokens: int) -> ModelCache | None:
    """All but the last token of every prompt, equal ones computed once; None where that saves or
    allows nothing.
    """
    distinct = [*dict.fromkeys(map(tuple, prompts))]
    lengths = [len(prompt) for prompt in distinct]
    total = max(lengths) + new_tokens
    grows = (
        first_capacity(model.args, max(lengths), total) < total
    )  # keys are computed again on the way
    if len(distinct) == len(prompts) or min(lengths) < 2 or grows:
        return None
    cache = model.make_cache(len(distinct), total)
    prefill(model, cache, [prompt[:-1] for prompt in distinct], PREFILL_TOKENS)
    places = {prompt: row for row, prompt in enumerate(distinct)}
    return cache.fork([places[tuple(prompt)] for prompt in prompts])


@dataclass
class PolicyGradient(Objective):
    """- sum of advantage log p(token) over the tokens of all answers, divided by their count in the
    whole step.

    Every token counts alike, however long its answer (DAPO, Yu et al. 2025, arXiv 2503.14476,
    section 3.3). `beta` weighs the KL to the model without its adapters. Parts, over the answers of
    a step: `reward`, `reward_std` (mean over questions), `solved` (rewards of 1 or more),
    `answer_tokens` (mean), `cut` (share ended by their length), `no_signal` (share of questions
    whose answers all got one reward), `gap` (mean distance in nats of a token's log-probability in
    training from that in drawing, which dropout or jitter make large), and `kl`.
    """

    model: LLM
    tokenizer: Tokenizer
    reward: Reward
    stop_tokens: Sequence[int]
    answer_tokens: int = 256
    temperature: float = 1.0
    beta: float = 0.0
    scale_rewards: bool = True
    dtype: torch.dtype = torch.float32  # of autocast, as in training
    chunk: int | None = None
    ranks: Ranks = ALONE
    # Steps without a signal since this object was made.
    silent_steps: int = field(default=0, init=False)
    # Answers of the current step over all ranks.
    step_answers: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "expected a number above 0")
        require(self.beta >= 0, "beta", self.beta, "expected 0 or more")
        require(
            self.model.args.head is None,
            "model.head",
            self.model.args.head,
            "expected a language model",
        )
        if self.beta > 0:
            try:
                check_frozen_base(self.model)
                with adapters_off(self.model):
                    pass
            except RequestError as error:
                why = "without a fixed model to stay near, expected 0"
                raise RequestError(f"finetune.beta: got {self.beta}; {why} ({error})") from None
        dropout = max(
            (
                one.dropout
                for _, _, held in adapted_modules(self.model)
                for one in held.active_lora()
            ),
            default=0,
        )
        if dropout:
            self.ranks.say(
                f"dropout {dropout:g}: answers are drawn without it, so they are learnt from as "
                f"those of another"
            )

    def prepare(self, batch: QuestionBatch) -> Batch:
        """Answers to the questions of a step, their rewards and advantages; a step without a signal
        is said.
        """
        questions = batch.answers
        said = self._answers(questions, batch.seeds, self.temperature)
        rewards_B = torch.tensor(self._rewards(questions, said))
        self._say_silent(rewards_B.view(-1, batch.group))
        advantages_B = group_advantages(rewards_B, batch.group, scale=self.scale_rewards)
        self.step_answers = len(questions) * batch.world_size
        return rollout_batch(batch, said, rewards_B, advantages_B)

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """This micro-batch's share of the loss, and of the parts that the class names."""
        # Before the reference: autocast would hand on to it the casts that the reference makes
        # without gradients.
        policy_BT = target_log_probs(
            self.model, output.hidden_BTD, micro.targets, self.chunk, self.temperature
        )
        loss = -(micro.extras["advantages"][:, None] * policy_BT).sum() / units
        parts = {"gap": (policy_BT.detach() - micro.extras["drawn"]).abs().sum() / units}
        if self.beta > 0:
            with adapters_off(self.model):
                reference_BT = measured_log_probs(
                    self.model, micro.inputs(), micro.targets, self.chunk, self.temperature
                )
            kl = kl_estimate(policy_BT, reference_BT).sum() / units
            loss, parts["kl"] = loss + self.beta * kl, kl.detach()
        return {"loss": loss, **parts, **self._shown(micro)}

    def evaluate(self, items: Sequence[Question]) -> Score:
        """Return the score of greedy answers to held-out questions; the loss is minus the reward.

        `accuracy` is the share solved, and `cut` the share that ended by their length.
        """
        answers = self._answers(items, range(len(items)), 0.0)
        rewards = self._rewards(items, answers)
        sums = {
            "reward": sum(rewards),
            "accuracy": sum(one >= SOLVED for one in rewards),
            "cut": sum(one.completion.finish_reason == "length" for one in answers),
        }
        return Score(-sums["reward"], len(items), unit="examples", sums=sums)

    def _answers(
        self, questions: Sequence[Question], seeds: Sequence[int], temperature: float
    ) -> list[Drawn]:
        return draw_answers(
            self.model,
            self.tokenizer,
            [question.ids for question in questions],
            seeds,
            answer_tokens=self.answer_tokens,
            temperature=temperature,
            stop_tokens=self.stop_tokens,
            dtype=self.dtype,
        )

    def _rewards(self, questions: Sequence[Question], said: Sequence[Drawn]) -> list[float]:
        pairs = zip(questions, said, strict=True)
        return [
            self.reward(one.completion.text, question.reference, question.id)
            for question, one in pairs
        ]

    def _shown(self, micro: Batch) -> dict[str, Tensor]:
        """Parts that are means over answers; rewards of a group are equal where no other than the
        first is.
        """
        group, share = micro.rows_per_item, 1 / self.step_answers
        rewards_QG = micro.extras["rewards"].view(-1, group)
        found = {
            "reward": rewards_QG,
            "reward_std": rewards_QG.std(1) * group,
            "solved": rewards_QG >= SOLVED,
            "answer_tokens": micro.targets != NO_TARGET,
            "cut": micro.extras["cut"],
            "no_signal": (rewards_QG == rewards_QG[:, :1]).all(1) * group,
        }
        return {name: values.sum() * share for name, values in found.items()}

    def _say_silent(self, rewards_QG: Tensor) -> None:
        """Count steps in which no answer is better than another one to its question.

        A notice is printed at the first such step, and ever more rarely after it.
        """
        telling = (rewards_QG != rewards_QG[:, :1]).any(1).sum().to(self.ranks.device)
        self.ranks.sum(telling)
        if int(telling):
            return
        self.silent_steps += 1
        if self.silent_steps & (self.silent_steps - 1) == 0:
            self.ranks.say(
                "no signal: all answers to each question of a step got one reward (mean "
                f"{rewards_QG.mean():g}), so there is nothing to learn; {self.silent_steps} such "
                "steps so far"
            )

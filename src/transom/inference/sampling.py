"""How the next token is chosen: the options of sampling, and what each does to logits.

Every field of `SamplingArgs` is an argument of `generate()` and a flag of `transom generate` and
`transom chat`. A new option takes a field and a step in `SamplingArgs.adjust`, both in this file.
This module does not import torch, so that flags are read quickly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.base.fields import SEED, check_bounds, describe

if TYPE_CHECKING:
    from torch import Tensor

# A smaller temperature means greedy decoding: float32 could not represent the scaled logits.
MIN_TEMPERATURE = 1e-20


@dataclass(frozen=True)
class SamplingArgs:
    """How the next token is chosen; the defaults are greedy decoding.

    Options apply in the order of transformers and vLLM: penalties, temperature, `top_k`, `top_p`,
    `min_p`. Penalties correct the model, also in greedy decoding. The temperature comes before the
    filters, so that `top_p` and `min_p` measure the distribution that tokens are drawn from. Each
    filter sees what the one before it kept.

    Raises:
        RequestError: A value is out of its bounds.
    """

    temperature: float = describe(
        0.0,
        "divisor of the logits; 0 takes the most likely token, more is more varied",
        at_least=0,
        below=math.inf,
    )
    top_k: int | None = describe(
        None, "sample from the N most likely tokens only", "tokens", at_least=1
    )
    top_p: float = describe(
        1.0,
        "sample from the most likely tokens whose probabilities reach X together",
        above=0,
        at_most=1,
    )
    min_p: float = describe(
        0.0,
        "leave out tokens with less than X times the probability of the most likely one",
        at_least=0,
        at_most=1,
    )
    repetition_penalty: float = describe(
        1.0,
        "above 1, tokens of the prompt and of the answer become less likely",
        above=0,
        below=math.inf,
    )
    frequency_penalty: float = describe(
        0.0,
        "subtracted from a logit for each time its token was generated",
        at_least=-2,
        at_most=2,
    )
    presence_penalty: float = describe(
        0.0, "subtracted from a logit if its token was generated", at_least=-2, at_most=2
    )
    seed: int = describe(
        0, "seed of the random numbers; every row of a batch has its own stream", **SEED
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def reads_prompt(self) -> bool:
        """Whether logits depend on the tokens of the prompt."""
        return self.repetition_penalty != 1

    @property
    def counts_tokens(self) -> bool:
        """Whether logits depend on the tokens that were generated."""
        return bool(self.reads_prompt or self.frequency_penalty or self.presence_penalty)

    def adjust(
        self, logits_BV: Tensor, prompt_BV: Tensor | None, counts_BV: Tensor | None
    ) -> Tensor:
        """Return the logits [B, V] of the distribution that the next tokens are drawn from.

        Args:
            logits_BV: Logits of the model, of any floating dtype.
            prompt_BV: bool [B, V], True for tokens of the prompt, where `reads_prompt`.
            counts_BV: float32 [B, V], how often each token was generated, where `counts_tokens`.
        """
        if counts_BV is not None:
            logits_BV = self._penalized(logits_BV.float(), prompt_BV, counts_BV)
        if self.greedy:
            return logits_BV
        logits_BV = apply_temperature(logits_BV.float(), self.temperature)
        if self.top_k is not None:
            logits_BV = keep_top_k(logits_BV, self.top_k)
        if self.top_p < 1:
            logits_BV = keep_top_p(logits_BV, self.top_p)
        return keep_min_p(logits_BV, self.min_p) if self.min_p > 0 else logits_BV

    def _penalized(self, logits_BV: Tensor, prompt_BV: Tensor | None, counts_BV: Tensor) -> Tensor:
        generated_BV = counts_BV > 0
        if prompt_BV is not None:
            penalized_BV = apply_repetition_penalty(logits_BV, self.repetition_penalty)
            logits_BV = penalized_BV.where(prompt_BV | generated_BV, logits_BV)
        logits_BV = logits_BV - self.frequency_penalty * counts_BV
        return logits_BV - self.presence_penalty * generated_BV


def apply_repetition_penalty(logits_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive logits by `penalty` and multiply negative ones (CTRL, arXiv 1909.05858)."""
    return (logits_BV / penalty).where(logits_BV > 0, logits_BV * penalty)


def apply_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Return (logits - best) / temperature.

    The softmax does not depend on the shift, and with it no temperature can overflow.
    """
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Set all but the k highest logits of each row to -inf; ties with the k-th stay."""
    worst_B1 = logits_BV.topk(min(k, logits_BV.size(-1))).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < worst_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Set the logits of tokens outside the nucleus to -inf (Holtzman et al. 2019, 1904.09751).

    A token is outside if more likely tokens already have a probability above p together.
    """
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    dropped_BV = probs_BV.cumsum(-1) - probs_BV > p
    dropped_BV[:, 0] = False  # rounding must not drop the most likely token
    return logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -math.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Set logits to -inf whose probability is below p times the highest (arXiv 2407.01082)."""
    return logits_BV.masked_fill(
        logits_BV < logits_BV.amax(-1, keepdim=True) + math.log(p), -math.inf
    )

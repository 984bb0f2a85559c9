"""From logits to token ids: penalties, temperature, top-k, top-p, min-p, and one draw per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transom.base.errors import RequestError, require
from transom.base.fields import check_seed, describe
from transom.base.runtime import mixed_seed

# Below this a temperature is greedy: float32 could not tell, and a denormal may be flushed to zero.
MIN_TEMPERATURE = 1e-20


@dataclass(frozen=True)
class SamplingArgs:
    """How the next token is chosen; an impossible value is a `RequestError` naming the field."""

    temperature: float = describe(
        0.0, "divides the logits before sampling; 0 takes the most likely token"
    )
    top_k: int | None = describe(None, "draw from the k most likely tokens only", "tokens")
    top_p: float = describe(1.0, "draw from the fewest tokens whose probabilities reach this sum")
    min_p: float = describe(0.0, "drop tokens less likely than this share of the most likely one")
    repetition_penalty: float = describe(
        1.0, "above 1 holds back tokens of the prompt and of the answer"
    )
    frequency_penalty: float = describe(
        0.0, "taken off a logit for each time its token was generated"
    )
    presence_penalty: float = describe(0.0, "taken off a logit once its token was generated")
    seed: int = describe(
        0, "row b draws from a generator of its own, seeded with a mix of seed and b"
    )

    def __post_init__(self) -> None:
        heat, k = self.temperature, self.top_k
        require(math.isfinite(heat) and heat >= 0, "temperature", heat, "expected 0 or more")
        require(k is None or k >= 1, "top_k", k, "expected 1 or more, or nothing")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "expected more than 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "expected 0 to 1")
        repetition = self.repetition_penalty
        fits = math.isfinite(repetition) and repetition > 0
        require(fits, "repetition_penalty", repetition, "expected more than 0")
        for name in ("frequency_penalty", "presence_penalty"):
            require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "expected -2 to 2")
        check_seed(self.seed)


class Sampler:
    """Chooses the next token of each of `batch` rows; remembers what was generated where a penalty
    asks for it.

    Every row draws one uniform number per call from a generator of its own (`seeds[b]`, by default
    `mixed_seed(args.seed, b)`) on the CPU, so its text depends neither on the rows beside it nor on
    the device. A list given as `log_probs` gets those of each call's tokens, float32 [B] in nats,
    in the distribution that they were drawn from; with temperature 0 in the model's own.
    """

    def __init__(
        self,
        args: SamplingArgs,
        batch: int,
        vocab: int,
        seeds: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        log_probs: list[Tensor] | None = None,
    ) -> None:
        if seeds is None:
            seeds = [mixed_seed(args.seed, row) for row in range(batch)]
        if len(seeds) != batch:
            raise RequestError(f"{len(seeds)} seeds for {batch} rows: expected one per row")
        self.args = args
        self._log_probs = log_probs
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._prompt_BV = self._counts_BV = None
        repeats = args.repetition_penalty != 1
        if repeats:
            self._prompt_BV = torch.zeros(batch, vocab, dtype=torch.bool, device=device)
        if repeats or args.frequency_penalty or args.presence_penalty:
            self._counts_BV = torch.zeros(batch, vocab, device=device)

    def see(self, prompts: Sequence[Sequence[int]]) -> None:
        """Note the prompt of every row, which only the repetition penalty asks for."""
        if self._prompt_BV is not None:
            for row, prompt in enumerate(prompts):
                self._prompt_BV[row, torch.tensor(prompt, device=self._prompt_BV.device)] = True

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The next token id of each row, int64 [B]."""
        # The order of transformers and vLLM. Penalties come first: they correct what the model
        # said, for greedy decoding too. Temperature comes before the cuts, so that top-p and min-p
        # measure the distribution that is drawn from. Each cut sees what the one before it left:
        # top-p is a share of the k tokens of top-k.
        args = self.args
        if self._counts_BV is not None:
            logits_BV = self._penalised(logits_BV.float(), self._counts_BV)
        if args.temperature < MIN_TEMPERATURE:
            ids_B = logits_BV.argmax(-1)
        else:
            logits_BV = apply_temperature(logits_BV.float(), args.temperature)
            if args.top_k is not None:
                logits_BV = keep_top_k(logits_BV, args.top_k)
            if args.top_p < 1:
                logits_BV = keep_top_p(logits_BV, args.top_p)
            if args.min_p > 0:
                logits_BV = keep_min_p(logits_BV, args.min_p)
            ids_B = sample(logits_BV.softmax(-1), self._uniform_B().to(logits_BV.device))
        if self._log_probs is not None:
            self._log_probs.append(
                logits_BV.float().log_softmax(-1).gather(-1, ids_B[:, None])[:, 0]
            )
        if self._counts_BV is not None:
            self._counts_BV.scatter_add_(1, ids_B[:, None], self._counts_BV.new_ones(len(ids_B), 1))
        return ids_B

    def _penalised(self, logits_BV: Tensor, counts_BV: Tensor) -> Tensor:
        args = self.args
        if self._prompt_BV is not None:
            seen_BV = self._prompt_BV | (counts_BV > 0)
            logits_BV = torch.where(
                seen_BV, apply_repetition_penalty(logits_BV, args.repetition_penalty), logits_BV
            )
        return (
            logits_BV - args.frequency_penalty * counts_BV - args.presence_penalty * (counts_BV > 0)
        )

    def _uniform_B(self) -> Tensor:
        return torch.cat([torch.rand(1, generator=generator) for generator in self._generators])


def apply_repetition_penalty(logits_BV: Tensor, penalty: float) -> Tensor:
    """Positive logits divided by `penalty`, negative ones multiplied: less likely either way (CTRL,
    1909.05858).
    """
    return torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)


def apply_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """(logits - best) / temperature: the softmax does not see the shift, and no temperature can
    overflow.
    """
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for all but the k best of each row; ties with the k-th stay."""
    worst_B1 = logits_BV.topk(min(k, logits_BV.size(-1))).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < worst_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf for tokens whose betters already sum to more than p: the token that crosses p stays."""
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    dropped_BV = probs_BV.cumsum(-1) - probs_BV > p
    dropped_BV[:, 0] = False  # rounding must not drop the best
    return logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -math.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf for tokens whose probability is below p times the best one's."""
    return logits_BV.masked_fill(
        logits_BV < logits_BV.amax(-1, keepdim=True) + math.log(p), -math.inf
    )


def sample(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token of each row at which the summed probabilities pass its uniform number in [0,
    1).
    """
    # A parallel scan is not monotone to the last bit: without the fill it could step up on a token
    # of no probability. Scaling by the largest sum instead of 1 keeps every uniform number below
    # it.
    sums_BV = probs_BV.cumsum(-1).masked_fill(probs_BV == 0, 0.0)
    passed_BV = sums_BV > uniform_B[:, None] * sums_BV.amax(-1, keepdim=True)
    return passed_BV.to(torch.uint8).argmax(-1)

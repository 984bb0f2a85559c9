"""Drawing the next token of every row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transom.base.errors import require
from transom.base.runtime import mixed_seed
from transom.inference.copies import to_device
from transom.inference.sampling import SamplingArgs

DRAWS = 64  # uniform numbers per row that go to the device at a time


class Sampler:
    """Chooses the next token of each row, and counts tokens where a penalty needs it.

    Every row draws one uniform number per call from a generator of its own on the CPU. Its tokens
    depend neither on the rows beside it nor on the device.

    Args:
        args: Options of sampling.
        batch: Rows.
        vocab: Vocabulary size.
        seeds: One seed per row; `mixed_seed(args.seed, row)` by default.
        device: Device of the logits.
        log_probs: A list to which each call appends the log-probabilities of its tokens, float32
            [B] in nats, in the distribution that they were drawn from. With temperature 0 it is
            that of the model.
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
        require(len(seeds) == batch, "seeds", len(seeds), f"expected one seed per row, {batch}")
        self.args = args
        self._log_probs = log_probs
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._draws: Iterator[Tensor] = iter(())
        self._prompt_BV = self._counts_BV = None
        if args.reads_prompt:
            self._prompt_BV = torch.zeros(batch, vocab, dtype=torch.bool, device=device)
        if args.counts_tokens:
            self._counts_BV = torch.zeros(batch, vocab, device=device)

    def see(self, prompts: Sequence[Sequence[int]]) -> None:
        """Record the prompt of every row, for the repetition penalty."""
        if self._prompt_BV is not None:
            for row, prompt in enumerate(prompts):
                self._prompt_BV[row, torch.tensor(prompt, device=self._prompt_BV.device)] = True

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Return the next token id of each row, int64 [B], from the model's logits."""
        logits_BV = self.args.adjust(logits_BV, self._prompt_BV, self._counts_BV)
        if self.args.greedy:
            ids_B = logits_BV.argmax(-1)
        else:
            ids_B = sample(logits_BV.softmax(-1), self._uniform(logits_BV.device))
        if self._log_probs is not None:
            chosen_B1 = logits_BV.float().log_softmax(-1).gather(-1, ids_B[:, None])
            self._log_probs.append(chosen_B1[:, 0])
        if self._counts_BV is not None:
            ones_B1 = self._counts_BV.new_ones(len(ids_B), 1)
            self._counts_BV.scatter_add_(1, ids_B[:, None], ones_B1)
        return ids_B

    def _uniform(self, device: torch.device) -> Tensor:
        """Return the next number of every row, float32 [B]. The host draws many at a time."""
        numbers_B = next(self._draws, None)
        if numbers_B is None:
            rows = [torch.rand(DRAWS, generator=generator) for generator in self._generators]
            self._draws = iter(to_device(torch.stack(rows, 1), device))
            numbers_B = next(self._draws)
        return numbers_B


def sample(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        probs_BV: Probabilities [B, V].
        uniform_B: One number in [0, 1) per row.

    Returns:
        int64 [B], the first token whose cumulative probability exceeds the number.
    """
    # A parallel scan is not monotone to the last bit: without the fill it could step up at a token
    # of probability 0. Scaling by the largest sum keeps every number below that sum.
    sums_BV = probs_BV.cumsum(-1).masked_fill(probs_BV == 0, 0.0)
    passed_BV = sums_BV > uniform_B[:, None] * sums_BV.amax(-1, keepdim=True)
    return passed_BV.to(torch.uint8).argmax(-1)

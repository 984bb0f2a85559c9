"""Drawing the next token of every row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transom.base.copies import to_device
from transom.base.errors import expect
from transom.base.runtime import mixed_seed
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
        expect(len(seeds) == batch, "seeds", len(seeds), f"one seed per row, {batch}")
        self.args, self.vocab, self.device = args, vocab, device
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
        logits_BV = self.adjusted(logits_BV)
        if self.args.greedy:
            # The first of equal maxima, as `argmax`, which is 6 times slower in bfloat16 on a CPU.
            ids_B = logits_BV.max(-1).indices
        else:
            ids_B = sample(logits_BV.softmax(-1), self.uniform(logits_BV.device))
        self._record(logits_BV, ids_B)
        return ids_B

    def accept_or_replace(self, logits_1V: Tensor, drafted: int, probs_V: Tensor) -> int:
        """Return the next token id of the only row, given one that another model has drawn.

        The result has the distribution of a call without it (Leviathan et al. 2023, arXiv
        2211.17192, algorithm 1).

        Args:
            logits_1V: The logits of the model.
            drafted: The id that was drawn.
            probs_V: The distribution that it was drawn from, float32, on the same device.
        """
        logits_1V = self.adjusted(logits_1V)
        wanted_1V = logits_1V.softmax(-1)
        uniform_1 = self.uniform(logits_1V.device)
        if bool(uniform_1 * probs_V[drafted] < wanted_1V[0, drafted]):
            ids_1 = torch.tensor([drafted], device=logits_1V.device)
        else:
            rest_1V = (wanted_1V - probs_V).clamp(min=0)
            # All of it can be 0 by rounding, if the two distributions are equal.
            rest_1V = rest_1V if bool(rest_1V.any()) else wanted_1V
            ids_1 = sample(rest_1V, self.uniform(logits_1V.device))
        self._record(logits_1V, ids_1)
        return int(ids_1)

    def adjusted(self, logits_BV: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """Return the logits [B, V] of the distribution that the next tokens are drawn from.

        `drafted` are ids that are counted in every row as if they had been generated.
        """
        counts_BV = self._counts_BV
        if counts_BV is not None and drafted:
            counts_BV = counts_BV.clone()
            added_N = torch.tensor(list(drafted), device=counts_BV.device)
            counts_BV.index_add_(1, added_N, counts_BV.new_ones(len(counts_BV), len(drafted)))
        return self.args.adjust(logits_BV, self._prompt_BV, counts_BV)

    def _record(self, logits_BV: Tensor, ids_B: Tensor) -> None:
        """Keep the log-probabilities of chosen tokens, and count the tokens."""
        if self._log_probs is not None:
            chosen_B1 = logits_BV.float().log_softmax(-1).gather(-1, ids_B[:, None])
            self._log_probs.append(chosen_B1[:, 0])
        if self._counts_BV is not None:
            ones_B1 = self._counts_BV.new_ones(len(ids_B), 1)
            self._counts_BV.scatter_add_(1, ids_B[:, None], ones_B1)

    def uniform(self, device: torch.device) -> Tensor:
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

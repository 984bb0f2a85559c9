"""Greedy text with proposed tokens equals the text that is decoded token by token.

Logits of a call of several tokens differ by rounding from those of single tokens. Where the two
most likely tokens nearly tie, the text may therefore differ. Such places are counted, and the
comparison goes on after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from transom.chat.marking import common_prefix
from transom.inference.loop import generate
from transom.inference.sampler import Sampler
from transom.inference.speculate import Proposal
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.verify.findings import TOLERANCES, Finding
from transom.verify.sample_models import random_tokens

PROMPT, NEW = 24, 72  # tokens; rings of small models turn
MOST, WRONG = (1, 4, 32), 7  # proposals per call; one in so many is wrong


class Guesses:
    """Proposes the tokens of a known text, of which one in `WRONG` is replaced."""

    def __init__(self, text: Sequence[int], vocab: int) -> None:
        self.text = [(id + (i % WRONG == 0)) % vocab for i, id in enumerate(text)]

    def propose(self, tokens: list[int], most: int, sampler: Sampler) -> Proposal:
        """Return the guesses that follow as many tokens."""
        return Proposal(self.text[len(tokens) : len(tokens) + most])


def speculated(model: LLM, name: str) -> Iterator[Finding]:
    """Compare the greedy text after random tokens for every number of proposals.

    Models that generate no text of their own are skipped.
    """
    if model.args.context_dim is not None or "B" in model.args.pattern.upper():
        return
    prompt = random_tokens(model.args, 1, PROMPT)
    new = min(NEW, model.args.max_seq_len - PROMPT)
    text = generate(model, prompt, new)[0].tolist()
    guesses = Guesses(text, model.args.vocab_size)
    for most in MOST:
        ties, worst, known = 0, 0.0, PROMPT
        while known < len(text):
            start, rest = [text[:known]], len(text) - known
            found = generate(model, start, rest, draft=guesses, num_draft_tokens=most)[0].tolist()
            known = common_prefix(found, text) + 1
            if known <= len(text):
                ids = torch.tensor([text[: known - 1]], device=model.device)
                logits_V = model(TransformerInput(ids), inference=True).logits[0, -1].double()
                gap = logits_V[text[known - 1]] - logits_V[found[known - 1]]
                ties, worst = ties + 1, max(worst, float(gap.abs() / logits_V.abs().max()))
        case = f"{name}, {most} per call: {ties} near ties in {new} tokens"
        yield Finding("greedy text with proposals", case, worst, TOLERANCES[model.dtype])

"""`FinetuneArgs`: which weights of an existing model train, on which rows, with which objective.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Literal

from transom.base.errors import expect, require
from transom.base.fields import check_bounds, describe
from transom.config.parallel_args import ParallelArgs
from transom.data.chat.conversations import ExampleKind
from transom.lora.args import LoraArgs
from transom.quantize.args import QuantizeArgs

PREFERENCES = ("dpo", "ipo", "orpo", "kto")
# The kinds of rows that each objective learns from.
KINDS: dict[str, tuple[ExampleKind, ...]] = {
    "sft": ("chat", "completion", "text"),
    "distill": ("chat", "completion", "text"),
    **dict.fromkeys(("dpo", "ipo", "orpo"), ("pair",)),
    "kto": ("label",),
    "grpo": ("answer",),
}


def objectives_of(kind: ExampleKind) -> list[str]:
    """Return the objectives that learn from a kind of rows."""
    return [name for name, kinds in KINDS.items() if kind in kinds]


def require_kinds(kinds: Mapping[ExampleKind, str], objective: str) -> None:
    """Raise `RequestError` for an example of a kind that `objective` does not learn from.

    Args:
        kinds: The id of an example of each kind.
        objective: The objective.
    """
    for kind, id in kinds.items():
        expect(
            kind in KINDS[objective],
            "finetune.objective",
            objective,
            f"{' or '.join(objectives_of(kind))} for {id}, a row of kind {kind}",
        )


@dataclass(frozen=True)
class FinetuneArgs:
    """Settings of fine-tuning. The description of each field is also its help text."""

    method: Literal["lora", "full"] = describe(
        "lora", "lora trains an adapter and freezes the base; full trains all weights"
    )
    lora: LoraArgs = describe(LoraArgs, "settings of the adapter")
    quantize: QuantizeArgs | None = describe(
        None,
        "weights of 4 or 8 bits for the linear layers of the frozen base (QLoRA, arXiv 2305.14314)",
    )
    keep_quantized: bool | None = describe(
        None, "keep the frozen base in the codes of its files; null: not those of a GGUF file"
    )
    train_router: bool | None = describe(
        None, "train the routers of a mixture of experts; null: only with method full"
    )
    objective: Literal["sft", "dpo", "ipo", "orpo", "kto", "distill", "grpo"] = describe(
        "sft", "loss: cross-entropy, a preference loss, distance to a teacher, or negative reward"
    )
    beta: float | None = describe(
        None,
        "dpo, ipo, kto: strength of the reference; orpo: weight of the odds ratio; grpo: weight "
        "of the KL term; null: 0.1, and 0 for grpo",
        at_least=0.0,
        below=math.inf,
    )
    label_smoothing: float = describe(
        0.0, "dpo: assumed share of pairs with swapped labels", at_least=0.0, below=0.5
    )
    desirable_weight: float = describe(1.0, "kto: weight of good answers", at_least=0.0)
    undesirable_weight: float = describe(1.0, "kto: weight of bad answers", at_least=0.0)
    teacher: str | None = describe(
        None, "distill: folder, GGUF file or hub id of a model with the same tokenizer", path=True
    )
    temperature: float = describe(
        1.0,
        "distill: softmax temperature of both models; grpo: of sampling",
        above=0.0,
        below=math.inf,
    )
    alpha: float = describe(
        0.5,
        "distill: weight of the teacher in the loss; cross-entropy has the rest",
        at_least=0.0,
        at_most=1.0,
    )
    reverse: bool = describe(False, "distill: KL(student || teacher) instead (MiniLLM)")
    reward: str = describe(
        "exact", "grpo: exact, number, regex, or module:function of your own code"
    )
    group: int = describe(8, "grpo: answers sampled for each question", "answers", at_least=2)
    answer_tokens: int = describe(128, "grpo: longest sampled answer", "tokens", at_least=1)
    scale_rewards: bool = describe(
        True, "grpo: divide advantages by the standard deviation of the rewards of a group"
    )
    train_on: Literal["assistant", "all"] = describe(
        "assistant", "turns of a conversation that have loss"
    )
    template: str | None = describe(
        None, "chat template: name of a built-in one, or a file; null: that of the base", path=True
    )
    date: str | None = describe(
        None, "day for chat templates that write one, as 2026-01-31; null: the first day of the run"
    )
    packing: bool | None = describe(
        None,
        "pack several examples into a row, without attention between them; false: padded rows; "
        "null: if enough steps remain",
    )
    truncate: Literal["cut", "drop"] = describe(
        "cut", "whether examples longer than data.seq_len are cut or left out"
    )
    epochs: float | Literal["auto"] | None = describe(
        None, "passes over the examples, which set `steps`; auto: 3, more for few; null: use steps"
    )
    scores: int = describe(
        8, "held-out scores spread over the run if eval_every is 0; 0: only at the end", at_least=0
    )
    noise: float = describe(
        0.0,
        "NEFTune: uniform noise on embeddings, scaled by noise / sqrt(tokens * dim)",
        at_least=0.0,
        below=math.inf,
    )
    new_tokens: tuple[str, ...] = describe(
        (), "special tokens to add; all embeddings are then trained"
    )
    vocab_multiple: int = describe(
        1, "round the rows of the embeddings up to a multiple if tokens are added", at_least=1
    )

    @property
    def trains_router(self) -> bool:
        """Whether the routers of a mixture of experts train, and their balancing biases move."""
        return self.method == "full" if self.train_router is None else self.train_router

    @property
    def strength(self) -> float:
        """The value of `beta`, or the default of the objective."""
        if self.beta is not None:
            return self.beta
        return 0.0 if self.objective == "grpo" else 0.1

    def check_ranks(self, parallel: ParallelArgs) -> None:
        """Refuse ranks that would change the loss of the objective."""
        with_name = f"1 with finetune.objective = {self.objective}"
        fits = parallel.context == 1 or self.objective in ("sft", "distill")
        expected = f"{with_name}, which compares whole answers"
        expect(fits, "parallel.context", parallel.context, expected)
        # The last stage calls the model without its adapters, and the other ones compute with them.
        refers = self.objective in ("dpo", "ipo", "kto", "grpo") and self.strength > 0
        fits = parallel.pipeline == 1 or not refers or self.method == "full"
        expected = f"{with_name} and an adapter, whose reference is the base"
        expect(fits, "parallel.pipeline", parallel.pipeline, expected)

    def __post_init__(self) -> None:
        check_bounds(self)
        lora = self.method == "lora"
        require(lora or self.quantize is None, "quantize", "given", "valid only with method = lora")
        fits = self.quantize is None or not self.quantize.calibrated
        expected = "method rtn and no bits_budget, or a base that is quantized before"
        expect(fits, "quantize", "a method that reads text", expected)
        fits = (lora and self.quantize is None) or not self.keep_quantized
        expected = "valid only with method = lora, and without quantize"
        require(fits, "keep_quantized", self.keep_quantized, expected)
        fits = self.objective == "grpo" or self.beta != 0
        expect(fits, "beta", self.beta, "a number of more than 0, or null")
        with_beta = (*PREFERENCES, "grpo")
        fits = self.beta is None or self.objective in with_beta
        require(fits, "beta", self.beta, f"valid only with objective = {', '.join(with_beta)}")
        fits = self.label_smoothing == 0 or self.objective == "dpo"
        require(fits, "label_smoothing", self.label_smoothing, "valid only with objective = dpo")
        fits = (self.teacher is not None) == (self.objective == "distill")
        expect(fits, "teacher", self.teacher, "a model if objective = distill, else null")
        fits = self.epochs in (None, "auto") or 0 < float(self.epochs or 0) < math.inf
        expect(fits, "epochs", self.epochs, "a number of more than 0, auto or null")
        fits = all(self.new_tokens) and len(set(self.new_tokens)) == len(self.new_tokens)
        expect(fits, "new_tokens", list(self.new_tokens), "different texts, none empty")
        fits = self.vocab_multiple == 1 or bool(self.new_tokens)
        expect(fits, "vocab_multiple", self.vocab_multiple, "1 without new_tokens")
        try:
            fits = self.date is None or date.fromisoformat(self.date).isoformat() == self.date
        except (TypeError, ValueError):
            fits = False
        expect(fits, "date", self.date, "a day as 2026-01-31, or null")

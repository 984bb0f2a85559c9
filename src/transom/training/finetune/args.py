"""How a run changes a model that is there already: which weights move, what they learn from. No
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Literal

from transom.base.errors import RequestError, require
from transom.base.fields import describe
from transom.data.chat.conversations import Example, Kind
from transom.lora.args import LoraArgs
from transom.quantize.args import QuantizeArgs

PREFERENCES = ("dpo", "ipo", "orpo", "kto")
NEEDS_REFERENCE = ("dpo", "ipo", "kto")
# The kinds of rows that each objective learns from.
KINDS: dict[str, tuple[Kind, ...]] = {
    "sft": ("chat", "completion", "text"),
    "distill": ("chat", "completion", "text"),
    **dict.fromkeys(("dpo", "ipo", "orpo"), ("pair",)),
    "kto": ("label",),
    "grpo": ("answer",),
}


def objectives_of(kind: Kind) -> list[str]:
    """Return the objectives that learn from a kind of rows."""
    return [name for name, kinds in KINDS.items() if kind in kinds]


def require_kinds(examples: Iterable[Example], objective: str) -> None:
    """Refuse rows that an objective does not learn from."""
    wrong = next((one for one in examples if one.kind not in KINDS[objective]), None)
    if wrong is not None:
        raise RequestError(
            f"finetune.objective: got {objective!r}; {wrong.id} is a row of kind "
            f"{wrong.kind}; expected for it is {' or '.join(objectives_of(wrong.kind))}"
        )


def check_date(text: str | None) -> None:
    """Raise `RequestError` unless the text is a day in ISO 8601 or None."""
    try:
        fits = text is None or date.fromisoformat(text).isoformat() == text
    except (TypeError, ValueError):
        fits = False
    require(fits, "date", text, "expected a day such as 2026-01-31, or null")


@dataclass(frozen=True)
class FinetuneArgs:
    """Fine-tuning: rows are conversations, completions, texts, pairs of answers or questions with
    an answer.
    """

    method: Literal["lora", "full"] = describe(
        "lora", "train an adapter beside frozen weights, or all weights"
    )
    lora: LoraArgs = describe(LoraArgs, "what the adapter is made of")
    quantize: QuantizeArgs | None = describe(
        None,
        "4-bit numbers for the frozen linears of the base (QLoRA, arXiv 2305.14314); method lora "
        "only",
    )
    train_router: bool | None = describe(
        None,
        "mixtures of experts: train the routers too, whole; null: with method full, but not "
        "beside an adapter",
    )
    objective: Literal["sft", "dpo", "ipo", "orpo", "kto", "distill", "grpo"] = describe(
        "sft",
        "what is lowered: cross-entropy, a preference loss, distance to a teacher, or minus a "
        "reward",
    )
    beta: float | None = describe(
        None,
        "dpo, ipo, kto: strength of the reference; orpo: weight of the odds; grpo: of KL; null: "
        "0.1, grpo 0",
    )
    label_smoothing: float = describe(
        0.0, "dpo: share of pairs taken to be labelled the wrong way round"
    )
    desirable_weight: float = describe(1.0, "kto: weight of good answers")
    undesirable_weight: float = describe(1.0, "kto: weight of bad answers")
    teacher: str | None = describe(
        None, "distill: folder or hub id of a model with the same tokenizer", path=True
    )
    temperature: float = describe(
        1.0, "distill: both distributions are flattened by it; grpo: that of sampling"
    )
    alpha: float = describe(
        0.5, "distill: share of the teacher in the loss; the rest is cross-entropy"
    )
    reverse: bool = describe(
        False, "distill: the student's own distribution weighs the distance (MiniLLM)"
    )
    reward: str = describe("exact", "grpo: exact, number, regex, or module:function of one's own")
    group: int = describe(8, "grpo: answers drawn for each question", "answers")
    answer_tokens: int = describe(128, "grpo: longest answer drawn", "tokens")
    scale_rewards: bool = describe(
        True, "grpo: divide advantages by the standard deviation of their group's rewards"
    )
    train_on: Literal["assistant", "all"] = describe(
        "assistant", "turns of a conversation that carry loss"
    )
    template: str | None = describe(
        None, "chat template: a built-in one by name or a file; the base's own if null", path=True
    )
    date: str | None = describe(
        None,
        "day that a chat template writes, such as 2026-01-31; null: the day on which the run "
        "begins",
    )
    packing: bool | None = describe(
        None,
        "several examples in a row, none of which sees another; false: padded rows; null: if "
        "enough steps remain",
    )
    truncate: Literal["cut", "drop"] = describe(
        "cut", "what becomes of examples longer than data.seq_len; counted"
    )
    epochs: float | Literal["auto"] | None = describe(
        None,
        "passes over the examples, which then set `steps`; auto: 3, more for a small set; null: "
        "steps as given",
    )
    scores: int = describe(
        8, "held-out scores spread over the run where eval_every is 0; 0: one at the end"
    )
    noise: float = describe(
        0.0, "NEFTune: uniform noise on embeddings, scaled by this over sqrt(tokens * dim)"
    )
    new_tokens: tuple[str, ...] = describe(
        (), "special tokens to add; their embeddings are trained whole"
    )
    vocab_multiple: int = describe(
        1, "round the embeddings' rows up to a multiple of this when tokens are added"
    )

    @property
    def trains_router(self) -> bool:
        """Whether the routers of a mixture of experts train, and the biases that balance them
        move.
        """
        return self.method == "full" if self.train_router is None else self.train_router

    @property
    def strength(self) -> float:
        """`beta`, or what is usual for the objective."""
        return self.beta if self.beta is not None else 0.0 if self.objective == "grpo" else 0.1

    def __post_init__(self) -> None:
        check_date(self.date)
        lora = self.method == "lora"
        require(
            lora or self.quantize is None, "quantize", "given", "valid only with method = lora only"
        )
        require(
            0 < self.temperature < math.inf,
            "temperature",
            self.temperature,
            "expected a number above 0",
        )
        lowest = self.strength >= 0 if self.objective == "grpo" else self.strength > 0
        require(
            lowest and self.strength < math.inf,
            "beta",
            self.beta,
            "expected a number above 0, or null",
        )
        weighed = self.beta is None or self.objective in (*PREFERENCES, "grpo")
        require(
            weighed,
            "beta",
            self.beta,
            f"valid only with objective = {', '.join((*PREFERENCES, 'grpo'))}",
        )
        rounded = self.vocab_multiple == 1 or bool(self.new_tokens)
        require(rounded, "vocab_multiple", self.vocab_multiple, "expected 1 without new_tokens")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "expected a number from 0 to 1")
        smoothing, dpo = self.label_smoothing, self.objective == "dpo"
        expected = "expected 0 or more and below 0.5, with objective = dpo"
        require(
            smoothing == 0 or (dpo and 0 <= smoothing < 0.5), "label_smoothing", smoothing, expected
        )
        for name in ("desirable_weight", "undesirable_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "expected 0 or more")
        for name in ("group", "answer_tokens", "vocab_multiple"):
            value = getattr(self, name)
            require(value >= 1, name, value, "expected 1 or more")
        require(
            self.objective != "grpo" or self.group > 1, "group", self.group, "expected 2 or more"
        )
        require(self.scores >= 0, "scores", self.scores, "expected 0 or more")
        require(0 <= self.noise < math.inf, "noise", self.noise, "expected 0 or more")
        require(
            self.epochs is None or self.epochs == "auto" or 0 < self.epochs < math.inf,
            "epochs",
            self.epochs,
            "expected a number above 0, auto or null",
        )
        needed = (self.teacher is not None) == (self.objective == "distill")
        require(
            needed,
            "teacher",
            self.teacher,
            "valid only together with objective = distill, and only then",
        )
        expected = "expected a list of new words, none of them twice"
        whole = all(self.new_tokens) and len(set(self.new_tokens)) == len(self.new_tokens)
        require(whole, "new_tokens", list(self.new_tokens), expected)

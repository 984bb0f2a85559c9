"""Knowledge distillation: a student learns what a larger model with the same tokenizer would say
next.

Shape letters: T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.data.batch import NO_TARGET, Batch
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerOutput
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.training.losses.cross_entropy import chunk_tokens, cross_entropy_sum
from transom.training.losses.log_probs import by_chunks
from transom.training.losses.objectives import NextToken, Objective


class Divergence(NamedTuple):
    """Sums in nats over the positions with a target: KL divergence of softened distributions, -log
    p(target).
    """

    kl: Tensor
    nll: Tensor

    def loss(self, temperature: float, alpha: float) -> Tensor:
        """alpha temperature^2 kl + (1 - alpha) nll: the square makes gradients as large as at
        temperature 1.
        """
        return alpha * temperature**2 * self.kl + (1 - alpha) * self.nll


def divergence(
    student_TV: Tensor,
    teacher_TV: Tensor,
    targets_T: Tensor,
    temperature: float = 1.0,
    *,
    reverse: bool = False,
    weights_T: Tensor | None = None,
) -> Divergence:
    """KL(teacher || student) of softmax(logits / temperature), or with `reverse` KL(student ||
    teacher); and nll.

    In float32 or better. Of vocabularies that are rounded up differently, the tokens of both are
    compared.
    """
    common = min(student_TV.size(-1), teacher_TV.size(-1))
    student, teacher = (
        (
            logits[..., :common].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        ).log_softmax(-1)
        for logits in (student_TV, teacher_TV)
    )
    one, other = (student, teacher) if reverse else (teacher, student)
    kl_T = (one.exp() * (one - other)).sum(-1).masked_fill(targets_T == NO_TARGET, 0.0)
    kl = kl_T.sum() if weights_T is None else (kl_T * weights_T).sum()
    return Divergence(kl, cross_entropy_sum(student_TV, targets_T, weights_T))


def distillation_loss(
    student_TV: Tensor,
    teacher_TV: Tensor,
    targets_T: Tensor,
    temperature: float,
    alpha: float,
    *,
    reverse: bool = False,
    weights_T: Tensor | None = None,
) -> Tensor:
    """`Divergence.loss` of logits, summed over targets (Hinton et al. 2015, arXiv 1503.02531,
    section 2).

    `reverse`: the student rather avoids what the teacher would not say than covers all it might (Gu
    et al. 2023, MiniLLM, arXiv 2306.08543).
    """
    found = divergence(
        student_TV, teacher_TV, targets_T, temperature, reverse=reverse, weights_T=weights_T
    )
    return found.loss(temperature, alpha)


def check_same_tokenizer(student: Tokenizer, teacher: Tokenizer) -> None:
    """Refuse tokenizers in which an id stands for different tokens: logits could not be
    compared.
    """
    if student.hash == teacher.hash:
        return
    expected = f"expected a teacher with the student's tokenizer, of {student.vocab_size:,} tokens"
    require(
        student.vocab_size == teacher.vocab_size, "teacher's tokens", teacher.vocab_size, expected
    )
    for id in range(student.vocab_size):
        ours, theirs = student.id_to_token(id), teacher.id_to_token(id)
        require(
            ours == theirs, f"teacher's token {id}", theirs, f"expected the student's, {ours!r}"
        )
    notice("teacher: its tokenizer has the student's tokens, but other rules to cut text into them")


@dataclass
class Distillation(Objective):
    """A frozen `teacher` tells the student the whole distribution of each next token, not one
    sample of it.

    Its hidden states are made once per micro-batch; logits of both are made for `chunk` positions
    at a time, those with a target only, and again in backward.
    """

    model: LLM
    teacher: LLM
    temperature: float = 2.0
    alpha: float = 0.5
    reverse: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "expected a number above 0")
        require(
            0 <= self.alpha <= 1,
            "alpha",
            self.alpha,
            "expected 0 (targets alone) to 1 (teacher alone)",
        )
        for name, model in (("model", self.model), ("teacher", self.teacher)):
            require(
                model.args.head is None,
                f"{name}.head",
                model.args.head,
                "expected a language model",
            )
        if self.teacher is self.model:
            raise RequestError("teacher: is the student itself; expected another model")
        ours, theirs = self.model.args.vocab_size, self.teacher.args.vocab_size
        if ours != theirs:
            both = f"the first {min(ours, theirs):,} are compared"
            notice(f"teacher: has logits of {theirs:,} tokens, the student of {ours:,}; {both}")
        self.teacher.requires_grad_(False).eval()

    def loss(self, output: TransformerOutput, micro: Any, units: Tensor) -> dict[str, Tensor]:
        """The weighted sum over targets, divided, with both of its parts: KL at the temperature,
        and nll.
        """
        with torch.no_grad():
            teacher_BTD = self.teacher(replace(micro.inputs(), logits="none")).hidden_BTD
        found = self.compare(output.hidden_BTD, teacher_BTD, micro.targets, micro.weights)
        shown = {"kl": found.kl.detach() / units, "nll": found.nll.detach() / units}
        return {"loss": found.loss(self.temperature, self.alpha) / units, **shown}

    def evaluate(self, items: Sequence[Batch]) -> Score:
        """Return the cross-entropy of held-out batches, as `NextToken` does without a teacher."""
        return NextToken(self.model, self.chunk).evaluate(items)

    def compare(
        self,
        student_BTD: Tensor,
        teacher_BTD: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor | None = None,
    ) -> Divergence:
        """`divergence` from normed hidden states of both, without ever holding the logits of all
        tokens.
        """

        def part(
            student_TD: Tensor, teacher_TD: Tensor, targets_T: Tensor, *weights_T: Tensor
        ) -> Tensor:
            with torch.no_grad():
                teacher_TV = self.teacher.project(teacher_TD)
            student_TV, weights = (
                self.model.project(student_TD),
                weights_T[0] if weights_T else None,
            )
            how: dict[str, Any] = {"reverse": self.reverse, "weights_T": weights}
            return torch.stack(
                divergence(student_TV, teacher_TV, targets_T, self.temperature, **how)
            )

        kept_BT = targets_BT != NO_TARGET
        weights = [] if weights_BT is None else [weights_BT[kept_BT]]
        columns = [student_BTD[kept_BT], teacher_BTD[kept_BT], targets_BT[kept_BT], *weights]
        both = self.model.args.vocab_size + self.teacher.args.vocab_size
        tokens = chunk_tokens(int(kept_BT.sum()), both) if self.chunk is None else self.chunk
        return Divergence(*torch.stack(by_chunks(part, tokens, *columns)).sum(0))

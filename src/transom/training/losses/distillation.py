"""Knowledge distillation: a student learns the distributions of a larger model's next tokens.

The loss is that of Hinton et al. 2015 (arXiv 1503.02531, section 2). The teacher has the same
tokenizer. Shape letters: B rows, T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from transom.base.errors import RequestError, expect
from transom.data.batch import NO_TARGET, Batch
from transom.distributed.ranks import ALONE, Ranks
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerOutput
from transom.models.llm import LLM
from transom.training.finetune.args import FinetuneArgs
from transom.training.losses.cross_entropy import cross_entropy_sum
from transom.training.losses.log_probs import by_chunks, chunk_tokens
from transom.training.losses.objectives import NextToken, Objective


class Divergence(NamedTuple):
    """Sums over the positions with a target, in nats.

    Attributes:
        kl: KL divergence of the distributions at a temperature.
        nll: Negative log-likelihood of the targets.
    """

    kl: Tensor
    nll: Tensor

    def loss(self, temperature: float, alpha: float) -> Tensor:
        """Return alpha temperature^2 kl + (1 - alpha) nll.

        The square makes gradients as large as at temperature 1.
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
    """Return the divergence of two models from their logits, in float32 or better.

    If vocabularies are rounded up differently, the tokens of both are compared.

    Args:
        student_TV: Logits of the student.
        teacher_TV: Logits of the teacher.
        targets_T: Target ids, NO_TARGET where there is none.
        temperature: What logits are divided by before the softmax.
        reverse: Use KL(student || teacher) instead of KL(teacher || student). The student then
            avoids what the teacher would not generate rather than covering all that it might (Gu et
            al. 2023, MiniLLM, arXiv 2306.08543).
        weights_T: Weight of each position.
    """
    common = min(student_TV.size(-1), teacher_TV.size(-1))
    student, teacher = (
        (x[..., :common].to(torch.promote_types(x.dtype, torch.float32)) / temperature).log_softmax(
            -1
        )
        for x in (student_TV, teacher_TV)
    )
    one, other = (student, teacher) if reverse else (teacher, student)
    kl_T = (one.exp() * (one - other)).sum(-1).masked_fill(targets_T == NO_TARGET, 0.0)
    kl = kl_T.sum() if weights_T is None else (kl_T * weights_T).sum()
    return Divergence(kl, cross_entropy_sum(student_TV, targets_T, weights_T))


@dataclass
class Distillation(Objective):
    """Distillation of a frozen teacher.

    Hidden states of the teacher are computed once per micro-batch. Logits of both models are
    computed for `chunk` positions with a target at a time, and again in the backward pass.

    Args:
        model: The student.
        teacher: The teacher.
        args: `temperature` of both distributions, `alpha` and `reverse`.
        chunk: Positions whose logits are computed at a time, see `head_loss`.
        ranks: The ranks of the run.

    Raises:
        RequestError: If the teacher has a head or is the student.
    """

    model: LLM
    teacher: LLM
    args: FinetuneArgs
    chunk: int | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        head = self.teacher.args.head
        expect(head is None, "teacher.head", head, "a language model")
        if self.teacher is self.model:
            raise RequestError("teacher: is the student itself; expected another model")
        own, size = self.model.args.vocab_size, self.teacher.args.vocab_size
        if own != size:
            common = f"the first {min(own, size):,} are compared"
            self.ranks.say(
                f"teacher: has logits of {size:,} tokens, the student of {own:,}; {common}"
            )
        self.teacher.requires_grad_(False).eval()

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """Return the weighted sum over targets, with its parts `kl` and `nll`."""
        with torch.no_grad(), self.ranks.gathering(self.teacher):
            teacher_BTD = self.teacher(replace(micro.inputs(), logits="none")).hidden_BTD
        found = self.compare(output.hidden_BTD, teacher_BTD, micro.targets, micro.weights)
        parts = {"kl": found.kl.detach() / units, "nll": found.nll.detach() / units}
        return {"loss": found.loss(self.args.temperature, self.args.alpha) / units, **parts}

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
        """Return the `divergence` of normed hidden states, without all logits at once."""

        def part(
            student_TD: Tensor, teacher_TD: Tensor, targets_T: Tensor, *weights_T: Tensor
        ) -> Tensor:
            with torch.no_grad():
                teacher_TV = self.teacher.project(teacher_TD)
            both = divergence(
                self.model.project(student_TD),
                teacher_TV,
                targets_T,
                self.args.temperature,
                reverse=self.args.reverse,
                weights_T=weights_T[0] if weights_T else None,
            )
            return torch.stack(both)

        kept_BT = targets_BT != NO_TARGET
        tensors = (student_BTD, teacher_BTD, targets_BT, weights_BT)
        columns = [tensor[kept_BT] for tensor in tensors if tensor is not None]
        logits = self.model.args.vocab_size + self.teacher.args.vocab_size
        tokens = chunk_tokens(len(columns[0]), logits) if self.chunk is None else self.chunk
        return Divergence(*torch.stack(by_chunks(part, tokens, *columns)).sum(0))

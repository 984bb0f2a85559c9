"""Preference losses: DPO, IPO, ORPO and KTO, on answers that were preferred over others.

Shape letters: B rows, T tokens, P pairs. A row is a prompt with one answer; its log-probability is
the sum over the tokens with a target, in nats. The reference is the model without its adapters, or
log-probabilities that were computed before training. The reward of an answer is beta times its gain
in log-probability over the reference (its log odds with orpo), and the margin of a pair is the
difference of the rewards of its answers. Every loss is a function of margins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import RequestError, expect
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.batches import padded_batch
from transom.data.chat.turns import EncodedChat
from transom.distributed.ranks import ALONE, Ranks
from transom.evaluation.score import Score
from transom.inference.embedding import BATCH_TOKENS
from transom.layers.inputs import TransformerOutput, batches_by_length
from transom.models.llm import LLM
from transom.training.finetune.args import PREFERENCES, FinetuneArgs
from transom.training.losses.log_probs import (
    adapters_off,
    check_frozen_base,
    measured_log_probs,
    target_log_probs,
)
from transom.training.losses.objectives import Objective


def dpo_loss(margin_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the DPO loss of each pair [P] from its margin.

    It is -log sigmoid(margin) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). `label_smoothing` is
    the assumed share of pairs with swapped labels (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf).
    """
    right_P, wrong_P = F.logsigmoid(margin_P), F.logsigmoid(-margin_P)
    return -(1 - label_smoothing) * right_P - label_smoothing * wrong_P


def ipo_loss(margin_P: Tensor, beta: float) -> Tensor:
    """Return the IPO loss of each pair [P] from its margin.

    It is (margin / beta - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17). The margin
    is that of means per token, as in TRL (trainer/dpo_trainer.py), or long answers dominate.
    """
    return ((margin_P - 0.5) / beta).square()


def log_odds(mean_log_probs: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of answers with these mean log-probabilities per token."""
    # At p = 1 the odds are infinite, and their gradient would be NaN.
    below = mean_log_probs.clamp(max=-torch.finfo(mean_log_probs.dtype).eps)
    near_0 = below > -0.693  # -log 2; each side has its form without cancellation
    return below - torch.where(
        near_0, torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(below))
    )


def orpo_loss(chosen_P: Tensor, margin_P: Tensor, weight: float) -> Tensor:
    """Return the ORPO loss of each pair [P].

    The loss is -chosen - weight * log sigmoid(margin), the negative log-likelihood per token of the
    chosen answer and the odds ratio of both answers (Hong et al. 2024, arXiv 2403.07691, eq. 6, 7).
    It needs no reference model. TRL's first term also counts the tokens of the prompt.
    """
    return -chosen_P - weight * F.logsigmoid(margin_P)


def kto_loss(
    margin_B: Tensor, desirable_B: Tensor, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """Return the KTO loss of each answer [B] (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7).

    It is weight (1 - sigmoid(margin)). The margin is beta (gain - kl) of a desirable answer and
    beta (kl - gain) of another one. `kl`, at least 0, estimates how far the policy has moved, from
    answers to other prompts.
    """
    loss_B = 1 - torch.sigmoid(margin_B)
    return torch.where(desirable_B, desirable_weight * loss_B, undesirable_weight * loss_B)


def row_keys(tokens_BT: Tensor, targets_BT: Tensor) -> list[str]:
    """Return a key of each row, whatever its padding.

    It is the SHA-256 in hex of the tokens and targets up to the last target.
    """
    keys = []
    for tokens_T, targets_T in zip(tokens_BT.cpu(), targets_BT.cpu(), strict=True):
        places = (targets_T != NO_TARGET).nonzero()
        stop = int(places[-1]) + 1 if len(places) else 0
        row = torch.stack((tokens_T[:stop], targets_T[:stop])).numpy().tobytes()
        keys.append(hashlib.sha256(row).hexdigest())
    return keys


def answer_log_probs(model: LLM, batch: Batch, chunk: int | None = None) -> Tensor:
    """Return the log-probability [B] of the answer in each row, without gradients."""
    return measured_log_probs(model, batch.inputs(), batch.targets, chunk).sum(1)


def precompute_reference(
    model: LLM, batches: Iterable[Batch], chunk: int | None = None
) -> dict[str, float]:
    """Return the log-probability of every row under the present model, by `row_keys`.

    It is the reference of a model that trains without adapters. Call it before the first step, also
    of a resumed run, under the autocast of training.
    """
    found: dict[str, float] = {}
    for batch in batches:
        sums_B = answer_log_probs(model, batch.to(model.device), chunk)
        found |= dict(zip(row_keys(batch.tokens, batch.targets), sums_B.tolist(), strict=True))
    return found


@dataclass
class Preference(Objective):
    """One of the preference losses, on padded rows.

    The rows of a pair are neighbours, chosen and then rejected. With kto a row is an example, and
    `extras["desirable"]` of its batch, bool [B], says whether it is desirable.

    Attributes:
        model: The model.
        args: The loss (`objective`) and its settings.
        chunk: Tokens whose logits are computed at a time, see `target_log_probs`.
        reference: The result of `precompute_reference`, for a model without adapters.
        ranks: The ranks that share the KL estimate of kto.
        kl: The KL estimate of the present step.

    Raises:
        RequestError: If `args` names another objective, or the model has no fixed reference.
    """

    model: LLM
    args: FinetuneArgs
    chunk: int | None = None
    reference: Mapping[str, float] | None = None
    ranks: Ranks = ALONE
    kl: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.kind = self.args.objective
        expected = f"one of {', '.join(PREFERENCES)}"
        expect(self.kind in PREFERENCES, "finetune.objective", self.kind, expected)
        # kto compares rows that are others in every step.
        fits = self.kind != "kto" or self.reference is None
        expect(fits, "reference", "log-probabilities", "adapters with kto")
        if self.kind != "orpo" and self.reference is None:
            check_frozen_base(self.model, f"finetune.objective: got {self.kind!r}")

    def prepare(self, batch: Batch) -> Batch:
        """Estimate the KL of kto from the whole step, so that its division does not change it."""
        if self.kind == "kto":
            self.kl = self._kl_estimate(batch, self.ranks)
        return batch

    def units(self, batch: Batch) -> Tensor:
        """Return the number of pairs, or of rows with kto."""
        return torch.tensor(len(batch.tokens) // batch.rows_per_item)

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """Return sums over pairs or rows: the loss, `margin`, `accuracy`, and parts of the loss."""
        policy_BT = target_log_probs(self.model, output.hidden_BTD, micro.targets, self.chunk)
        compared = self._compare(policy_BT, micro, self.kl)
        return {name: values.sum() / units for name, values in compared.items()}

    def evaluate(self, items: Sequence[Batch]) -> Score:
        """Return the loss of held-out pairs, or of single answers with kto.

        `accuracy` is the share with a margin above 0. The `margin` of a pair is how much more the
        log-probability of the chosen answer has grown than that of the other, relative to the
        reference, times beta; with orpo the log of their odds ratio; with kto how far an answer is
        on its right side of the KL estimate, which is that of its batch.
        """
        sums, count = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}, 0
        for batch in (batch.to(self.model.device) for batch in items):
            kl = self._kl_estimate(batch) if self.kind == "kto" else 0.0
            policy_BT = measured_log_probs(self.model, batch.inputs(), batch.targets, self.chunk)
            compared = self._compare(policy_BT, batch, kl)
            count += len(compared["loss"])
            sums = {name: sums[name] + sum(compared[name].tolist()) for name in sums}
        return Score(sums.pop("loss"), count, unit="examples", sums=sums)

    def _compare(self, policy_BT: Tensor, batch: Batch, kl: float) -> dict[str, Tensor]:
        """Return the loss and its parts for each pair or row."""
        self._check(batch)
        args, beta = self.args, self.args.strength
        per_token = self.kind in ("ipo", "orpo")
        tokens_B = (batch.targets != NO_TARGET).sum(1).clamp(min=1) if per_token else 1
        policy_B = policy_BT.sum(1) / tokens_B
        if self.kind == "orpo":
            reward_B = log_odds(policy_B)
        else:
            reward_B = beta * (policy_B - self._reference(batch).to(policy_B) / tokens_B)
        if self.kind == "kto":
            desirable_B = batch.extras["desirable"]
            margin = torch.where(desirable_B, reward_B - beta * kl, beta * kl - reward_B)
            loss = kto_loss(margin, desirable_B, args.desirable_weight, args.undesirable_weight)
            parts = {"kl": torch.full_like(margin, kl)}
        else:
            chosen_P, rejected_P = reward_B[::2], reward_B[1::2]
            margin = chosen_P - rejected_P
            parts = {"reward_chosen": chosen_P, "reward_rejected": rejected_P}
        if self.kind == "dpo":
            loss = dpo_loss(margin, args.label_smoothing)
        elif self.kind == "ipo":
            loss = ipo_loss(margin, beta)
        elif self.kind == "orpo":
            loss = orpo_loss(policy_B[::2], margin, beta)
            parts = {"nll_chosen": -policy_B[::2]}
        parts |= {"margin": margin, "accuracy": (margin > 0).to(margin.dtype)}
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _check(self, batch: Batch) -> None:
        """Refuse rows that this loss cannot compare."""
        if self.kind == "kto":
            labelled = "desirable" in batch.extras
            expect(labelled, "label", None, "true or false for each answer with kto")
        else:
            rows = batch.rows_per_item
            expect(rows == 2, "answers per example", rows, "a chosen and a rejected answer")
        expected = "0 or 1: the probability of an answer has no weights"
        expect(batch.weights is None, "weight", "a fraction", expected)

    def _reference(self, batch: Batch) -> Tensor:
        """Return the log-probability [B] of each row under the reference."""
        if self.reference is None:
            with adapters_off(self.model):
                return answer_log_probs(self.model, batch, self.chunk)
        keys = row_keys(batch.tokens, batch.targets)
        missing = sum(key not in self.reference for key in keys)
        if missing:
            what = f"{missing} of {len(keys)} rows have none"
            raise RequestError(f"reference: {what}; expected one for every row")
        return torch.tensor([self.reference[key] for key in keys])

    def _kl_estimate(self, batch: Batch, ranks: Ranks = ALONE) -> float:
        """Return the mean gain of all answers of `ranks` after other prompts, at least 0.

        It does not depend on their number: each prompt gets the answer of the row before it in the
        batch of all ranks.
        """
        rows = [parted(*row) for row in zip(batch.tokens.cpu(), batch.targets.cpu(), strict=True)]
        count = len(rows) * ranks.row_ranks
        expect(count > 1, "rows", count, "2 or more with kto")
        before = ranks.each_share(rows[-1])[ranks.row_rank - 1]
        chats = mismatched(rows, before, self.model.args.max_seq_len)
        # Ranks that divide a model must call it equally often, so all use the same length.
        longest = ranks.largest(max(len(chat.ids) for chat in chats))
        gains = []
        for group in batches_by_length([longest] * len(chats), BATCH_TOKENS):
            other = padded_batch([(chats[at],) for at in group]).to(self.model.device)
            policy_B = answer_log_probs(self.model, other, self.chunk)
            gains.append(policy_B - self._reference(other))
        total = torch.cat(gains).sum()
        ranks.sum(total)
        return max(0.0, float(total) / count)


class Parted(NamedTuple):
    """A row without padding: its prompt, its answer, and which tokens of the answer are targets.

    An answer begins with the first target; all later turns belong to it.
    """

    prompt_T: Tensor
    answer_T: Tensor
    trained_T: Tensor


def parted(tokens_T: Tensor, targets_T: Tensor) -> Parted:
    """Return the parts of a row."""
    places = (targets_T != NO_TARGET).nonzero().flatten()
    first, stop = int(places[0]), int(places[-1]) + 1
    answer_T = torch.cat((tokens_T[first + 1 : stop], targets_T[stop - 1 : stop]))
    # A view would take the whole batch along to other ranks.
    return Parted(tokens_T[: first + 1].clone(), answer_T, targets_T[first:stop] != NO_TARGET)


def mismatched(rows: Sequence[Parted], before: Parted, most: int) -> list[EncodedChat]:
    """Return each prompt with the answer of the row before it, with at most `most` input tokens.

    Args:
        rows: The rows.
        before: The row before the first one.
        most: The most input tokens.
    """
    chats = []
    for row, other in zip(rows, (before, *rows), strict=False):
        ids_T = torch.cat((row.prompt_T, other.answer_T))[: most + 1]
        weights_T = torch.cat((torch.zeros(len(row.prompt_T)), other.trained_T.float()))[: most + 1]
        chats.append(EncodedChat("", ids_T.int().numpy(), weights_T.numpy()))
    return chats

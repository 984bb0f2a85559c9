"""Learning from answers that were preferred over others: DPO, IPO, ORPO and KTO.

Shape letters: B rows, T tokens, P pairs. A row is one answer behind its prompt; its log-probability
is that of the tokens with a target, in nats. The reference is the model without its adapters, or
what was computed beforehand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transom.base.errors import RequestError, require
from transom.data.batch import NO_TARGET, Batch, pad_rows
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerInput, TransformerOutput
from transom.models.llm import LLM
from transom.training.loop.ranks import ALONE, Ranks
from transom.training.losses.heads import BATCH_TOKENS
from transom.training.losses.log_probs import (
    adapters_off,
    check_frozen_base,
    measured_log_probs,
    target_log_probs,
)
from transom.training.losses.objectives import Objective

Kind = Literal["dpo", "ipo", "orpo", "kto"]


# -- losses
# ------------------------------------------------------------------------------------------


def dpo_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
) -> Tensor:
    """Loss of each pair [P] from log-probabilities of its answers.

    `sigmoid`: DPO, -log sigmoid(beta margin) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7);
    `label_smoothing` is the share of pairs taken to be the wrong way round (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf). `ipo`: (margin - 1 / (2 beta))^2 (Azar et al. 2023, arXiv
    2310.12036, eq. 17); hand over means per token, as its authors did (TRL,
    trainer/dpo_trainer.py), or long answers dominate.
    """
    margin_P = (policy_chosen_P - reference_chosen_P) - (policy_rejected_P - reference_rejected_P)
    if kind == "ipo":
        require(label_smoothing == 0, "label_smoothing", label_smoothing, "expected 0 with ipo")
        return (margin_P - 1 / (2 * beta)).square()
    right_P, wrong_P = F.logsigmoid(beta * margin_P), F.logsigmoid(-beta * margin_P)
    return -(1 - label_smoothing) * right_P - label_smoothing * wrong_P


def log_odds(mean_log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)) of answers with these mean log-probabilities per token."""
    # At p = 1, of an answer known by heart, the odds have no number, and their gradient would be
    # NaN.
    below = mean_log_probs.clamp(max=-torch.finfo(mean_log_probs.dtype).eps)
    near_0 = below > -0.693  # log 2: on each side the form that does not cancel
    return below - torch.where(
        near_0, torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(below))
    )


def orpo_loss(chosen_P: Tensor, rejected_P: Tensor, weight: float) -> Tensor:
    """Loss of each pair [P] from mean log-probabilities per token: likelihood of the chosen one,
    and odds ratio.

    -chosen - weight log sigmoid(log odds of chosen - of rejected) (Hong et al. 2024, arXiv
    2403.07691, eq. 6, 7). There is no reference. TRL's first term counts the prompt's tokens as
    well; here the answer alone is learnt.
    """
    return -chosen_P - weight * F.logsigmoid(log_odds(chosen_P) - log_odds(rejected_P))


def kto_loss(
    policy_B: Tensor,
    reference_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Loss of each answer [B], good or bad by itself (Ethayarajh et al. 2024, arXiv 2402.01306, eq.
    7).

    weight (1 - sigmoid(beta (ratio - kl))) where `desirable_B`, else weight (1 - sigmoid(beta (kl -
    ratio))), with ratio = policy - reference; `kl`, at least 0, is how far the policy has moved on
    answers to other prompts.
    """
    distance_B = policy_B - reference_B - kl
    good_B = desirable_weight * (1 - torch.sigmoid(beta * distance_B))
    bad_B = undesirable_weight * (1 - torch.sigmoid(-beta * distance_B))
    return torch.where(desirable_B, good_B, bad_B)


# -- references computed beforehand
# ------------------------------------------------------------------


def row_keys(tokens_BT: Tensor, targets_BT: Tensor) -> list[str]:
    """SHA-256 in hex of each row's tokens and targets up to its last target, however the row is
    padded.
    """
    keys = []
    for tokens_T, targets_T in zip(tokens_BT.cpu(), targets_BT.cpu(), strict=True):
        places = (targets_T != NO_TARGET).nonzero()
        stop = int(places[-1]) + 1 if len(places) else 0
        row = torch.stack((tokens_T[:stop], targets_T[:stop])).numpy().tobytes()
        keys.append(hashlib.sha256(row).hexdigest())
    return keys


def precompute_reference(
    model: LLM, batches: Iterable[Batch], chunk: int | None = None
) -> dict[str, float]:
    """Log-probability of every row under the model as it is now, by `row_keys`; for training
    without adapters.

    Call it before the first step, under the autocast that training will use; a resumed run must get
    the same.
    """
    device = model.device
    found: dict[str, float] = {}
    for batch in batches:
        here = batch.to(device)
        sums_B = measured_log_probs(model, here.inputs(), here.targets, chunk).sum(1)
        found |= dict(zip(row_keys(batch.tokens, batch.targets), sums_B.tolist(), strict=True))
    return found


# -- the objective
# -----------------------------------------------------------------------------------


@dataclass
class Preference(Objective):
    """One of four losses on rows that are padded, not packed.

    Pairs lie in neighbouring rows, chosen and then rejected; for kto a row stands alone and
    `extras["desirable"]` of its batch, bool [B], says whether it is desirable. `beta` is that of
    the loss, for orpo the weight of the odds ratio. `reference` is what `precompute_reference`
    found, for a model that trains without adapters. `ranks` share kto's estimate of the KL; every
    rank mismatches its own rows.
    """

    model: LLM
    kind: Kind = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    chunk: int | None = None
    reference: Mapping[str, float] | None = None
    ranks: Ranks = ALONE
    kl: float = field(default=0.0, init=False)  # kto's, of the step under way

    def __post_init__(self) -> None:
        require(
            self.kind in get_args(Kind),
            "kind",
            self.kind,
            f"expected one of {', '.join(get_args(Kind))}",
        )
        require(self.beta > 0, "beta", self.beta, "expected a number above 0")
        smoothing = self.label_smoothing
        require(
            0 <= smoothing < 0.5,
            "label_smoothing",
            smoothing,
            "expected 0 or more and less than 0.5",
        )
        require(
            smoothing == 0 or self.kind == "dpo",
            "label_smoothing",
            smoothing,
            f"valid only with {self.kind} is 0",
        )
        for name in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, name)
            require(weight >= 0, name, weight, "expected a number from 0")
        require(
            self.model.args.head is None,
            "model.head",
            self.model.args.head,
            "expected a language model",
        )
        if self.kind == "kto":  # whose mismatched rows are others in every step
            require(
                self.reference is None,
                "reference",
                "computed beforehand",
                "valid only with kto are adapters",
            )
        if self.kind != "orpo" and self.reference is None:
            check_frozen_base(self.model)

    def prepare(self, batch: Batch) -> Batch:
        """For kto the KL of the whole step, so that it does not depend on how the step is cut."""
        if self.kind == "kto":
            gained_B = self._gained_elsewhere([batch])
            sums = torch.stack((gained_B.sum(), torch.ones_like(gained_B).sum()))
            self.ranks.sum(sums)
            self.kl = max(0.0, float(sums[0] / sums[1]))
        return batch

    def units(self, batch: Batch) -> Tensor:
        """Pairs, or rows of kto."""
        return torch.tensor(len(batch.tokens) // batch.rows_per_item)

    def loss(self, output: TransformerOutput, micro: Batch, units: Tensor) -> dict[str, Tensor]:
        """Sums over pairs or rows, divided: the loss, margin and accuracy, and what the method is
        watched by.
        """
        policy_BT = target_log_probs(self.model, output.hidden_BTD, micro.targets, self.chunk)
        found = self._compare(policy_BT, micro, self.kl)
        return {name: values.sum() / units for name, values in found.items()}

    def evaluate(self, items: Sequence[Batch]) -> Score:
        """Return the loss of held-out pairs, or of single answers with kto.

        `accuracy` is the share with a margin above 0. The `margin` of a pair is how much more the
        log-probability of the chosen answer has grown than that of the other, relative to the
        reference, times beta; with orpo the log of their odds ratio; with kto how far an answer is
        on its right side of the KL estimate.
        """
        sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
        count = 0
        batches = [batch.to(self.model.device) for batch in items]
        kl = 0.0
        if self.kind == "kto" and batches:
            kl = max(0.0, float(self._gained_elsewhere(batches).mean()))
        for batch in batches:
            policy_BT = measured_log_probs(self.model, batch.inputs(), batch.targets, self.chunk)
            compared = self._compare(policy_BT, batch, kl)
            count += len(compared["loss"])
            for name in sums:
                sums[name] += sum(compared[name].tolist())
        return Score(sums.pop("loss"), count, unit="examples", sums=sums)

    def _compare(self, policy_BT: Tensor, batch: Batch, kl: float) -> dict[str, Tensor]:
        """The loss and what else is shown, of each pair or row."""
        self._check(batch)
        policy_B, counts_B = policy_BT.sum(1), (batch.targets != NO_TARGET).sum(1).clamp(min=1)
        if self.kind == "orpo":
            found = self._orpo(policy_B / counts_B)
        elif self.kind == "kto":
            desirable_B, reference_B = batch.extras["desirable"], self._reference(batch)
            found = self._kto(policy_B, reference_B.to(policy_B), desirable_B, kl)
        else:
            tokens_B = counts_B if self.kind == "ipo" else 1
            found = self._pairs(policy_B / tokens_B, self._reference(batch).to(policy_B) / tokens_B)
        found = {name: part if name == "loss" else part.detach() for name, part in found.items()}
        return {**found, "accuracy": (found["margin"] > 0).to(policy_B.dtype)}

    def _check(self, batch: Batch) -> None:
        """Refuse rows that this loss cannot compare."""
        if self.kind == "kto":
            require(
                "desirable" in batch.extras,
                "label",
                None,
                "valid only with kto is true or false for each answer",
            )
        pairs, expected = self.kind != "kto", "expected pairs of a chosen and a rejected answer"
        require(
            batch.rows_per_item == 2 or not pairs,
            "answers per example",
            batch.rows_per_item,
            expected,
        )
        expected = "expected turns that count or do not: an answer's probability has no weights"
        require(batch.weights is None, "weight", "a fraction", expected)

    def _pairs(self, policy_B: Tensor, reference_B: Tensor) -> dict[str, Tensor]:
        chosen_P, rejected_P = (self.beta * (policy_B - reference_B)[at::2] for at in (0, 1))
        return {
            "loss": dpo_loss(
                policy_B[::2],
                policy_B[1::2],
                reference_B[::2],
                reference_B[1::2],
                self.beta,
                self.label_smoothing,
                "ipo" if self.kind == "ipo" else "sigmoid",
            ),
            "margin": chosen_P - rejected_P,
            "reward_chosen": chosen_P,
            "reward_rejected": rejected_P,
        }

    def _orpo(self, mean_B: Tensor) -> dict[str, Tensor]:
        chosen_P, rejected_P = mean_B[::2], mean_B[1::2]
        margin_P = log_odds(chosen_P) - log_odds(rejected_P)
        return {
            "loss": orpo_loss(chosen_P, rejected_P, self.beta),
            "margin": margin_P,
            "nll_chosen": -chosen_P,
        }

    def _kto(
        self, policy_B: Tensor, reference_B: Tensor, desirable_B: Tensor, kl: float
    ) -> dict[str, Tensor]:
        weights = self.desirable_weight, self.undesirable_weight
        losses_B = kto_loss(policy_B, reference_B, desirable_B, kl, self.beta, *weights)
        distance_B = self.beta * (policy_B - reference_B - kl)
        margin_B = torch.where(desirable_B, distance_B, -distance_B)
        return {"loss": losses_B, "margin": margin_B, "kl": torch.full_like(margin_B, kl)}

    def _reference(self, batch: Batch) -> Tensor:
        """Log-probability [B] of each row under the reference."""
        if self.reference is None:
            with adapters_off(self.model):
                return measured_log_probs(
                    self.model, batch.inputs(), batch.targets, self.chunk
                ).sum(1)
        keys = row_keys(batch.tokens, batch.targets)
        missing = sum(key not in self.reference for key in keys)
        if missing:
            raise RequestError(
                f"reference: {missing} of {len(keys)} rows have none; expected one for every row"
            )
        return torch.tensor([self.reference[key] for key in keys])

    def _gained_elsewhere(self, batches: Sequence[Batch]) -> Tensor:
        """What the answers of all rows [B] have gained on the reference behind the prompts of
        others.
        """
        rows = mismatched(batches, self.model.args.max_seq_len)
        require(len(rows) > 1, "rows", len(rows), "valid only with kto are 2 or more of each rank")
        gained = []
        for inputs, targets_BT in _calls(rows, self.model.device):
            policy_BT = measured_log_probs(self.model, inputs, targets_BT, self.chunk)
            with adapters_off(self.model):
                reference_BT = measured_log_probs(self.model, inputs, targets_BT, self.chunk)
            gained.append((policy_BT - reference_BT).sum(1))
        return torch.cat(gained)


# -- kto's mismatched rows
# ---------------------------------------------------------------------------

Row = tuple[list[int], list[int]]  # tokens and targets, of one length


def mismatched(batches: Iterable[Batch], most: int) -> list[Row]:
    """The prompt of every row with the answer of the row before it, at most `most` tokens.

    The answer begins with the first target; of answers in several turns all that follows it belongs
    to it.
    """
    prompts, answers = [], []
    for tokens_T, targets_T in (
        row for b in batches for row in zip(b.tokens.cpu(), b.targets.cpu(), strict=True)
    ):
        places = (targets_T != NO_TARGET).nonzero().flatten()
        first, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        prompts.append(tokens_T[: first + 1].tolist())
        answers.append((tokens_T[first + 1 : stop].tolist(), targets_T[first:stop].tolist()))
    rows = []
    for prompt, (tokens, targets) in zip(prompts, answers[-1:] + answers[:-1], strict=True):
        whole = [NO_TARGET] * (len(prompt) - 1) + (targets or [NO_TARGET])
        rows.append(((prompt + tokens)[:most], whole[:most]))
    return rows


def _calls(rows: Sequence[Row], device: torch.device) -> Iterator[tuple[TransformerInput, Tensor]]:
    """Rows in order as padded calls of at most `BATCH_TOKENS`, with their targets [B, T]."""
    count = max(1, BATCH_TOKENS // max(len(tokens) for tokens, _ in rows))
    for at in range(0, len(rows), count):
        group = rows[at : at + count]
        tokens_BT, lengths = pad_rows([tokens for tokens, _ in group])
        targets = [torch.tensor(targets) for _, targets in group]
        targets_BT = pad_sequence(targets, batch_first=True, padding_value=NO_TARGET)
        yield (
            TransformerInput(tokens_BT.to(device), lengths=lengths.to(device)),
            targets_BT.to(device),
        )

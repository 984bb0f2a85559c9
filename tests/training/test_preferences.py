"""Preference losses are TRL's on the same logits, against the base, however a step is cut."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.rows import EncodedChats
from transom.data.chat.turns import EncodedChat
from transom.distributed.ranks import Ranks
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerInput
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.models.llm import LLM
from transom.training.finetune.args import FinetuneArgs
from transom.training.finetune.data import held_batches
from transom.training.loop.blocks import arrange_blocks
from transom.training.losses import preferences
from transom.training.losses.log_probs import adapters_off, measured_log_probs
from transom.training.losses.preferences import (
    Preference,
    answer_log_probs,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    mismatched,
    orpo_loss,
    parted,
    precompute_reference,
)

KINDS = ["dpo", "ipo", "orpo", "kto"]
PROMPTS, ENDS = (
    (3, 3, 4, 4, 5, 5, 2, 2),
    (12, 8, 11, 13, 7, 9, 10, 6),
)  # tokens of eight rows, in neighbouring pairs


def answers(kind: str = "dpo", seed: int = 1) -> Batch:
    """Eight answers of unequal length: pairs that share their prompt, or single ones with labels
    for kto.
    """
    ids = random_tokens(len(ENDS), max(ENDS) + 1, seed)
    for pair in range(0, len(ENDS), 2):
        ids[pair + 1, : PROMPTS[pair]] = ids[pair, : PROMPTS[pair]]
    places = torch.arange(max(ENDS))
    inside = (places >= torch.tensor(PROMPTS)[:, None] - 1) & (places < torch.tensor(ENDS)[:, None])
    lengths = torch.tensor(ENDS)
    tokens = ids[:, :-1].masked_fill(places >= lengths[:, None], 0)
    targets = ids[:, 1:].masked_fill(~inside, NO_TARGET)
    if kind != "kto":
        return Batch(tokens, targets, lengths=lengths, rows_per_item=2)
    labels = torch.tensor([True, False, True, True, False, False, True, False])
    return Batch(tokens, targets, lengths=lengths, extras={"desirable": labels})


def adapted(std: float = 0.3, **fields: Any) -> LLM:
    """A model with an adapter that has learnt something already."""
    model = random_model(tiny_args(**fields))
    apply_lora(model, LoraArgs(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def preference(model: LLM, kind: str, *, chunk: int | None = None, **fields: Any) -> Preference:
    reference = fields.pop("reference", None)
    return Preference(model, FinetuneArgs(objective=kind, **fields), chunk, reference)


def targeted(row: EncodedChat) -> tuple[list[int], list[int]]:
    """The input tokens of a row, and their targets."""
    targets = np.where(row.weights[1:] > 0, row.ids[1:], NO_TARGET)
    return row.ids[:-1].tolist(), targets.tolist()


def run(objective: Preference, rows: Batch, pieces: int = 1) -> dict[str, Tensor]:
    """What a trainer adds up over the micro-batches of a step."""
    units = objective.units(objective.prepare(rows)).float()
    total: dict[str, Tensor] = {}
    for micro in rows.micro_batches(pieces):
        output = objective.model(replace(micro.inputs(), logits="none"))
        for name, part in objective.loss(output, micro, units).items():
            total[name] = total.get(name, 0.0) + part
    return total


# Losses, against TRL 1.16.0, from the same logits


def logits_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of policy and reference [6, 9, 13] and labels; TRL puts chosen rows first, rejected
    ones behind.
    """
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, 9, 13, generator=generator)
    labels = torch.randint(13, (6, 9), generator=generator)
    starts, ends = torch.tensor([2, 3, 1, 2, 3, 1]), torch.tensor([9, 6, 7, 5, 9, 8])
    outside = (torch.arange(9) < starts[:, None]) | (torch.arange(9) >= ends[:, None])
    return policy * 2, reference * 2, labels.masked_fill(outside, -100)


def trl_logps(logits: Tensor, labels: Tensor, average: bool = False) -> Tensor:
    """experimental/orpo/orpo_trainer.py, get_batch_logps; selective_log_softmax written out."""
    mask = labels != -100
    per_token = (
        logits.log_softmax(-1).gather(-1, labels.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    )
    sums = (per_token * mask).sum(-1)
    return sums / mask.sum(-1) if average else sums


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing"), [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("ipo", 0.3, 0.0)]
)
def test_dpo_is_trls_on_the_same_logits(kind: Any, beta: float, smoothing: float) -> None:
    policy, reference, labels = logits_and_labels()
    average = kind == "ipo"
    chosen, rejected = trl_logps(policy, labels, average).chunk(2)
    ref_chosen, ref_rejected = trl_logps(reference, labels, average).chunk(2)
    # trainer/dpo_trainer.py, _compute_loss; the smoothing is that of TRL 0.24.0, dpo_loss
    delta_score = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "ipo":
        want = (delta_score - 1 / (2 * beta)) ** 2
    else:
        want = (
            -F.logsigmoid(beta * delta_score) * (1 - smoothing)
            - F.logsigmoid(-beta * delta_score) * smoothing
        )
    margin = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    torch.testing.assert_close(
        ipo_loss(margin, beta) if kind == "ipo" else dpo_loss(margin, smoothing), want
    )


def test_orpo_is_trls_on_the_same_logits() -> None:
    policy, _, labels = logits_and_labels()
    chosen, rejected = trl_logps(policy, labels, average=True).chunk(2)

    def log1mexp(x: Tensor) -> Tensor:
        return torch.where(
            x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x))
        )

    # experimental/orpo/orpo_trainer.py, odds_ratio_loss and get_batch_loss_metrics; nll of each
    # pair's own answer
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    nll = torch.stack([F.cross_entropy(policy[i], labels[i]) for i in range(3)])
    torch.testing.assert_close(
        orpo_loss(chosen, log_odds(chosen) - log_odds(rejected), 0.25),
        nll - 0.25 * F.logsigmoid(log_odds_ratio),
    )


@pytest.mark.parametrize("kl", [0.0, 1.7])
def test_kto_is_trls_on_the_same_logits(kl: float) -> None:
    policy, reference, labels = logits_and_labels()
    logps, ref_logps = trl_logps(policy, labels), trl_logps(reference, labels)
    desirable = torch.tensor([True, False, True, True, False, False])
    # trainer/kto_trainer.py, _compute_loss
    chosen_losses = 1 - F.sigmoid(0.1 * ((logps - ref_logps)[desirable] - kl))
    rejected_losses = 1 - F.sigmoid(0.1 * (kl - (logps - ref_logps)[~desirable]))
    want = torch.cat((1.3 * chosen_losses, 0.7 * rejected_losses)).mean()
    distance = 0.1 * (logps - ref_logps - kl)
    margin = torch.where(desirable, distance, -distance)
    torch.testing.assert_close(kto_loss(margin, desirable, 1.3, 0.7).mean(), want)


def test_odds_of_an_answer_known_by_heart_have_a_gradient() -> None:
    mean = torch.tensor([0.0, -1e-6, -0.7, -0.6, -80.0], requires_grad=True)
    odds = log_odds(mean)
    want = torch.logit(mean.detach().double().exp()[1:])
    torch.testing.assert_close(odds[1:].double(), want, rtol=1e-5, atol=1e-5)
    odds.sum().backward()
    assert odds.isfinite().all() and mean.grad is not None and mean.grad.isfinite().all()


# The objective


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_the_reference_is_the_base_without_a_second_copy(kind: Any) -> None:
    model, base, rows = adapted(), random_model(tiny_args()), answers()
    got = run(preference(model, kind, beta=0.2), rows)

    def log_probs(one: LLM) -> Tensor:
        found = (
            one(rows.inputs())
            .logits.log_softmax(-1)
            .gather(-1, rows.targets.clamp(min=0).unsqueeze(-1))
        )
        found = found.squeeze(-1).masked_fill(rows.targets == NO_TARGET, 0.0).sum(1)
        return (
            found / (rows.targets != NO_TARGET).sum(1) if kind == "ipo" else found
        )  # per token, as TRL does

    gained = log_probs(model) - log_probs(base)
    margins = gained[::2] - gained[1::2]
    want = -F.logsigmoid(0.2 * margins) if kind == "dpo" else (margins - 1 / 0.4) ** 2
    torch.testing.assert_close(got["loss"], want.mean())
    torch.testing.assert_close(got["margin"], 0.2 * margins.mean())
    torch.testing.assert_close(got["reward_chosen"], 0.2 * gained[::2].mean())
    torch.testing.assert_close(got["reward_rejected"], 0.2 * gained[1::2].mean())
    assert got["accuracy"] == (margins > 0).float().mean()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_new_adapter_starts_as_its_own_reference(kind: Any) -> None:
    model = apply_lora(random_model(tiny_args()), LoraArgs(rank=4, dropout=0.5)).train()
    got = run(preference(model, kind), answers(kind))
    assert got["margin"] == 0
    assert got["loss"].item() == pytest.approx(math.log(2) if kind == "dpo" else 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_step_is_cut_changes_nothing(kind: Any) -> None:
    results = []
    for pieces in (1, 4):
        objective = preference(adapted().double(), kind)
        parts = run(objective, answers(kind), pieces)
        parts["loss"].backward()
        grads = [p.grad for p in objective.model.parameters() if p.grad is not None]
        results.append([*(part.detach().float() for part in parts.values()), *grads])
    assert len(results[0]) > 10
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_checkpointing_keep_the_loss_in_float32(kind: Any) -> None:
    model, rows = adapted(), answers(kind)
    exact = run(preference(model, kind), rows)["loss"]
    arrange_blocks(model, checkpointing="full")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(preference(model, kind, chunk=3), rows)["loss"]
    got.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_reference_computed_beforehand_is_that_of_the_adapters() -> None:
    model, rows = adapted(), answers()
    want = run(preference(model, "dpo"), rows)
    with adapters_off(model):
        found = precompute_reference(model, rows.micro_batches(4))
    kept = json.loads(json.dumps(found))  # as a resumed run reads it
    assert kept == found and len(kept) == len(rows.tokens)
    got = run(preference(model, "dpo", reference=kept), rows)
    for name, part in want.items():
        torch.testing.assert_close(got[name], part)
    with pytest.raises(RequestError, match="reference: 8 of 8 rows have none"):
        run(preference(model, "dpo", reference=kept), answers(seed=5))


def test_the_kl_of_kto_is_of_answers_behind_other_prompts() -> None:
    model, rows = adapted(), answers("kto")
    parts = [parted(*row) for row in zip(rows.tokens, rows.targets, strict=True)]
    pairs = [targeted(row) for row in mismatched(parts, parts[-1], 256)]
    for index, (tokens, targets) in enumerate(pairs):
        before = index - 1
        prompt = rows.tokens[index, : PROMPTS[index]].tolist()
        answer = rows.targets[before, PROMPTS[before] - 1 : ENDS[before]].tolist()
        assert tokens == (prompt + answer)[:-1]
        assert targets == [NO_TARGET] * (len(prompt) - 1) + answer
    assert all(len(targeted(row)[0]) == 4 for row in mismatched(parts, parts[-1], 4)[:2])
    gained = []
    for tokens, targets in pairs:
        inputs, wanted = TransformerInput(torch.tensor([tokens])), torch.tensor([targets])
        policy = measured_log_probs(model, inputs, wanted).sum()
        with adapters_off(model):
            gained.append(policy - measured_log_probs(model, inputs, wanted).sum())
    objective = preference(model, "kto")
    objective.prepare(rows)
    assert objective.kl == pytest.approx(torch.stack(gained).mean().item(), rel=1e-4)
    objective.prepare(
        answers("kto", seed=3)
    )  # here the estimate is below 0, where no divergence is
    assert objective.kl == 0.0


def kl_of_ranks() -> tuple[float, int]:
    """The KL estimate of a rank that has half of the rows, and the calls that it takes."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    objective = replace(preference(adapted(), "kto"), ranks=ranks)
    with mock.patch.object(preferences, "answer_log_probs", wraps=answer_log_probs) as call:
        objective.prepare(list(answers("kto").micro_batches(2))[ranks.rank])
    return objective.kl, call.call_count


def test_the_kl_of_kto_is_that_of_all_ranks(tmp_path, monkeypatch) -> None:
    objective, batch = preference(adapted(), "kto"), answers("kto")
    objective.prepare(batch)
    # With this limit, the ranks would have different numbers of batches.
    monkeypatch.setattr(preferences, "BATCH_TOKENS", 28)
    (kl, calls), other = run_ranks(kl_of_ranks, 2, tmp_path)
    assert kl == pytest.approx(objective.kl, rel=1e-6) and kl > 0
    assert other == (kl, calls), "ranks that divide a model wait for each other in every call"
    halves = [objective.evaluate([half]) for half in batch.micro_batches(2)]
    assert sum(halves, Score()).loss == objective.evaluate([*batch.micro_batches(2)]).loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_score_is_the_loss_over_all_pairs(kind: Any) -> None:
    model, rows = adapted(), answers(kind)
    objective = preference(model.eval(), kind)
    score, want = objective.evaluate([rows]), run(objective, rows)
    assert score.unit == "examples" and score.count == (8 if kind == "kto" else 4)
    assert score.loss == pytest.approx(want["loss"].item(), rel=1e-5)
    assert score.mean("accuracy") == pytest.approx(float(want["accuracy"]))
    assert score.mean("margin") == pytest.approx(float(want["margin"]), rel=1e-5)
    assert not objective.evaluate([]).count


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_are_learnt(kind: Any) -> None:
    model, rows = apply_lora(random_model(tiny_args()), LoraArgs(rank=8)), answers(kind)
    rows = replace(
        rows, extras={"desirable": torch.tensor([True, False] * 4)} if kind == "kto" else {}
    )
    objective = preference(model, kind)
    before = objective.evaluate([rows])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(30):
        run(objective, rows)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = objective.evaluate([rows])
    assert after.mean("accuracy") > 0.8 and after.mean("margin") > before.mean("margin")
    assert after.loss < before.loss


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "ppo"}, "finetune.objective: got 'ppo'"),
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing: got 0\.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, r"label_smoothing: got 0\.1"),
        ({"desirable_weight": -1.0}, "desirable_weight: got -1"),
        ({"kind": "kto", "reference": {}}, "reference: got .*kto"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        preference(adapted(), **{"kind": "dpo", **fields})


def test_a_model_that_trains_as_a_whole_needs_its_reference() -> None:
    with pytest.raises(RequestError, match="no fixed reference"):
        preference(random_model(tiny_args()), "dpo")
    assert run(preference(random_model(tiny_args()), "orpo"), answers())["loss"].isfinite()


def test_rows_that_cannot_be_compared_are_refused() -> None:
    model, pairs, single = adapted(), answers(), answers("kto")
    with pytest.raises(RequestError, match="weight: got 'a fraction'"):
        run(preference(model, "dpo"), replace(pairs, weights=torch.ones(pairs.tokens.shape)))
    with pytest.raises(RequestError, match="answers per example: got 1"):
        run(preference(model, "orpo"), single)
    with pytest.raises(RequestError, match="label: got None"):
        run(preference(model, "kto"), pairs)
    with pytest.raises(RequestError, match="rows: got 1"):
        preference(model, "kto").prepare(next(single.micro_batches(8)))


@pytest.mark.parametrize("lengths", [(6000, 5000, 4500), (6000, 5500, 5000, 4500, 4000)])
def test_no_rank_scores_a_single_answer_of_several_with_kto(lengths):
    rows = EncodedChats([(EncodedChat.of([1] * length, 1.0),) for length in lengths])
    sizes = [len(batch.tokens) for batch in held_batches(rows)]
    assert min(sizes) > 1 and sum(sizes) == len(lengths)

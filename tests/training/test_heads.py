"""Heads: losses against their definitions, padding that changes nothing, and small tasks that must
be learnt.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.config.layer_args import HeadArgs
from transom.data.batch import NO_TARGET, Batch
from transom.data.labelled import EncodedText, collate
from transom.inference.embedding import run_rows
from transom.layers.inputs import TransformerInput, TransformerOutput
from transom.models.llm import LLM
from transom.training.losses.heads import contrastive_loss_sum, head_loss_sum, score_head
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(**parts: Tensor) -> TransformerOutput:
    return TransformerOutput(parts.get("logits"), torch.zeros(0), (), parts.get("pooled_BD"))


# Losses


def test_classification_is_cross_entropy_over_rows_with_a_target() -> None:
    logits, targets = draw(0, 5, 3).requires_grad_(), torch.tensor([0, 2, NO_TARGET, 1, 1])
    got = head_loss_sum(HeadArgs(num_labels=3), output(logits=logits), targets)
    kept = targets >= 0
    torch.testing.assert_close(got, F.cross_entropy(logits[kept], targets[kept], reduction="sum"))


def test_contrastive_loss_is_its_formula() -> None:
    text, positive = F.normalize(draw(1, 4, 6), dim=1), F.normalize(draw(2, 4, 6), dim=1)
    got = contrastive_loss_sum(text, positive, torch.arange(4), temperature=0.1)
    want = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        terms = torch.stack(
            [torch.exp(F.cosine_similarity(text[i], positive[j], dim=0) / 0.1) for j in range(4)]
        )
        want -= torch.log(terms[i] / terms.sum())
    torch.testing.assert_close(got, want)


def test_a_twin_of_the_positive_is_no_negative() -> None:
    text, positive = draw(3, 4, 6), draw(4, 4, 6)
    positive[2] = positive[0]
    got = contrastive_loss_sum(text, positive, torch.tensor([0, 1, 0, 3]), temperature=1.0)
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[0, 2] = keep[2, 0] = False
    want = sum(
        F.cross_entropy((text @ positive.T)[i][keep[i]], keep[i][:i].sum()) for i in range(4)
    )
    torch.testing.assert_close(got, want)


def test_contrastive_loss_of_a_part_is_its_share_of_the_whole() -> None:
    text, positive, numbers = draw(5, 6, 4), draw(6, 6, 4), torch.tensor([0, 1, 2, 0, 4, 5])
    parts = [
        contrastive_loss_sum(text[at : at + 2], positive, numbers, 0.5, at) for at in (0, 2, 4)
    ]
    torch.testing.assert_close(
        torch.stack(parts).sum(), contrastive_loss_sum(text, positive, numbers, 0.5)
    )


def test_pairs_are_taken_from_neighbouring_rows() -> None:
    pooled = draw(7, 6, 4)
    targets = torch.tensor([4, NO_TARGET, 5, NO_TARGET, 4, NO_TARGET])
    got = head_loss_sum(HeadArgs(kind="embedding"), output(pooled_BD=pooled), targets, 0.2)
    want = contrastive_loss_sum(pooled[[0, 2, 4]], pooled[[1, 3, 5]], torch.tensor([4, 5, 4]), 0.2)
    assert torch.equal(got, want)


def test_half_precision_is_compared_in_float32() -> None:
    text, positive = draw(8, 4, 32).bfloat16(), draw(9, 4, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = contrastive_loss_sum(text, positive, torch.arange(4), 0.05)
    want = contrastive_loss_sum(text.double(), positive.double(), torch.arange(4), 0.05)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(RequestError, match="temperature: got 0"):
        contrastive_loss_sum(draw(1, 2, 2), draw(2, 2, 2), torch.arange(2), 0.0)


# Vectors


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", ["none", "embedding", "classification"])
def test_a_text_in_a_batch_is_the_text_alone(
    kind: str, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = None if kind == "none" else {"kind": kind, "pooling": pooling, "num_labels": 3}
    model = random_model(tiny_args(head=head))
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
    monkeypatch.setattr("transom.inference.embedding.BATCH_TOKENS", 8)
    together = run_rows(model, rows, pooling)
    assert together.vectors.shape == (4, 32)
    assert (together.logits is None) == (kind != "classification")
    for index, row in enumerate(rows):
        hidden = model(TransformerInput(torch.tensor([row]), logits="none")).hidden_BTD[0]
        want = hidden.mean(0) if pooling == "mean" else hidden[-1]
        want = F.normalize(want, dim=0) if kind == "embedding" else want
        torch.testing.assert_close(together.vectors[index], want, rtol=1e-4, atol=1e-5)
        if together.logits is not None:
            torch.testing.assert_close(
                together.logits[index], model.output(want), rtol=1e-4, atol=1e-5
            )


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = random_model(tiny_args()).train()
    run_rows(model, [[1, 2]], "mean")
    assert model.training


def test_pooling_must_be_known_and_the_heads_own() -> None:
    with pytest.raises(RequestError, match="pooling: got None"):
        run_rows(random_model(tiny_args()), [[1]])
    model = random_model(tiny_args(head={"kind": "embedding", "pooling": "mean"}))
    with pytest.raises(RequestError, match="pooling: got 'last'; expected mean"):
        run_rows(model, [[1]], "last")
    with pytest.raises(RequestError, match="head: got None"):
        score_head(random_model(tiny_args()), [EncodedText([[1]], 0)])


# Learning


def ends_agree(count: int, seed: int) -> list[EncodedText]:
    """Rows of 4 to 9 tokens, labelled by whether the first and the last are the same."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(4, 10, (), generator=generator))
        ids = torch.randint(1, 9, (length,), generator=generator).tolist()
        label = index % 2
        ids[-1] = ids[0] if label else ids[0] % 8 + 1
        rows.append(EncodedText([ids], label))
    return rows


def shifted(count: int, seed: int) -> list[EncodedText]:
    """Pairs: a word of three tokens among noise, and the same word in the other alphabet, alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        word = torch.randint(1, 20, (3,), generator=generator).tolist()
        noise = torch.randint(
            50, 60, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator
        )
        rows.append(EncodedText([[*word, *noise.tolist()], [token + 20 for token in word]], index))
    return rows


def learn(model: LLM, batches: list[Batch], lr: float) -> list[float]:
    optimizers = build_optimizer(model, OptimizerArgs(lr=lr, weight_decay=0.0), device_type="cpu")
    losses = []
    head = model.args.head
    assert head is not None
    model.train()
    for batch in batches:
        loss = (
            head_loss_sum(head, model(batch.inputs()), batch.targets) / (batch.targets >= 0).sum()
        )
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_classifier_learns_whether_the_ends_agree() -> None:
    model = LLM(tiny_args(head={"num_labels": 2}))
    model.init_weights(0)
    losses = learn(model, [collate(ends_agree(64, seed)) for seed in range(150)], 1e-2)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the output starts at zero: even odds
    measured = score_head(model, ends_agree(200, seed=1000))
    assert measured.count == 200 and measured.mean("accuracy") > 0.95 and measured.loss < 0.2, (
        measured
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_of_pairs_find_each_other(pooling: str) -> None:
    model = LLM(tiny_args(head={"kind": "embedding", "pooling": pooling}))
    model.init_weights(0)
    held_out = shifted(100, seed=1000)
    before = score_head(model, held_out)
    losses = learn(model, [collate(shifted(32, seed)) for seed in range(100)], 1e-2)
    after = score_head(model, held_out)
    assert losses[-1] < 1.0 and before.mean("accuracy") < 0.2 and after.mean("accuracy") > 0.7, (
        losses[-1],
        before,
        after,
    )
    assert after.loss < before.loss


def test_a_score_counts_a_twin_as_found_and_does_not_depend_on_its_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(tiny_args(head={"kind": "embedding", "pooling": "mean"}))
    rows = [
        EncodedText([[1, 2], [1, 2]], 0),
        EncodedText([[1, 2], [1, 2]], 0),
        EncodedText([[5], [5]], 1),
    ]
    whole = score_head(model, rows)
    assert whole.mean("accuracy") == 1.0
    monkeypatch.setattr("transom.inference.embedding.BATCH_TOKENS", 2)
    assert score_head(model, rows).loss == pytest.approx(whole.loss, abs=1e-5)

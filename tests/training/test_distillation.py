"""Distillation is its formula, in chunks as at once, and a student comes near its teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.data.batch import NO_TARGET, Batch
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer, train_bpe, train_chars
from transom.training.finetune.args import FinetuneArgs
from transom.training.loop.blocks import arrange_blocks
from transom.training.losses.distillation import Distillation, divergence

TOKENS = random_tokens(2, 12)
TARGETS = random_tokens(2, 12, seed=1).masked_fill(random_tokens(2, 12, seed=2) < 15, NO_TARGET)
BATCH = Batch(TOKENS, TARGETS, sizes=((5, 7), (12,)))
WEIGHTS = torch.tensor([0.0, 0.5, 2.0])[random_tokens(2, 12, seed=3) % 3]


def teacher(**fields: Any) -> LLM:
    """A model of another shape, which shares nothing with the student but the vocabulary."""
    return random_model(
        tiny_args(**{"dim": 48, "n_layers": 3, "logit_softcap": 5.0, **fields}), seed=7
    )


def distillation(student: LLM, known: LLM, chunk: int | None = None, **args: Any) -> Distillation:
    return Distillation(student, known, FinetuneArgs(**{"temperature": 2.0, **args}), chunk)


def run(objective: Distillation, batch: Batch = BATCH) -> dict[str, Tensor]:
    output = objective.model(replace(batch.inputs(), logits="none"))
    return objective.loss(output, batch, objective.units(batch).to(output.hidden_BTD.dtype))


def dense(
    student: Tensor,
    taught: Tensor,
    temperature: float,
    alpha: float,
    reverse: bool,
    weights: Tensor,
) -> Tensor:
    """The formula over whole logits, position by position, with torch's own divergence."""
    total = torch.zeros((), dtype=student.dtype)
    for row, column in (TARGETS != NO_TARGET).nonzero().tolist():
        s, t = (F.log_softmax(x[row, column] / temperature, -1) for x in (student, taught))
        kl = (
            F.kl_div(t, s, reduction="sum", log_target=True)
            if reverse
            else F.kl_div(s, t, reduction="sum", log_target=True)
        )
        nll = F.cross_entropy(student[row, column], TARGETS[row, column])
        total = total + weights[row, column] * (alpha * temperature**2 * kl + (1 - alpha) * nll)
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
def test_equals_the_dense_formula_with_its_gradients(
    chunk: int | None, reverse: bool, weighted: bool
) -> None:
    student, known = random_model(tiny_args(tie_embeddings=True)).double(), teacher().double()
    batch = replace(BATCH, weights=WEIGHTS.double() if weighted else None)
    objective = distillation(student, known, chunk, temperature=2.5, alpha=0.3, reverse=reverse)
    got = run(objective, batch)["loss"]
    taught = known(batch.inputs()).logits
    weights = WEIGHTS.double() if weighted else torch.ones(2, 12, dtype=torch.float64)
    want = dense(
        student(batch.inputs()).logits, taught, 2.5, 0.3, reverse, weights
    ) / objective.units(batch)
    torch.testing.assert_close(got, want)
    parameters = list(student.parameters())
    for ours, theirs in zip(
        *(torch.autograd.grad(x, parameters) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


class LogitRows(TorchDispatchMode):
    """The most rows of any logits [rows, vocabulary] that forward and backward make."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.ndim == 2 and made.size(1) == 61:
            rows = made.size(0)
            self.most = max(
                self.most, rows if rows not in (32, 48) else 0
            )  # those are output matrices, turned
        return made


@pytest.mark.parametrize(("chunk", "rows"), [(0, int((TARGETS != NO_TARGET).sum())), (4, 4)])
def test_logits_of_a_chunk_are_all_that_is_ever_held(chunk: int, rows: int) -> None:
    objective = distillation(random_model(tiny_args()), teacher(), chunk=chunk)
    with LogitRows() as held:
        run(objective)["loss"].backward()
    assert held.most == rows


def test_the_divergence_is_trls_on_the_same_logits() -> None:
    student, taught = torch.randn(2, 2, 12, 13, generator=torch.Generator().manual_seed(0)).double()
    labels = TARGETS % 13
    labels[TARGETS == NO_TARGET] = -100
    for beta in (0, 1):
        # TRL 1.16.0, experimental/gkd/gkd_trainer.py, generalized_jsd_loss
        student_log_probs, teacher_log_probs = (
            F.log_softmax(x / 2.0, dim=-1) for x in (student, taught)
        )
        if beta == 0:
            jsd = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
        else:
            jsd = F.kl_div(teacher_log_probs, student_log_probs, reduction="none", log_target=True)
        got = divergence(
            student.flatten(0, 1), taught.flatten(0, 1), labels.flatten(), 2.0, reverse=beta == 1
        )
        torch.testing.assert_close(got.kl, jsd[labels != -100].sum())


def test_gradients_do_not_shrink_with_the_temperature() -> None:
    student = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    taught = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    norms = []
    for temperature in (10.0, 100.0):
        found = divergence(student, taught, torch.zeros(4, dtype=torch.int64), temperature)
        loss = found.loss(temperature, 1.0)
        norms.append(torch.autograd.grad(loss, student)[0].norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.1, atol=0.0)


def test_vocabularies_rounded_up_differently_are_compared_over_the_common_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    student, known = random_model(tiny_args()), teacher(vocab_size=64)
    got = run(distillation(student, known, alpha=1.0))["loss"]
    assert (
        "logits of 64 tokens, the student of 61; the first 61 are compared"
        in capsys.readouterr().err
    )
    narrow = teacher()
    narrow.load_state_dict(
        {name: x[: narrow.state_dict()[name].size(0)] for name, x in known.state_dict().items()}
    )
    torch.testing.assert_close(got, run(distillation(student, narrow, alpha=1.0))["loss"])


def test_half_precision_and_checkpointing_keep_the_loss_in_float32() -> None:
    student, known = random_model(tiny_args()), teacher()
    exact = run(distillation(student, known))["loss"].item()
    arrange_blocks(student, checkpointing="full")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(distillation(student, known, chunk=5))["loss"]
    got.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad is not None for p in student.parameters())


def test_a_student_comes_near_its_teacher_which_stands_still() -> None:
    known = teacher(logit_softcap=None)
    before = {name: weight.clone() for name, weight in known.state_dict().items()}
    student = random_model(tiny_args(), std=0.1).train()
    objective = distillation(student, known.train(), temperature=1.0, alpha=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    parts = []
    for _ in range(60):
        parts.append(run(objective))
        parts[-1]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parts[-1]["kl"] < 0.1 * parts[0]["kl"]
    assert not known.training
    assert all(p.grad is None and not p.requires_grad for p in known.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in known.state_dict().items())


def test_a_teacher_with_other_tokens_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer().check_same_tokens(byte_tokenizer(), "teacher")
    assert capsys.readouterr().err == ""
    other = train_bpe(["the cat sat on the mat"] * 9, 265)
    with pytest.raises(RequestError, match=r"teacher's vocabulary: got \d+; expected the model's"):
        byte_tokenizer().check_same_tokens(other, "teacher")
    other = train_chars(["abd"])
    with pytest.raises(RequestError, match=r"token \d+: got 'd'; expected the model's, 'c'"):
        train_chars(["abc"]).check_same_tokens(other, "teacher")


def test_a_teacher_that_cuts_texts_otherwise_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}})
    )
    byte_tokenizer().check_same_tokens(Tokenizer.load(tmp_path), "teacher")
    assert "the model's tokens, but cuts text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"temperature": 0.0}, r"temperature: got 0\.0"),
        ({"alpha": 1.5}, r"alpha: got 1\.5"),
        ({"teacher": "itself"}, "teacher: is the student itself"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], told: str) -> None:
    student = random_model(tiny_args())
    known = student if "teacher" in fields else teacher()
    with pytest.raises(RequestError, match=told):
        distillation(
            student, known, **{name: value for name, value in fields.items() if name != "teacher"}
        )

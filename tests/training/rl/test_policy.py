"""Learning from rewards: the advantages and the loss are TRL's, the gradient is the formula's, a
resumed run draws the same answers, and a tiny model learns what is rewarded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.chat.built_in import named
from transom.chat.template import ChatTemplate
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.conversations import ChatExample
from transom.layers.inputs import TransformerInput
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer
from transom.training.finetune.args import FinetuneArgs
from transom.training.losses.log_probs import adapters_off
from transom.training.rl.policy import PolicyGradient, group_advantages
from transom.training.rl.rewards import Reward, open_reward
from transom.training.rl.rollouts import Question, QuestionBatches, encode_questions

TOKENIZER = byte_tokenizer()
STOPS = tuple(range(0, 258, 9))
ROWS = [Question(f"row {n}", list(b"question" * 2)[: 2 + n], {"answer": "a"}) for n in range(6)]


def score(answer: str, reference: Any) -> float:
    """Share of letters and digits; some answers of a group are always better than others."""
    return sum(one.isalnum() for one in answer) / max(1, len(answer))


SHARE = Reward("share", score, Path(__file__))


def small_model(adapter: bool = False, **fields: Any) -> LLM:
    model = random_model(tiny_args(vocab_size=TOKENIZER.vocab_size, **fields))
    if adapter:
        apply_lora(model, LoraArgs(rank=4), quiet=True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora." in name:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.train()


def questions(**changes: Any) -> QuestionBatches:
    return QuestionBatches(
        ROWS, **{"group": 4, "answer_tokens": 12, "rows_per_step": 4, "seed": 3, **changes}
    )


def objective(model: LLM, **changes: Any) -> PolicyGradient:
    reward, stops = changes.pop("reward", SHARE), changes.pop("stop_tokens", STOPS)
    args = FinetuneArgs(objective="grpo", **{"answer_tokens": 12, **changes})
    return PolicyGradient(model, TOKENIZER, reward, stops, args)


def learn(policy: PolicyGradient, rows: Batch, pieces: int = 1) -> dict[str, float]:
    """Gradients of a step, and its parts, as the trainer adds them up."""
    units, total = policy.units(rows).float(), {}
    for micro in rows.micro_batches(pieces):
        parts = policy.loss(policy.model(replace(micro.inputs(), logits="none")), micro, units)
        parts["loss"].backward()
        for name, part in parts.items():
            total[name] = total.get(name, 0.0) + float(part.detach())
    return total


def gradients(model: LLM) -> dict[str, Tensor]:
    found = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    return found


# Against TRL 1.16.0, trainer/grpo_trainer.py


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_trls(scale: bool) -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.3, 0.1, 0.9, 0.2, 1.0, 1.0, 1.0, 1.0])
    # _generate_and_score_completions; nanstd is torch.std where nothing is NaN
    mean_grouped_rewards = torch.nanmean(rewards.view(-1, 4), dim=1).repeat_interleave(4, dim=0)
    std_rewards = rewards.view(-1, 4).std(dim=1).repeat_interleave(4, dim=0)
    advantages = rewards - mean_grouped_rewards
    if scale:
        advantages = advantages / (std_rewards + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4, scale=scale), advantages)


def test_answers_of_one_reward_have_no_advantage_at_all() -> None:
    assert group_advantages(torch.full((6,), 0.1), 3).eq(0).all()


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 0.7)])
def test_the_gradient_is_that_of_trls_loss_on_whole_logits(beta: float, temperature: float) -> None:
    policy = objective(small_model(adapter=True).double(), beta=beta, temperature=temperature)
    model, rows = policy.model, policy.prepare(questions().next())
    learn(policy, rows, pieces=2)
    ours = gradients(model)
    mask = rows.targets != NO_TARGET

    def logps() -> Tensor:
        logits = (
            model(TransformerInput(rows.tokens)).logits / temperature
        )  # padding is on the right and sees back
        index = rows.targets.clamp(min=0).unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, index).squeeze(-1)

    per_token_logps = logps()
    # _compute_loss with loss_type "dapo" and one iteration, where the old policy is the new one
    coef_1 = torch.exp(per_token_logps - per_token_logps.detach())
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    advantages = rows.extras["advantages"].unsqueeze(1)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if beta:
        with adapters_off(model), torch.no_grad():
            ref_per_token_logps = logps()
        log_ratio = ref_per_token_logps - per_token_logps
        per_token_loss = per_token_loss + beta * (torch.exp(log_ratio) - log_ratio - 1)
    ((per_token_loss * mask).sum() / mask.sum()).backward()
    theirs = gradients(model)
    assert set(ours) == set(theirs) and ours
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], rtol=1e-6, atol=1e-9)


# The objective


def test_answers_are_targets_with_their_own_end_and_nothing_else_is() -> None:
    policy = objective(small_model())
    batch = questions().next()
    rows = policy.prepare(batch)
    ended = 0
    for row, question in enumerate(batch.answers):
        length = int(rows.lengths[row])
        ids = [*rows.tokens[row, :length].tolist(), int(rows.targets[row, length - 1])]
        said = rows.targets[row][rows.targets[row] != NO_TARGET].tolist()
        assert ids == [*question.ids, *said]
        assert all(id not in STOPS for id in said[:-1])
        assert bool(rows.extras["cut"][row]) == (said[-1] not in STOPS) and (
            len(said) == 12 or said[-1] in STOPS
        )
        ended += said[-1] in STOPS
    assert 0 < ended < len(rows.extras["cut"]), "some answers are cut, others end"


def test_a_step_in_micro_batches_is_the_step_in_one_piece() -> None:
    policy = objective(small_model(adapter=True).double(), beta=0.2)
    rows = policy.prepare(questions().next())
    whole, expected = learn(policy, rows), gradients(policy.model)
    pieces, found = learn(policy, rows, pieces=4), gradients(policy.model)
    assert pieces == pytest.approx(whole, rel=1e-5, abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_parts_say_what_was_drawn() -> None:
    policy = objective(small_model())
    rows = policy.prepare(questions().next())
    parts = learn(policy, rows)
    groups = rows.extras["rewards"].view(-1, 4)
    assert parts["reward"] == pytest.approx(float(rows.extras["rewards"].mean()))
    assert parts["reward_std"] == pytest.approx(float(groups.std(1).mean()))
    assert parts["solved"] == pytest.approx(float((rows.extras["rewards"] >= 1).float().mean()))
    assert parts["answer_tokens"] == pytest.approx(
        float((rows.targets != NO_TARGET).sum(1).float().mean())
    )
    assert parts["cut"] == pytest.approx(float(rows.extras["cut"].float().mean()))
    assert parts["no_signal"] == 0
    assert parts["gap"] < 1e-5, "answers are drawn from what is trained"


def test_a_gap_between_drawing_and_learning_is_shown(capsys) -> None:
    model = small_model(adapter=True)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    policy = objective(model)
    assert "dropout 0.5: answers are sampled without it" in capsys.readouterr().err
    assert learn(policy, policy.prepare(questions().next()))["gap"] > 0.01


def test_a_step_without_a_signal_is_logged_and_said_once(capsys) -> None:
    policy = objective(
        small_model(), reward=Reward("one", lambda answer, reference: 0.3, Path(__file__))
    )
    batches = questions()
    for _ in range(3):
        parts = learn(policy, policy.prepare(batches.next()))
    said = [line for line in capsys.readouterr().err.splitlines() if "no signal" in line]
    assert len(said) == 1
    assert parts["no_signal"] == 1
    assert all(gradient.eq(0).all() for gradient in gradients(policy.model).values())


def test_held_out_questions_are_answered_greedily() -> None:
    policy = objective(small_model(), reward=SHARE)
    found = policy.evaluate(ROWS)
    assert found == policy.evaluate(ROWS) and found.loss == -found.mean("reward")
    texts = [score(one.completion.text, {}) for one in policy._answers(ROWS, range(6), 0.0)[0]]
    assert found.mean("reward") == pytest.approx(sum(texts) / 6)
    assert found.mean("accuracy") == sum(one >= 1 for one in texts) / 6
    assert policy.model.training


def test_the_reference_needs_an_adapter_on_a_frozen_base() -> None:
    with pytest.raises(RequestError, match="trains outside of the adapters"):
        objective(small_model(), beta=0.1)


# The run


def train(
    policy: PolicyGradient, batches: QuestionBatches, optimizer: torch.optim.Optimizer, steps: int
) -> list:
    history = []
    for _ in range(steps):
        rows = policy.prepare(batches.next())
        history.append((rows.tokens, learn(policy, rows)))
        optimizer.step()
        optimizer.zero_grad()
    return history


def test_a_resumed_run_draws_the_same_answers_and_ends_at_the_same_weights() -> None:
    model = small_model()
    policy, batches = objective(model, temperature=0.8), questions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(policy, batches, optimizer, 2)
    state, weights = batches.state, {name: x.clone() for name, x in model.state_dict().items()}
    moments = {
        name: dict(x) if isinstance(x, dict) else x for name, x in optimizer.state_dict().items()
    }
    moments["state"] = {
        key: {name: x.clone() for name, x in one.items()} for key, one in moments["state"].items()
    }
    straight = train(policy, batches, optimizer, 3)

    other = small_model()
    other.load_state_dict(weights)
    again = torch.optim.AdamW(other.parameters(), lr=1e-3)
    again.load_state_dict(moments)
    resumed = questions()
    resumed.load_state(state)
    torch.manual_seed(99)  # no answer depends on it
    found = train(objective(other, temperature=0.8), resumed, again, 3)
    for (tokens, parts), (expected, wanted) in zip(found, straight, strict=True):
        assert torch.equal(tokens, expected) and parts == wanted
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_ranks_share_a_step_and_its_answers() -> None:
    whole = questions()
    shares = [questions(rank=rank, world_size=2) for rank in range(2)]
    for _ in range(3):  # the epoch has 6 questions, a step 4
        batch, parts = whole.next(), [share.next() for share in shares]
        assert batch.rows == parts[0].rows + parts[1].rows
        assert batch.seeds == parts[0].seeds + parts[1].seeds
        assert len(set(batch.seeds)) == 16
    assert {row.id for row in whole.next().rows} <= {row.id for row in ROWS}


def test_the_dry_run_gets_the_longest_question_with_an_answer_of_full_length() -> None:
    policy = objective(small_model())
    first = questions().largest(2)
    length = max(len(row.ids) for row in ROWS) + 12 - 1  # the last token is a target only
    assert first.tokens.shape == (8, length)
    assert first.targets.ne(NO_TARGET).sum(1).eq(12).all() and first.row_length == length
    assert learn(policy, first)["loss"] == 0


def test_a_tiny_model_learns_what_is_rewarded() -> None:
    model = small_model(dim=16, n_layers=1)
    policy = objective(model, answer_tokens=4, stop_tokens=())
    batches = questions(answer_tokens=4, group=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = [parts["reward"] for _, parts in train(policy, batches, optimizer, 60)]
    assert sum(history[:3]) / 3 < 0.45
    assert sum(history[-3:]) / 3 > 0.9


# Questions


def test_questions_are_what_the_model_is_asked_with() -> None:
    messages = ({"role": "user", "content": "one and one?"},)
    chat = ChatExample("chat", "answer", messages, reference={"answer": "2"})
    bare = ChatExample("bare", "answer", messages, reference={"answer": "2"}, bare=True)
    template = ChatTemplate(named("plain").source(TOKENIZER), TOKENIZER)
    room: dict[str, int] = {"seq_len": 64, "answer_tokens": 20}
    written = encode_questions([chat, bare], TOKENIZER, template, **room).rows
    assert [row.ids for row in written] == [template.encode(list(messages))] * 2
    (plain,) = encode_questions([bare], TOKENIZER, None, **room).rows
    assert plain.ids == TOKENIZER.encode("one and one?", add_bos=TOKENIZER.adds_bos)
    with pytest.raises(RequestError, match="chat: chat template: got None"):
        encode_questions([chat], TOKENIZER, None, **room)


def test_questions_without_room_for_an_answer_are_left_out_and_counted() -> None:
    rows = [
        ChatExample(
            str(n),
            "answer",
            ({"role": "user", "content": "x" * n},),
            reference={"answer": "a"},
            bare=True,
        )
        for n in (5, 30, 50)
    ]
    found = encode_questions(rows, TOKENIZER, None, seq_len=52, answer_tokens=20)
    assert [row.id for row in found.rows] == ["5", "30"] and "1 too long" in str(found)
    with pytest.raises(RequestError, match=r"data\.seq_len: got 24; expected 2[56] or more"):
        encode_questions(rows, TOKENIZER, None, seq_len=24, answer_tokens=20)
    with pytest.raises(RequestError, match=r"finetune\.answer_tokens: got 52"):
        encode_questions(rows, TOKENIZER, None, seq_len=52, answer_tokens=52)
    other = [replace(rows[0], reference={"answer": "b"}), *rows[1:]]
    assert encode_questions(other, TOKENIZER, None, seq_len=52, answer_tokens=20).hash != found.hash


def test_rows_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(RequestError, match="row x: answer: got None"):
        open_reward("exact").check({}, "row x")

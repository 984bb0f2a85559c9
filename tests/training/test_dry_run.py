"""The dry run says what a step takes or that it does not fit, and leaves no trace."""

import json

import pytest
import torch

from tests.training.finetune.runs import base_folder, run_args, solved
from tests.training.runs import losses, tiny_args, tiny_config
from transom.base.errors import RequestError, WorkError
from transom.training.loop.setup import open_run
from transom.training.losses import objectives
from transom.training.losses.objectives import NextToken

MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 32, "jitter": 0.3, "balance": "bias"}
RUNS = {
    "dense": {},
    "accumulated": {"accumulate": 2},
    "moe": {"moe_args": MOE},
    "averaged": {"ema_decay": 0.9},
    "in backward": {"optimizer": {"name": "adamw", "max_grad_norm": None, "in_backward": True}},
    "8 bits": {"optimizer": {"name": "adamw", "state_bits": 8}},
    "short rows": {"short_rows": 0.5},
}


def config(tmp_path, changes, *words):
    changes = dict(changes)
    if moe := changes.pop("moe_args", None):
        changes["model"] = {**tiny_config(tmp_path)["model"], "moe_args": moe}
    return tiny_args(tmp_path, *words, **changes)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_the_run_is_the_same_with_and_without(tmp_path, changes):
    ends = []
    for dry_run in (True, False):
        words = [f"dry_run={dry_run}", f"out={tmp_path}/{dry_run}", "steps=4"]
        trainer = open_run(config(tmp_path, changes, *words), quiet=True)
        trainer.fit()
        ends.append((trainer, losses(tmp_path / str(dry_run)), torch.get_rng_state()))
    (dry, dry_losses, dry_random), (plain, plain_losses, plain_random) = ends
    assert dry_losses == plain_losses
    assert torch.equal(dry_random, plain_random)
    assert dry.batches.state == plain.batches.state
    pairs = zip(dry.model.named_parameters(), plain.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_nothing_has_moved_after_it(tmp_path):
    trainer = open_run(config(tmp_path, RUNS["moe"], "dry_run=false"), quiet=True)
    weights = {name: p.clone() for name, p in trainer.model.named_parameters()}
    state = {name: x.clone() for name, x in trainer.optimizers.state_tensors().items()}
    random, place = torch.get_rng_state(), trainer.batches.state
    trainer.dry_run()
    assert all(
        torch.equal(p, weights[name]) and p.grad is None
        for name, p in trainer.model.named_parameters()
    )
    assert all(
        torch.equal(x, state[name]) for name, x in trainer.optimizers.state_tensors().items()
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.batches.state == place
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resumed_run_goes_on_exactly(tmp_path):
    changes = {**RUNS["moe"], "ema_decay": 0.9, "eval_every": 2}
    open_run(config(tmp_path, changes, f"out={tmp_path}/straight"), quiet=True).fit()
    first = open_run(config(tmp_path, changes), quiet=True)
    while first.progress.step < 8:
        first.log(first.step(), 1.0)
        first.score_and_save()
    open_run(config(tmp_path, changes), resume=True, quiet=True).fit()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    scores = [
        [
            row["held_out"]
            for row in map(json.loads, path.read_text().splitlines())
            if "held_out" in row
        ]
        for path in (tmp_path / "run" / "metrics.jsonl", tmp_path / "straight" / "metrics.jsonl")
    ]
    assert len(scores[0]) == 6 and scores[0] == scores[1]


def test_it_says_what_it_took(tmp_path, capsys):
    open_run(tiny_args(tmp_path, "accumulate=2"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dry run")]
    assert "2 x 32 tokens" in line and "peak memory" in line and "GB" in line


def test_it_runs_the_rows_of_full_length(tmp_path, monkeypatch):
    seen = []
    real = NextToken.loss

    def loss(self, output, micro, units):
        seen.append(tuple(micro.tokens.shape))
        return real(self, output, micro, units)

    monkeypatch.setattr(NextToken, "loss", loss)
    trainer = open_run(tiny_args(tmp_path, "short_rows=1", "accumulate=2"), quiet=True)
    assert seen == [(2, 32), (2, 32)]  # the second with the gradients of the first
    trainer.step()
    assert seen[2:] == [(4, 16), (4, 16)]


OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: 1 bytes"
    ),
}


def failing(error):
    def head_loss(*args):
        raise error

    return head_loss


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_too_little_memory_is_one_sentence_and_costs_no_earlier_run(tmp_path, monkeypatch, error):
    open_run(tiny_args(tmp_path, "steps=2"), quiet=True).fit()
    monkeypatch.setattr(objectives, "head_loss", failing(error))
    with pytest.raises(RequestError) as told:
        open_run(tiny_args(tmp_path, "accumulate=2"), quiet=True, overwrite=True)
    text = str(told.value)
    assert text.startswith(
        "dry run: a micro-batch of 2 x 32 tokens does not fit into the memory of cpu"
    )
    for field in (
        "data.batch_size (now 4)",
        "accumulate (now 2)",
        "activation_checkpoint",
        "loss_chunk",
    ):
        assert field in text
    assert (tmp_path / "run" / "step_000002").is_dir()


def test_memory_that_ends_later_is_failed_work(tmp_path, monkeypatch):
    trainer = open_run(tiny_args(tmp_path), quiet=True)
    monkeypatch.setattr(objectives, "head_loss", failing(OUT_OF_MEMORY["cuda"]))
    with pytest.raises(WorkError, match="a micro-batch of 4 x 32 tokens does not fit"):
        trainer.step()


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "head_loss", failing(ValueError("something else")))
    with pytest.raises(ValueError, match="something else"):
        open_run(tiny_args(tmp_path), quiet=True)


def test_a_profile_does_not_count_it(tmp_path):
    trainer = open_run(tiny_args(tmp_path), quiet=True, profile_steps=2)
    assert sum(trainer.clock.seconds.values()) == 0.0


def test_generated_answers_are_a_part_of_their_own_in_a_profile(tmp_path):
    words = ("finetune.answer_tokens=4", "finetune.group=2", "steps=1", "finetune.scores=0")
    base, rows = base_folder(tmp_path / "model"), solved(tmp_path / "rows.jsonl")
    args = run_args(tmp_path, base, rows, *words, objective="grpo")
    trainer = open_run(args, quiet=True, profile_steps=1)
    trainer.fit()
    assert trainer.clock.seconds["prepare"] > trainer.clock.seconds["data"] > 0


def test_its_memory_is_its_own(tmp_path, monkeypatch):
    """The peak of a GPU's memory is counted anew by the dry run, and anew again by the steps after
    it.
    """
    from transom.training.loop import step

    events = []
    for name in ("reset_peak_memory", "memory_bytes"):
        monkeypatch.setattr(step, name, lambda device, name=name: events.append(name) or 0)
    open_run(tiny_args(tmp_path), quiet=True)
    assert events == ["reset_peak_memory", "memory_bytes", "reset_peak_memory"]

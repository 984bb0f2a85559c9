"""Rows per step and packing follow from the rows where a config leaves them open, and nowhere
else.
"""

import json

import pytest

from tests.training.finetune.runs import (
    base_folder,
    chats,
    judged,
    preferences,
    run_args,
    solved,
    write_rows,
)
from tests.training.test_head_runs import config as head_config
from transom.base.fields import read
from transom.training.config import DataArgs, TrainArgs
from transom.training.defaults import (
    ENOUGH_STEPS,
    FEW_STEPS,
    choose_rows,
    few_steps_warning,
    steps_of,
)
from transom.training.finetune.args import FinetuneArgs
from transom.training.loop.setup import open_run

EPOCHS = 3.0


def choose(
    count,
    length=50,
    *,
    seq_len=1024,
    batch_size=None,
    steps=1000,
    accumulate=1,
    ranks=1,
    **finetune,
):
    data = DataArgs(seq_len=seq_len, batch_size=batch_size)
    args = TrainArgs(
        base="base",
        data=data,
        steps=steps,
        accumulate=accumulate,
        finetune=FinetuneArgs(**finetune),
    )
    return choose_rows([length] * count, args, ranks)


def chosen(count, length=50, **given):
    choice = choose(count, length, **{"epochs": EPOCHS, **given})
    return choice.batch_size, choice.packing, steps_of(choice.rows, choice.batch_size, EPOCHS)


@pytest.mark.parametrize(
    ("rows", "batch", "packing"),
    [
        (20, 1, False),
        (50, 1, False),
        (100, 2, False),
        (300, 8, False),
        (1000, 16, False),
        (20_000, 16, True),
    ],
)
def test_small_sets_get_small_batches_and_large_ones_packed_rows(rows, batch, packing):
    size, packed, steps = chosen(rows)
    assert (size, packed) == (batch, packing)
    assert steps >= min(ENOUGH_STEPS, EPOCHS * rows)


@pytest.mark.parametrize("rows", [20, 100, 1000])
def test_long_rows_get_enough_steps_too(rows):
    assert chosen(rows, length=1000)[2] >= min(ENOUGH_STEPS, EPOCHS * rows)


def test_given_values_stay():
    assert chosen(100, batch_size=16)[:2] == (16, False)
    assert chosen(100, packing=True)[:2] == (1, True)
    assert chosen(20_000, packing=False)[:2] == (16, False)
    assert chosen(20_000, batch_size=4)[:2] == (4, True)
    assert choose(100, epochs=3.0, batch_size=4, packing=False).reason is None


def test_no_step_takes_more_rows_than_there_are():
    choice = choose(20, epochs=3.0, batch_size=64, packing=False)
    assert choice.batch_size == 20 and "64" in choice.reason


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 3), (2, 2)])
def test_the_batch_is_a_multiple_of_ranks_and_micro_batches(ranks, accumulate):
    for rows in (20, 100, 20_000):
        assert chosen(rows, ranks=ranks, accumulate=accumulate)[0] % (ranks * accumulate) == 0


@pytest.mark.parametrize(("rows", "epochs"), [(5, 10.0), (20, 5.0), (34, 3.0), (1000, 3.0)])
def test_a_very_small_set_gets_more_epochs_where_none_are_given(rows, epochs):
    choice = choose(rows, epochs="auto")
    assert choice.epochs == epochs and f"finetune.epochs = {epochs:g}" in choice.reason
    assert choice.steps >= min(ENOUGH_STEPS, rows * 10)
    assert choose(rows, epochs=2.0).epochs == 2.0


def test_given_steps_are_what_the_batch_is_chosen_for():
    def batch(rows, steps):
        return choose(rows, epochs=None, steps=steps).batch_size

    assert batch(100, 45) == 4  # about three passes
    assert batch(100, 1000) == 1
    assert batch(20_000, 1000) == 16


OBJECTIVES = {"dpo": (2, 16), "ipo": (2, 16), "orpo": (2, 16), "kto": (4, 16), "grpo": (2, 8)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_its_fewest_and_most_rows_and_none_of_these_is_packed(objective):
    few, many = (chosen(rows, objective=objective) for rows in (20, 20_000))
    assert (few[0], many[0]) == OBJECTIVES[objective]
    assert not few[1] and not many[1]


def test_few_steps_are_said():
    assert few_steps_warning(FEW_STEPS) is None
    assert str(FEW_STEPS - 1) in few_steps_warning(FEW_STEPS - 1)


# -- runs
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base") / "model")


def open_args(tmp_path, base, data, *words, **finetune):
    """A config that leaves the batch size open."""
    return run_args(tmp_path, base, data, "data.batch_size=null", *words, **finetune)


def test_what_was_chosen_is_printed_stored_and_taken_up_again(base, tmp_path, capsys):
    args = open_args(tmp_path, base, chats(tmp_path / "rows.jsonl"), epochs="auto")
    trainer = open_run(args)
    assert (
        trainer.args.finetune.epochs == 6.0 and trainer.args.steps >= ENOUGH_STEPS
    )  # 17 or so rows
    lines = [line for line in capsys.readouterr().err.splitlines() if "chosen: " in line]
    assert (
        len(lines) == 1
        and "data.batch_size = 1" in lines[0]
        and "finetune.packing = false" in lines[0]
    )
    trainer.fit()
    stored = read(TrainArgs, json.loads((tmp_path / "run" / "run.json").read_text())["resolved"])
    assert (stored.data.batch_size, stored.finetune.packing, stored.steps) == (
        1,
        False,
        trainer.args.steps,
    )
    for again in (args, stored):
        assert open_run(again, resume=True, quiet=True).progress.step == trainer.args.steps


def test_a_resumed_run_keeps_its_rows_whatever_would_be_chosen_now(base, tmp_path, monkeypatch):
    args = open_args(tmp_path, base, chats(tmp_path / "rows.jsonl"), "steps=4")
    first = open_run(args, quiet=True)
    first.fit()
    monkeypatch.setattr("transom.training.defaults.MOST_ROWS", 1)
    again = open_run(args, resume=True, quiet=True)
    assert again.args.data.batch_size == first.args.data.batch_size > 1


def test_a_run_of_few_steps_says_so(base, tmp_path, capsys):
    data = chats(tmp_path / "rows.jsonl")
    open_run(open_args(tmp_path, base, data, "data.batch_size=8", epochs=1.0))
    assert "optimizer steps" in capsys.readouterr().err
    open_run(open_args(tmp_path, base, data, f"out={tmp_path}/b", epochs=EPOCHS))
    assert "optimizer steps" not in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "objective"), [(preferences, "dpo"), (solved, "grpo")])
def test_other_objectives_choose_as_well(base, tmp_path, rows, objective):
    words = ("finetune.group=2", "finetune.answer_tokens=4") if objective == "grpo" else ()
    args = open_args(
        tmp_path, base, rows(tmp_path / "rows.jsonl"), *words, objective=objective, epochs=EPOCHS
    )
    assert open_run(args, quiet=True).args.data.batch_size == 2


def test_a_single_held_out_row_of_kto_is_no_score_and_no_obstacle(base, tmp_path, capsys):
    data = tmp_path / "set"
    data.mkdir()
    rows = judged(data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "valid.jsonl").write_text(rows[0])
    trainer = open_run(open_args(tmp_path, base, data, objective="kto"))
    assert not trainer.data.held_out
    assert "kto has no other one to compare it with" in capsys.readouterr().err


def test_fewer_questions_than_a_step_was_asked_for_are_all_taken(base, tmp_path):
    words = ("finetune.group=2", "finetune.answer_tokens=4", "data.batch_size=64")
    args = run_args(tmp_path, base, solved(tmp_path / "rows.jsonl"), *words, objective="grpo")
    trainer = open_run(args, quiet=True)
    assert trainer.args.data.batch_size == trainer.batches.items_per_epoch < 64


def test_packing_that_an_objective_cannot_have_is_said(base, tmp_path, capsys):
    data = preferences(tmp_path / "rows.jsonl")
    open_run(run_args(tmp_path, base, data, "data.batch_size=2", objective="dpo", packing=True))
    assert "finetune.packing: got true" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "most"), [("classification", 8), ("embedding", 32)])
def test_few_labelled_lines_are_a_smaller_step(tmp_path, kind, most):
    args = head_config(tmp_path, kind, "data.batch_size=null", "steps=2")
    trainer = open_run(args, quiet=True)
    lines = trainer.batches.items_per_epoch
    assert trainer.args.data.batch_size == min(most, lines)
    source = args.data.source_list[0].path
    with open(source, encoding="utf-8") as file:  # noqa: PTH123 - a path of the config
        first = [next(file) for _ in range(5)]
    few = write_rows(tmp_path / "few.jsonl", [json.loads(line) for line in first])
    words = (
        "data.batch_size=null",
        "steps=2",
        "data.held_out=0",
        f"data.sources=[{few}]",
        f"out={tmp_path}/few",
    )
    assert open_run(head_config(tmp_path, kind, *words), quiet=True).args.data.batch_size == 5

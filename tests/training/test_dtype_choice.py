"""`dtype: auto` takes what a step of the run is faster in, stores it, and leaves no other trace."""

import json

import pytest
import torch

from tests.training.finetune.runs import base_folder, chats, preferences, run_args, solved
from tests.training.runs import MODEL, losses, tiny_args
from tests.training.test_head_runs import config as head_config
from transom.base import runtime
from transom.config.model_args import ModelArgs
from transom.distributed.ranks import Ranks
from transom.training.loop import dtype_choice
from transom.training.loop.dtype_choice import DtypeChoice, timed_batch
from transom.training.loop.setup import open_run
from transom.training.loop.trainer import Trainer

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a step by dtype, in place of a real clock; the step itself is done. Lists what was
    timed.
    """
    timed = []
    real = dtype_choice.seconds_of_step

    def set_to(float32, bfloat16):
        def seconds(model, objective, micro, dtype):
            real(model, objective, micro, dtype)
            timed.append((dtype, {p.dtype for p in model.parameters()}))
            return float32 if dtype == FLOAT32 else bfloat16

        monkeypatch.setattr(dtype_choice, "seconds_of_step", seconds)
        return timed

    monkeypatch.setattr("transom.base.runtime.bfloat16_is_fast", lambda device_type: True)
    return set_to


def stored_dtype(run):
    return json.loads((run / "run.json").read_text())["dtype"]


FASTER = {
    "float32": (1.0, 1.4),
    "bfloat16": (1.0, 0.5),
    "too close to call": (1.0, 0.95),
    "too short to tell": (0.004, 0.001),
}


@pytest.mark.parametrize("case", FASTER)
def test_the_faster_dtype_trains_and_is_stored_and_resumed(tmp_path, clock, capsys, case):
    clock(*FASTER[case])
    args = tiny_args(tmp_path, "dtype=auto", "steps=2")
    trainer = open_run(args)
    expected = BFLOAT16 if case == "bfloat16" else FLOAT32
    assert trainer.dtype == expected
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "chosen: dtype" in line]
    assert "s in float32" in line and "s in bfloat16" in line
    trainer.fit()
    assert stored_dtype(tmp_path / "run") == str(expected).removeprefix("torch.")
    timed = clock(*reversed(FASTER[case]))
    timed.clear()
    assert open_run(args, resume=True, quiet=True).dtype == expected
    assert timed == []


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_dtype_that_is_given_is_not_timed(tmp_path, clock, name):
    timed = clock(1.0, 2.0)
    assert open_run(tiny_args(tmp_path, f"dtype={name}"), quiet=True).dtype == runtime.DTYPES[name]
    assert timed == []


def test_where_bfloat16_is_slow_nothing_is_timed(tmp_path, clock, monkeypatch):
    timed = clock(1.0, 0.1)
    monkeypatch.setattr("transom.base.runtime.bfloat16_is_fast", lambda device_type: False)
    assert open_run(tiny_args(tmp_path, "dtype=auto"), quiet=True).dtype == FLOAT32
    assert timed == []


def test_a_gpu_is_not_timed():
    class OnGpu(Ranks):
        def first(self, number):
            return number

    choice = DtypeChoice.of("auto", BFLOAT16, OnGpu(device=torch.device("cuda")))
    assert not choice.is_open and choice.dtype == BFLOAT16


def test_a_large_model_keeps_what_the_device_suggests():
    choice = DtypeChoice.of("auto", BFLOAT16, Ranks())
    choice.limit(ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000))
    assert not choice.is_open and choice.dtype == BFLOAT16


class Told(Ranks):
    """A second rank that is told 1 by rank 0 whatever it has found."""

    def first(self, number):
        return 1


def test_all_ranks_take_what_rank_0_has_found(tmp_path, clock):
    clock(1.0, 2.0)
    trainer = open_run(tiny_args(tmp_path), quiet=True)
    choice = DtypeChoice(FLOAT32, True, Told(world_size=2))
    choice.settle(trainer.model, trainer.objective, trainer.batches, 4, frozen=False)
    assert choice.dtype == BFLOAT16
    assert DtypeChoice.of(
        "auto", FLOAT32, Told(world_size=2)
    ).is_open  # on another processor than rank 0's


NF4 = {"kind": "nf4", "group": 32, "skip": ["w_out", "output"]}
FINETUNED = {
    "adapter": (chats, {"noise": 5.0}),
    "4 bits": (chats, {"quantize": NF4, "lora": {"rank": 2}}),
    "new tokens": (chats, {"new_tokens": ["<|x|>"]}),
    "all weights": (chats, {"method": "full"}),
    "dpo": (preferences, {"objective": "dpo"}),
    "grpo": (solved, {"objective": "grpo", "group": 2, "answer_tokens": 4}),
}
NEW = {
    "pretraining": {"short_rows": 0.5},
    "experts": {"model": {**MODEL, "moe_args": {"num_experts": 4, "jitter": 0.3}}},
}
RUNS = (*NEW, *FINETUNED, "classification", "embedding")


def args_of(name, folder, base, *words):
    if name in NEW:
        return tiny_args(folder, *words, **NEW[name])
    if name not in FINETUNED:
        return head_config(folder, name, *words)
    rows, finetune = FINETUNED[name]
    return run_args(folder, base, rows(folder / "rows.jsonl"), *words, **finetune)


def fitted(args) -> Trainer:
    trainer = open_run(args, quiet=True)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("name", "dtype"), [("pretraining", "float32"), *((name, "bfloat16") for name in RUNS)]
)
def test_the_run_is_the_one_with_the_dtype_given(tmp_path, base, clock, name, dtype):
    timed = clock(*((1.0, 2.0) if dtype == "float32" else (2.0, 1.0)))
    ends = []
    for word in ("auto", dtype):
        words = (f"out={tmp_path}/{word}", "steps=2", "save_every=2", f"dtype={word}")
        trainer = fitted(args_of(name, tmp_path, base, *words))
        weights = {key: weight.detach().clone() for key, weight in trainer.model.named_parameters()}
        ends.append((losses(tmp_path / word), torch.get_rng_state(), weights))
    (auto_losses, auto_random, auto_weights), (given_losses, given_random, given_weights) = ends
    assert auto_losses == given_losses
    assert torch.equal(auto_random, given_random)
    for key, weight in auto_weights.items():
        assert weight.dtype == given_weights[key].dtype and torch.equal(
            weight, given_weights[key]
        ), key
    assert [one for one, _ in timed] == [FLOAT32, BFLOAT16]


def test_frozen_weights_are_timed_in_the_dtype_they_would_have(tmp_path, base, clock):
    timed = clock(1.0, 2.0)
    open_run(run_args(tmp_path, base, chats(tmp_path / "rows.jsonl"), "dtype=auto"), quiet=True)
    assert timed == [
        (FLOAT32, {FLOAT32}),
        (BFLOAT16, {FLOAT32, BFLOAT16}),
    ]  # adapters stay in float32


def test_the_longest_rows_are_timed_but_not_more_than_it_takes(tmp_path, monkeypatch):
    batches = open_run(tiny_args(tmp_path), quiet=True).batches  # 4 rows of 32 tokens
    assert timed_batch(batches, 4).tokens.shape == (4, 32)
    monkeypatch.setattr(dtype_choice, "TIMED_TOKENS", 64)
    assert timed_batch(batches, 4).tokens.shape == (2, 32)
    monkeypatch.setattr(dtype_choice, "TIMED_TOKENS", 1)
    assert timed_batch(batches, 4).tokens.shape == (1, 32)


def test_too_little_memory_is_left_to_the_dry_run(tmp_path, monkeypatch, clock):
    clock(1.0, 2.0)

    def fails(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(dtype_choice, "seconds_of_step", fails)
    assert open_run(tiny_args(tmp_path, "dtype=auto"), quiet=True).dtype == FLOAT32


@pytest.mark.parametrize(
    ("passes", "expected"),
    [((0.4, 0.3, 0.1, 0.2), 0.1), ((9.0, 7.0), 7.0), ((0.5, 0.6, 1.0), 0.6)],
    ids=["short: the fastest of three", "long: the second", "until two seconds are over"],
)
def test_the_first_pass_does_not_count_and_short_ones_are_repeated(
    tmp_path, monkeypatch, passes, expected
):
    trainer = open_run(tiny_args(tmp_path), quiet=True)
    readings = iter([reading for seconds in passes for reading in (0.0, seconds)])
    monkeypatch.setattr(dtype_choice.time, "perf_counter", lambda: next(readings))
    micro = trainer.batches.largest(1)
    assert (
        dtype_choice.seconds_of_step(trainer.model, trainer.objective, micro, FLOAT32) == expected
    )
    assert next(readings, None) is None

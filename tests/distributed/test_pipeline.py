"""Layers on several stages: one model in all that is asked of it."""

import itertools
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed.ranks import run_ranks
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.config.parallel_args import ParallelArgs
from transom.data.batch import NO_TARGET, Batch
from transom.distributed.mesh import Meshes
from transom.distributed.parallelize import parallelize
from transom.distributed.parts import local_part
from transom.distributed.pipeline import divide_layers, scored, stage_layers, stage_of
from transom.distributed.ranks import ALONE, Ranks
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput
from transom.planning.counts import layer_flops_per_token, output_flops_per_token
from transom.training.config import read_config
from transom.training.loop.run_data import RunData
from transom.training.loop.run_folder import RunFolder
from transom.training.loop.run_parts import RunParts
from transom.training.loop.step import Stepper
from transom.training.losses.objectives import NextToken

EXPERTS = {"num_experts": 4, "top_k": 2, "hidden_dim": 24, "dense_layers": [0], "balance": "bias"}
MODELS = {
    "tied": tiny_args(n_layers=4, tie_embeddings=True),
    "experts": tiny_args(n_layers=4, moe_args={**EXPERTS, "z_loss_coef": 0.01}),
}


@pytest.mark.parametrize(
    "args",
    [
        tiny_args(n_layers=7),
        tiny_args(n_layers=7, vocab_size=2000),
        tiny_args(n_layers=7, sliding_window=4, layer_pattern="SSF", vocab_size=300),
    ],
    ids=["small output", "large output", "windows"],
)
def test_the_slowest_stage_is_as_fast_as_can_be(args):
    costs = [layer_flops_per_token(layer, args.max_seq_len) for layer in args.layers]
    costs[-1] += output_flops_per_token(args)

    def slowest(ends):
        return max(sum(costs[start:end]) for start, end in itertools.pairwise((0, *ends, 7)))

    best = min(map(slowest, itertools.combinations(range(1, 7), 2)))
    stages = stage_layers(args, 3)
    assert [index for stage in stages for index in stage] == list(range(7))
    assert slowest([stage.stop for stage in stages[:2]]) == pytest.approx(best)


def test_a_loss_over_all_layers_is_refused():
    moe = {**EXPERTS, "balance": "mixtral", "balance_scope": "batch"}
    with pytest.raises(RequestError, match=r"moe_args.balance_scope: got 'batch'; expected seq"):
        divide_layers(random_model(tiny_args(n_layers=4, moe_args=moe)), None)


def padded_rows():
    """Rows of unequal length, so that micro-batches have different shapes."""
    lengths = torch.tensor([9, 4, 12, 7, 3, 5, 11, 6])
    tokens = random_tokens(8, 12)
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(12) >= lengths[:, None] - 1, NO_TARGET)
    return Batch(tokens, targets, lengths=lengths)


def stepper(name, degrees, accumulate):
    """Return what takes steps over `padded_rows`, on one rank or several."""
    model, ranks = random_model(MODELS[name]).double().train(), ALONE
    if degrees is not None:
        meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
        ranks = Ranks(meshes.rank, 4, torch.device("cpu"), meshes, quiet=True)
        parallelize(model, meshes)
    rows = list(padded_rows().micro_batches(ranks.row_ranks))[ranks.row_rank]
    batches = SimpleNamespace(next=lambda: rows, state=None)
    base = {
        "model": {"dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 61, "max_seq_len": 16},
        "data": {"seq_len": 16, "batch_size": 8},
        "optimizer": {"name": "adamw", "lr": 0.01, "max_grad_norm": 0.1},
        "accumulate": accumulate,
        "dtype": "float32",
        "device": "cpu",
    }
    parts = RunParts(model, None, RunData(batches, {}, 8), NextToken(model), None)
    args = read_config(None, base=base)
    return Stepper(args, parts, RunFolder("run"), ranks, torch.float32)


def two_steps(name, degrees=None, accumulate=1):
    """Return numbers and weights after two steps."""
    made = stepper(name, degrees, accumulate)
    numbers = {}
    for step in range(2):
        result = made.step()
        numbers |= {f"{step} loss": result.loss, f"{step} norm": result.grad_norm}
        numbers |= {f"{step} {key}": value for key, value in result.parts.items()}
        if result.router is not None:
            numbers |= {f"{step} {key}": one for key, one in result.router._asdict().items()}
    weights = {
        key: one.full_tensor() if isinstance(one, DTensor) else one
        for key, one in made.model.named_parameters()
    }
    return {key: torch.as_tensor(one).detach().numpy() for key, one in (numbers | weights).items()}


@pytest.mark.parametrize(
    ("name", "degrees", "accumulate"),
    [
        ("experts", {"pipeline": 4}, 4),
        ("tied", {"pipeline": 2, "shard": 2}, 2),
        ("tied", {"pipeline": 4}, 2),
    ],
    ids=["a stage without experts", "tied embeddings, FSDP", "fewer micro-batches than stages"],
)
def test_steps_over_unequal_rows_are_those_of_one_process(name, degrees, accumulate, tmp_path):
    alone = two_steps(name)
    stages = run_ranks(two_steps, 4, tmp_path, name, degrees, accumulate)
    assert {key for stage in stages for key in stage} == set(alone)
    for stage in stages:
        assert len(stage) < len(alone)
        for key, value in stage.items():
            assert value == pytest.approx(alone[key], rel=1e-6, abs=1e-8), key


def overflow(degrees):
    """Return weights and scales after a step in which one rank overflows, and one in which none."""
    made = stepper("tied", degrees, 4)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    weights = [one for one in made.model.parameters() if one.ndim == 2]

    def fill(weight):
        if torch.distributed.get_rank() == 1:
            local_part(weight.grad).fill_(torch.inf)

    handle = weights[-1].register_post_accumulate_grad_hook(fill)
    before = [local_part(one).clone() for one in weights]
    made.step()
    same = all(map(torch.equal, before, map(local_part, weights)))
    scales = [made.scaler.get_scale()]
    handle.remove()
    made.step()
    moved = not any(map(torch.equal, before, map(local_part, weights)))
    return same, moved, made.progress.skipped_steps, [*scales, made.scaler.get_scale()]


@pytest.mark.parametrize("degrees", [{"pipeline": 4}, {"pipeline": 2, "tensor": 2}], ids=str)
def test_an_overflow_of_one_rank_skips_the_step_and_lowers_the_scale_of_all(degrees, tmp_path):
    for found in run_ranks(overflow, 4, tmp_path, degrees):
        assert found == (True, True, 1, [2.0**9, 2.0**9])


def calls(model):
    """Return what calls without gradients give."""
    model = model.double()
    rows = padded_rows()
    with torch.no_grad():
        output = model(TransformerInput(rows.tokens, lengths=rows.lengths))
        score = NextToken(model, chunk=5).evaluate([rows])
        with mock.patch.object(torch.distributed, "broadcast") as waits:
            halves = partial(NextToken(model, chunk=5).evaluate, [*rows.micro_batches(2)])
            assert scored(model, halves).value == pytest.approx(score.value, rel=1e-9)
        assert not waits.called, "a stage waits for the last one between batches"
    real = (torch.arange(12) < rows.lengths[:, None]).unsqueeze(-1)
    tokens = generate(model, [[3, 1, 4], [1, 5]], 6, temperature=1.0, seed=2)
    states = (output.logits * real, output.hidden_BTD * real, torch.tensor(score.value), tokens)
    return [one.numpy() for one in states]


def calls_of_stages(name):
    meshes = Meshes.make(ParallelArgs(pipeline=2, shard=2), "cpu")
    model = parallelize(random_model(MODELS[name]).double(), meshes)
    found = calls(model)
    with pytest.raises(AssertionError, match="gradients are computed"):
        model(TransformerInput(random_tokens(1, 3)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_returns_what_the_whole_model_would(name, tmp_path):
    alone = calls(random_model(MODELS[name]))
    for found in run_ranks(calls_of_stages, 4, tmp_path, name):
        for one, expected in zip(found, alone, strict=True):
            assert one == pytest.approx(expected, rel=1e-9, abs=1e-12)


def bad_weight():
    made = stepper("tied", {"pipeline": 4}, 4)
    if stage_of(made.model).index == 2:
        next(iter(made.model.layers)).attention.wq.weight.data[0, 0] = torch.nan
    with pytest.raises(WorkError) as error:
        made.step()
    return str(error.value)


def test_all_stages_name_the_bad_weight_of_one(tmp_path):
    (message,) = set(run_ranks(bad_weight, 4, tmp_path))
    assert "the loss is nan; the weight layers.2.attention.wq.weight is not finite" in message

"""Optimizers, losses, adapters and codes of a divided model equal those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks import parallel
from tests.distributed.ranks import run_ranks
from tests.training.finetune.runs import (
    base_folder,
    chats,
    judged,
    letters,
    preferences,
    run_args,
    solved,
)
from transom.base.errors import RequestError
from transom.base.runtime import memory_bytes, reset_peak_memory, resident_bytes
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.config.model_args import ModelArgs
from transom.config.parallel_args import ParallelArgs
from transom.data.batch import NO_TARGET, Batch
from transom.distributed.checkpoint import between_steps
from transom.distributed.loading import allocate, load_parts
from transom.distributed.mesh import Meshes
from transom.distributed.parallelize import parallelize
from transom.distributed.parts import copy_full, full_tensor, local_part
from transom.distributed.placement import check_leaves
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model
from transom.training.loop.setup import open_run
from transom.training.loop.step import Stepper
from transom.training.losses.cross_entropy import head_loss
from transom.training.losses.log_probs import target_log_probs
from transom.training.optim import muon
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.ema import Ema
from transom.training.optim.optimizers import build_optimizer

DENSE: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 101,
    "max_seq_len": 64,
}
EXPERTS = {"num_experts": 4, "top_k": 2, "hidden_dim": 24, "shared_hidden_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "tied": {**DENSE, "tie_embeddings": True, "logit_softcap": 3.0, "mup_base_dim": 16},
    "experts": {**DENSE, "moe_args": {**EXPERTS, "shared_expert": True}},
    "wide": {**DENSE, "dim": 512, "hidden_dim": 512},
    "latent": {
        **DENSE,
        "n_kv_heads": 4,
        "mla_args": {
            "kv_lora_rank": 16,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
    },
}


def model_of(name: str) -> LLM:
    torch.manual_seed(0)
    model = LLM(ModelArgs.from_dict(MODELS[name])).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(one.detach()).clone() for name, one in model.named_parameters()}


def largest_difference(found: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == right.keys()
    return max((float((found[name] - right[name]).abs().max()), name) for name in found)


def give_gradients(model: LLM, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.grad = torch.zeros_like(weight)
        copy_full(weight.grad, grad)


def optimizer_steps(kind: str, name: str, degrees: dict[str, int]) -> dict[str, Any]:
    """Take steps with the same full gradients in one process and on all ranks."""
    meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
    args = OptimizerArgs(
        name=kind.removesuffix("8bit"), lr=0.01, state_bits=8 if "8" in kind else 32
    )
    results = []
    with mock.patch.object(muon, "orthogonalize", wraps=muon.orthogonalize) as turn:
        for model, group in (
            (model_of(name), None),
            (parallelize(model_of(name), meshes), meshes.group("weights")),
        ):
            turn.reset_mock()
            optimizer = build_optimizer(model, args, device_type="cpu", group=group)
            average, before = Ema(model, 0.5), full_weights(model)
            for step in range(2):
                give_gradients(model, step)
                optimizer.step()
                average.update(step)
            with average.swapped():
                averages = full_weights(model)
            results.append((full_weights(model), averages, set(optimizer.state_tensors())))
    expected, found = results
    assert all((found[0][name] != before[name]).any() for name in before)
    return {
        "error": max(
            largest_difference(found[0], expected[0]), largest_difference(found[1], expected[1])
        ),
        "other names": found[2] ^ expected[2],
        "turned": sum(len(call.args[0]) for call in turn.call_args_list),
    }


STEPS = [
    ("muon", "dense", {"shard": 2, "tensor": 2}),
    ("muon", "dense", {"replicate": 2, "shard": 2}),
    ("muon", "latent", {"shard": 2, "tensor": 2}),
    ("muon", "experts", {"shard": 2, "tensor": 2}),
    ("muon", "experts", {"shard": 4, "expert": 2}),
    ("adamw", "experts", {"shard": 4, "expert": 2}),
    ("adamw", "dense", {"shard": 2, "tensor": 2}),
    ("adamw8bit", "wide", {"shard": 4}),
    ("adamw8bit", "wide", {"shard": 2, "tensor": 2}),
]


def all_steps() -> list[dict[str, Any]]:
    return [optimizer_steps(*case) for case in STEPS]


@pytest.mark.slow
def test_optimizers_and_averages_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    shares = run_ranks(all_steps, 4, tmp_path)
    for case, found in zip(STEPS, zip(*shares, strict=True), strict=True):
        assert max(one["error"] for one in found)[0] < 1e-6, case
        assert not any(one["other names"] for one in found), case
    counts = [share[0]["turned"] for share in shares]
    assert sum(counts) == 2 * 14, "each of 14 matrices is orthogonalised once in each of 2 steps"
    assert max(counts) - min(counts) <= 1


def gradients_of(model: LLM, micro: Batch, loss_of: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Return the loss over all ranks, and the full gradients."""
    output = model(replace(micro.inputs(), logits="none"))
    loss = loss_of(model, output.hidden_BTD, micro)
    loss.backward()
    found = {
        name: full_tensor(one.grad)
        for name, one in model.named_parameters()
        if one.grad is not None
    }
    return {"loss": loss.detach(), **found}


def batch_of(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 101, (rows, 16), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[0, 3:9] = NO_TARGET
    weights = torch.rand(rows, 16, generator=generator, dtype=torch.float64)
    return Batch(tokens, targets, weights=weights)


def plain_loss(model: LLM, hidden_BTD: Tensor, micro: Batch) -> Tensor:
    return head_loss(model, hidden_BTD, micro.targets, chunk=None)


def chunked_loss(model: LLM, hidden_BTD: Tensor, micro: Batch) -> Tensor:
    return head_loss(model, hidden_BTD, micro.targets, chunk=7, weights_BT=micro.weights)


def log_prob_loss(model: LLM, hidden_BTD: Tensor, micro: Batch) -> Tensor:
    return target_log_probs(model, hidden_BTD, micro.targets, chunk=7).square().sum()


def losses() -> list[tuple[float, str]]:
    found = []
    for name, degrees in VOCABULARIES:
        meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
        model, rows = parallelize(model_of(name), meshes), meshes.size("rows")
        for loss_of in (plain_loss, chunked_loss, log_prob_loss):
            both = batch_of(4)
            part = list(both.micro_batches(rows))[meshes.index("rows")]
            right = gradients_of(model_of(name), both, loss_of)
            with mock.patch.object(LLM, "project", autospec=True, side_effect=LLM.project) as whole:
                here = gradients_of(model, part, loss_of)
            assert whole.called == (loss_of is log_prob_loss), "a rank had all logits"
            dist.all_reduce(here["loss"], group=meshes.group("parts"))
            error, where = largest_difference(here, right)
            found.append((error, f"{name} {degrees} {loss_of.__name__} {where}"))
            model.zero_grad()
    return found


VOCABULARIES = [("dense", {"tensor": 4}), ("tied", {"shard": 2, "tensor": 2})]


def test_tensor_ranks_share_the_vocabulary_and_compute_the_same_loss(tmp_path: Path) -> None:
    for found in run_ranks(losses, 4, tmp_path):
        assert max(found)[0] < 1e-11, max(found)


WIDE: dict[str, Any] = {**DENSE, "dim": 64, "hidden_dim": 128}
ADAPTED: dict[str, dict[str, Any]] = {
    "dense": WIDE,
    "tied": {**WIDE, "tie_embeddings": True},
    "experts": {**WIDE, "moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 64}},
}
ALL = ("all-linear", "tok_embeddings")
# Model, settings of quantization, targets of adapters, DoRA, degrees.
ADAPTERS: list[tuple[str, dict[str, Any] | None, tuple[str, ...], bool, dict[str, int]]] = [
    ("dense", {"kind": "nf4", "group": 32}, ALL, False, {"shard": 4}),
    ("dense", {"kind": "nf4", "group": 32, "double_quant": True}, ALL, True, {"shard": 4}),
    ("dense", {"kind": "nf4", "group": 32}, (*ALL, "output"), False, {"shard": 2, "tensor": 2}),
    ("dense", {"kind": "int8", "group": 0, "zero_points": True}, ALL, False, {"tensor": 4}),
    ("dense", None, ("wq", "wv", "w_gate"), True, {"shard": 2, "tensor": 2}),
    (
        "tied",
        {"kind": "int4", "group": 32, "embeddings": True},
        ALL,
        False,
        {"shard": 2, "tensor": 2},
    ),
    ("experts", {"kind": "nf4", "group": 32}, ALL, False, {"shard": 4, "expert": 2}),
    ("experts", {"kind": "int8", "group": 32}, ALL, False, {"shard": 2, "tensor": 2}),
]


def adapted(name: str, quantized: dict[str, Any] | None, targets: Any, dora: bool) -> LLM:
    torch.manual_seed(0)
    model = LLM(ModelArgs.from_dict(ADAPTED[name])).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    if quantized is not None:
        quantize_model(model, QuantizeArgs.from_dict(quantized))
    apply_lora(model, LoraArgs(rank=4, targets=targets, dora=dora), quiet=True)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    return model


def adapters() -> list[tuple[float, float, str]]:
    found = []
    for *what, degrees in ADAPTERS:
        meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
        one, model = adapted(*what), parallelize(adapted(*what), meshes)
        part = list(batch_of(4).micro_batches(meshes.size("rows")))[meshes.index("rows")]
        right = gradients_of(one, batch_of(4), plain_loss)
        here = gradients_of(model, part, plain_loss)
        dist.all_reduce(here["loss"], group=meshes.group("parts"))
        error, where = largest_difference(here, right)
        with torch.no_grad():  # few rows are multiplied straight from the codes
            few = replace(batch_of(1).inputs(), logits="last")
            logits = float((model(few).logits - one(few).logits).abs().max())
        found.append((error, logits, f"{what} {degrees} {where}"))
    return found


@pytest.mark.slow
def test_adapters_and_codes_are_divided(tmp_path: Path) -> None:
    for found in run_ranks(adapters, 4, tmp_path):
        for error, logits, case in found:
            assert error < 1e-11, case
            assert logits < 1e-12, case


@pytest.mark.parametrize(
    ("quantized", "dora", "ranks", "expected"),
    [
        ({"group": 32}, False, 4, "the 2 groups of 32 inputs of layers.0.attention.wo"),
        ({"kind": "int8", "group": 0}, False, 64, "the 32 pairs of 2 inputs of layers.0.attention"),
        (
            {"group": 32, "double_quant": True},
            False,
            2,
            "the 1 blocks of 256 scales of layers.0.attention.wq",
        ),
        (None, True, 2, "layers.0.attention.wo would be divided, whose norm DoRA needs"),
    ],
)
def test_leaves_that_tensor_ranks_cannot_divide_are_named(
    quantized: dict[str, Any] | None, dora: bool, ranks: int, expected: str
) -> None:
    model = adapted("dense", quantized, ("all-linear",), dora)
    with pytest.raises(RequestError, match=f"parallel.tensor: got {ranks}; .*{expected}"):
        check_leaves(model, ranks)


STARTS = [
    ("dense", {"shard": 4}),
    ("tied", {"shard": 2, "tensor": 2}),
    ("experts", {"shard": 4, "expert": 2}),
]


def starts(folder: Path) -> list[tuple[str, Any]]:
    found = []
    for name, degrees in STARTS:
        meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
        place = meshes, torch.device("cpu")
        args = ModelArgs.from_dict(MODELS[name])
        one, model = LLM(args), allocate(args, *place)
        one.init_weights(3)
        model.init_weights(3, copy_full)
        found.append((f"{name} drawn", largest_difference(full_weights(model), full_weights(one))))
        kept, all_of_it = (
            sum(local_part(weight).untyped_storage().nbytes() for weight in some.parameters())
            for some in (model, one)
        )
        assert kept < 0.4 * all_of_it, f"{name}: a rank has {kept} of {all_of_it} bytes"
        model = load_parts(folder / name, *place)
        one = load(folder / name)
        found.append((f"{name} read", largest_difference(full_weights(model), full_weights(one))))
    return found


def test_ranks_start_with_their_parts_of_the_same_weights(tmp_path: Path) -> None:
    for name, _ in STARTS:
        save(model_of(name).float(), tmp_path / name, "hf" if name == "dense" else "native")
    for found in run_ranks(starts, 4, tmp_path, tmp_path):
        assert [(case, error) for case, (error, _) in found if error] == []


def averaged() -> tuple[float, float, set[bool]]:
    """Score averaged weights of a divided model, and then compute with its own weights."""
    meshes = Meshes.make(ParallelArgs(), "cpu")
    model = parallelize(model_of("dense"), meshes)
    average, inputs = Ema(model, 0.5), replace(batch_of(1).inputs(), logits="last")
    optimizer = build_optimizer(model, OptimizerArgs(lr=0.1), device_type="cpu")
    give_gradients(model, 0)
    optimizer.step()
    average.update(0)
    with torch.no_grad():
        own = model(inputs).logits
        between_steps(model)
        with average.swapped():
            scored = model(inputs).logits
            between_steps(model)
        divided = {isinstance(weight, DTensor) for weight in model.parameters()}
        again = model(inputs).logits
    return float((own - scored).abs().max()), float((own - again).abs().max()), divided


def test_scores_of_averaged_weights_leave_no_gathered_copy(tmp_path: Path) -> None:
    for moved, error, divided in run_ranks(averaged, 2, tmp_path):
        assert moved > 1e-3
        assert error == 0
        assert divided == {True}


@pytest.mark.slow
def test_a_rank_of_four_has_at_most_a_third_of_the_memory() -> None:
    one, rank = parallel.measured({"shard": 1}, 1), parallel.measured({"shard": 4}, 4)
    assert rank["kept"] < 0.26 * one["kept"]
    assert rank["peak"] < 0.35 * one["peak"]


DISTILL = {"objective": "distill", "method": "full"}
RUNS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], dict[str, int]]] = {
    "all weights": (chats, {"method": "full"}, {"shard": 2}),
    "adapter beside codes": (chats, {"quantize": {"kind": "nf4", "group": 0}}, {"tensor": 2}),
    "single answers": (judged, {"objective": "kto"}, {"shard": 2}),
    "preferences": (preferences, {"objective": "dpo"}, {"tensor": 2}),
    "teacher": (chats, {**DISTILL, "teacher": "deep"}, {"context": 2}),
    "teacher in a pipeline": (chats, {**DISTILL, "teacher": "deep"}, {"pipeline": 2}),
    "teacher that tensor ranks cannot divide": (
        chats,
        {**DISTILL, "teacher": "one head"},
        {"tensor": 2},
    ),
    "new rows": (chats, {"method": "full", "new_tokens": ["<|x|>"]}, {"shard": 2}),
    "new rows of an adapter": (chats, {"new_tokens": ["<|x|>"]}, {"tensor": 2}),
    "replaced weights": (
        chats,
        {"lora": {"rank": 4, "targets": ["wq"], "modules_to_save": ["norm", "output", "wo"]}},
        {"shard": 2},
    ),
    "scored before": (preferences, {"method": "full", "objective": "dpo"}, {"shard": 2}),
    "norms of codes": (
        chats,
        {"quantize": {"group": 0, "fit_scales": True}, "lora": {"rank": 4, "dora": True}},
        {"pipeline": 2},
    ),
}


def fine_tuned(folder: Path, out: str, divided: bool) -> dict[str, list[float]]:
    """Return the losses of three steps and a score between them, of every run."""
    found = {}
    for name, (rows, finetune, degrees) in RUNS.items():
        meshes = Meshes.make(ParallelArgs(**degrees), "cpu") if divided else None
        data = folder / f"{rows.__name__}.jsonl"
        words = (f"out={folder / out / rows.__name__}", "dtype=float32")
        if "teacher" in finetune:
            words += (f"finetune.teacher={folder / finetune['teacher']}",)
        args = run_args(folder, folder / "base", data, *words, **finetune)
        trainer = open_run(args, quiet=True, overwrite=True, meshes=meshes)
        losses = [trainer.step().loss, trainer.step().loss]
        found[name] = [*losses, trainer.evaluate(None).value, trainer.step().loss]
        trainer.run.release()
    return found


@pytest.mark.slow
def test_fine_tuning_on_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    base_folder(tmp_path / "base")
    base_folder(tmp_path / "deep", n_layers=3)
    base_folder(tmp_path / "one head", n_heads=1, n_kv_heads=1)
    for rows in {rows for rows, _, _ in RUNS.values()}:
        rows(tmp_path / f"{rows.__name__}.jsonl")
    alone = fine_tuned(tmp_path, "alone", False)
    for share in run_ranks(fine_tuned, 2, tmp_path, tmp_path, "ranks", True):
        for name, numbers in share.items():
            assert numbers == pytest.approx(alone[name], abs=1e-4), name


SAMPLING = {"objective": "grpo", "method": "full", "group": 2, "answer_tokens": 16}


def sampled_step(folder: Path, degrees: dict[str, int] | None) -> dict[str, Tensor]:
    """Return the loss and the gradients of a step of GRPO, whose answers end after 1 to 16 tokens."""
    meshes = None if degrees is None else Meshes.make(ParallelArgs(**degrees), "cpu")
    words = (f"out={folder / 'run'}", "data.batch_size=2", "accumulate=2")
    words = words if meshes is None or meshes.size("rows") == 1 else words[:2]
    reward = {"reward": f"{letters.__module__}:{letters.__name__}"}
    args = run_args(folder, folder / "base", folder / "solved.jsonl", *words, **SAMPLING, **reward)
    trainer = open_run(args, quiet=True, overwrite=True, meshes=meshes)
    vars(trainer.objective)["stop_tokens"] = range(0, 258, 5)
    found, reduced = {}, Stepper._reduced_norm

    def keep(stepper: Stepper) -> Tensor:
        norm = reduced(stepper)
        found.update(
            {name: full_tensor(one.grad) for name, one in trainer.model.named_parameters()}
        )
        return norm

    with mock.patch.object(Stepper, "_reduced_norm", keep):
        result = trainer.step()
    trainer.run.release()
    return {"loss": torch.tensor(result.loss), **found}


@pytest.mark.slow
def test_a_step_of_grpo_on_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    base_folder(tmp_path / "base")
    solved(tmp_path / "solved.jsonl")
    alone = sampled_step(tmp_path, None)
    for degrees in ({"replicate": 2, "shard": 1}, {"shard": 2}, {"tensor": 2}, {"pipeline": 2}):
        (here := tmp_path / "-".join(degrees)).mkdir()
        for found in run_ranks(sampled_step, 2, here, tmp_path, degrees):
            right = {name: alone[name] for name in found}  # stages have their own weights
            assert largest_difference(found, right)[0] < 1e-6, degrees


def peak(folder: Path, finetune: dict[str, Any], degrees: dict[str, int]) -> int:
    """Return the bytes that a rank takes from opening a run to the end of its first step."""
    meshes = Meshes.make(ParallelArgs(**degrees), "cpu")
    for size in ("small", "large"):  # the first run of a process also takes what any run does
        of_teacher = finetune.get("objective") == "distill"
        base, teacher = ("small", {"teacher": str(folder / size)}) if of_teacher else (size, {})
        reset_peak_memory(torch.device("cpu"))
        before = resident_bytes()
        args = run_args(
            folder, folder / base, folder / "chats.jsonl", "dry_run=false", **finetune, **teacher
        )
        trainer = open_run(args, quiet=True, overwrite=True, meshes=meshes)
        trainer.step()
        trainer.run.release()
    return memory_bytes(torch.device("cpu")) - before


def write_bases(folder: Path) -> None:
    heads = {"n_heads": 8, "n_kv_heads": 8}
    base_folder(folder / "small", **heads, dim=256, hidden_dim=256, n_layers=4)
    base_folder(folder / "large", **heads, dim=512, hidden_dim=1536, n_layers=16)


@pytest.mark.slow
def test_no_rank_has_all_of_the_base_or_the_teacher(tmp_path: Path) -> None:
    chats(tmp_path / "chats.jsonl")
    # In a process of its own, since ranks would inherit memory that it has freed.
    run_ranks(write_bases, 1, tmp_path, tmp_path)
    size = (tmp_path / "large/model.safetensors").stat().st_size
    codes = {"quantize": {"kind": "nf4"}}
    for finetune, degrees, share in (
        ({}, {"shard": 4}, 0.75),
        (codes, {"shard": 2, "tensor": 2}, 0.4),
        (codes, {"pipeline": 4}, 0.5),
        ({"objective": "distill"}, {"tensor": 2, "shard": 2}, 0.6),
    ):
        (here := tmp_path / "-".join(degrees)).mkdir()
        found = run_ranks(peak, 4, here, tmp_path, finetune, degrees)
        assert max(found) < share * size, degrees


def unscaled() -> tuple[float, float]:
    """Unscale gradients on two meshes, of which one overflows on one rank in the second step."""
    meshes = Meshes.make(ParallelArgs(shard=4, expert=2), "cpu")
    model = parallelize(model_of("experts").float(), meshes)
    args, group = OptimizerArgs(name="muon"), meshes.group("weights")
    optimizers = build_optimizer(model, args, device_type="cpu", group=group).all
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    give_gradients(model, 0)
    expected = {name: full_tensor(one.grad) / 8 for name, one in model.named_parameters()}
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    found = {name: full_tensor(one.grad) for name, one in model.named_parameters()}
    scaler.update()
    give_gradients(model, 1)
    if dist.get_rank() == 1:
        local_part(model.layers[0].feed_forward.experts.w_out.weight.grad).fill_(torch.inf)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    scaler.update()
    return largest_difference(found, expected)[0], scaler.get_scale()


def test_gradients_of_float16_are_unscaled_on_every_mesh(tmp_path: Path) -> None:
    assert run_ranks(unscaled, 4, tmp_path) == [(0.0, 4.0)] * 4
